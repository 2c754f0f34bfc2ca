"""A small model: training, demo and evaluation."""

from bsjax.cli.imports import import_jax

import_jax()
