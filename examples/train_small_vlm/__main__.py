"""Trains the small Qwen2.5-VL, or continues training, and writes a Hugging Face checkpoint.

    python -m examples.train_small_vlm FOLDER [--sparse-layers 0,1,3] [--steps N] [--seed N]

`--export STEP` trains nothing and writes the model as it was after that step, for which a
checkpoint must exist: every thousandth one and the last two are kept.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from bsjax.models import FAMILIES
from bsjax.runtime.programs import use_persistent_cache

from ..arguments import whole
from .batches import Encoder
from .curve import plot_curve
from .export import export
from .files import make_config, make_image_processor, make_tokenizer
from .forward import groups_of_layers
from .training import (
    ModelStage,
    Settings,
    TowerStage,
    check_settings,
    checkpoints_of,
    restore,
    run_stage,
)


def main() -> None:
    """Runs the command line."""
    options = _parser().parse_args()
    settings = Settings(
        tower_steps=options.tower_steps,
        steps=options.steps,
        seed=options.seed,
        sparse_layers=options.sparse_layers,
    )
    tokenizer, image_processor = make_tokenizer(), make_image_processor()
    config = make_config(tokenizer)
    try:
        groups_of_layers(config, settings.sparse_layers)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    check_settings(options.folder / "settings.json", settings)
    use_persistent_cache()
    encoder = Encoder(config, tokenizer, image_processor.image_mean, image_processor.image_std)
    module = FAMILIES[config.model_type].build(config, jnp.float32)

    if options.export is not None:
        stage = ModelStage(module, settings, encoder)
        with checkpoints_of(options.folder / "model") as manager:
            kept = manager.all_steps()
            if options.export not in kept:
                raise SystemExit(f"error: checkpoints exist only for the steps {sorted(kept)}.")
            restore(stage, manager, options.export)
        result = options.folder / f"checkpoint-{options.export}"
    else:
        every = {"log_every": options.log_every, "save_every": options.save_every}
        tower = TowerStage(module, settings, encoder)
        run_stage(tower, options.folder / "tower", **every)
        nnx.update(module.visual, tower.state.parameters[0])
        stage = ModelStage(module, settings, encoder)
        run_stage(stage, options.folder / "model", **every)
        plot_curve(options.folder, options.folder / "curve.png")
        result = options.folder / "checkpoint"
    export(stage.model, config, result)
    print(result)


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_small_vlm", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="for checkpoints, logs, curve and result")
    parser.add_argument(
        "--tower-steps",
        type=whole(1),
        default=defaults.tower_steps,
        help="number of steps that train the vision tower alone",
    )
    parser.add_argument(
        "--steps",
        type=whole(1),
        default=defaults.steps,
        help="number of steps that train the whole model afterwards",
    )
    parser.add_argument("--seed", type=whole(0), default=defaults.seed)
    parser.add_argument(
        "--log-every", type=whole(1), default=50, metavar="N", help="steps between lines of the log"
    )
    parser.add_argument(
        "--save-every", type=whole(1), default=200, metavar="N", help="steps between checkpoints"
    )
    parser.add_argument(
        "--sparse-layers",
        type=_layers,
        default=defaults.sparse_layers,
        metavar="LIST",
        help="layers that are INTRA_IMAGE_SINK from the start, such as 0,1,3",
    )
    parser.add_argument(
        "--export", type=int, metavar="STEP", help="write the model as it was after this step"
    )
    return parser


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of layers such as 0,1,3"
        ) from None


if __name__ == "__main__":
    main()
