"""Trains the small Qwen2.5-VL and writes it as a Hugging Face checkpoint; goes on where it stopped.

python -m examples.train_small_vlm FOLDER [--sparse-layers 1,3] [--steps N] [--seed N]
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from bsjax.models import FAMILIES
from bsjax.programs import use_persistent_cache

from .batches import Encoder
from .curve import plot_curve
from .export import export
from .files import make_config, make_image_processor, make_tokenizer
from .training import ModelStage, Settings, TowerStage, check_settings, run_stage


def main() -> None:
    """Runs the command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="checkpoints, log, curve and result go there")
    parser.add_argument("--tower-steps", type=int, default=defaults.tower_steps)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--sparse-layers",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        default=(),
        metavar="LIST",
        help="layers that are INTRA_IMAGE_SINK from the start, such as 1,2,4",
    )
    options = parser.parse_args()
    settings = Settings(
        tower_steps=options.tower_steps,
        steps=options.steps,
        seed=options.seed,
        sparse_layers=options.sparse_layers,
    )
    check_settings(options.folder / "settings.json", settings)
    use_persistent_cache()
    tokenizer, image_processor = make_tokenizer(), make_image_processor()
    config = make_config(tokenizer)
    encoder = Encoder(config, tokenizer, image_processor.image_mean, image_processor.image_std)
    module = FAMILIES[config.model_type].build(config, jnp.float32)

    tower = TowerStage(module, settings, encoder)
    run_stage(tower, options.folder / "tower")
    nnx.update(module.visual, jax.device_get(tower.state.parameters[0]))
    stage = ModelStage(module, settings, encoder)
    run_stage(stage, options.folder / "model")
    export(stage.state.parameters, config, options.folder / "checkpoint")
    plot_curve(options.folder, options.folder / "curve.png")
    print(options.folder / "checkpoint")


if __name__ == "__main__":
    main()
