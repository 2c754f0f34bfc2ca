"""Tests run on the CPU, whatever else the machine has."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.paths import ROOT

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What a test says of compilation must not depend on what ran before, nor fill the user's cache.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

# Shells start background jobs with interrupts ignored, and children inherit that. Tests send some.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Compilation and shared machines make single examples slow now and then; that is no failure.
settings.register_profile("bsjax", deadline=None, print_blob=True)
settings.load_profile("bsjax")


@pytest.fixture(scope="session")
def tiny_source() -> Path:
    """A small checkpoint with random weights, as transformers reads it."""
    return ROOT / "examples" / "tiny-qwen2.5-vl"


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_source, tmp_path_factory) -> Path:
    """That checkpoint, converted."""
    import convert.__main__

    folder = tmp_path_factory.mktemp("converted") / "tiny"
    assert convert.__main__.main([str(tiny_source), str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint):
    """That checkpoint, loaded in float32."""
    import bsjax

    return bsjax.load(tiny_checkpoint)
