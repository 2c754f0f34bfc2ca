"""A small model: training, demo and evaluation."""

from bsjax.cli.cuda_noise import import_jax

import_jax()
