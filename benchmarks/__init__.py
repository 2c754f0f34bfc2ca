"""Benchmarks. The attention benchmark needs nothing but a CUDA JAX and NumPy."""

from benchmarks import jaxtyping_stand_in

jaxtyping_stand_in.install_where_missing()
