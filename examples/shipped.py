"""The trained checkpoint and the profile that are shipped, and how examples load a checkpoint."""

import tempfile
from pathlib import Path

from jax.sharding import Mesh

import bsjax
from convert.__main__ import main as convert

from .train_small_vlm.files import make_tokenizer

CHECKPOINT = Path(__file__).parent / "small-qwen2.5-vl"
PROFILE = "small-qwen2.5-vl"


def converted(source: Path, mesh: Mesh | None = None) -> bsjax.LoadedModel:
    """Converts and loads a checkpoint of `train_small_vlm`; leaves no files behind.

    Args:
      source: the checkpoint's folder.
      mesh: as for `bsjax.load`.

    Ends the program if `source` cannot be converted or is not a checkpoint of `train_small_vlm`.

    Raises:
      BsjaxError: as `bsjax.load`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        destination = Path(temporary) / "converted"
        if convert([str(source), str(destination), "--quiet"]) != 0:
            raise SystemExit(1)
        model = bsjax.load(destination, mesh=mesh)
    if model.tokenizer.get_vocab() != make_tokenizer().get_vocab():
        raise SystemExit(f"error: {source} is not a checkpoint of examples.train_small_vlm.")
    return model
