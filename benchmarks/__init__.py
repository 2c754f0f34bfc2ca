"""Benchmarks. The attention benchmark needs only JAX for CUDA and NumPy."""

from benchmarks import jaxtyping_stand_in

jaxtyping_stand_in.install_where_missing()
