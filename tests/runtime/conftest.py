"""Models that several modules of this folder use."""

import pytest

import bsjax
from convert.conversion import convert_checkpoint
from tests.support import convert_sources as sources


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory):
    """A random Gemma 3 with layers of both kinds and a window of 12 tokens."""
    folder = tmp_path_factory.mktemp("gemma3")
    source = sources.write_source(folder / "hf", "gemma3", tied=True, layers=4)
    convert_checkpoint(source, folder / "ours", dtype="float32")
    return bsjax.load(folder / "ours", "float32")
