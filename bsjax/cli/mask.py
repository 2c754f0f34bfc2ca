"""`bsjax mask`: draws which keys the queries of a prompt see."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsjax.cli.arguments import CATEGORY_NAMES, add_images, category, image_sources_of, messages_of
from bsjax.cli.imports import import_jax, import_libraries
from bsjax.errors import TemplateError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.visibility import Visibility

if TYPE_CHECKING:
    from bsjax.masks.template import Template


def add_to(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "mask",
        help="draw the mask of a prompt",
        description="Draws which keys the queries of a prompt see, in prompt order and in packed "
        "order. Reads a checkpoint's tokenizer and image settings, but not its weights.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?")
    parser.add_argument("question", metavar="QUESTION", nargs="?")
    add_images(parser)
    parser.add_argument(
        "--segments",
        metavar="LIST",
        help="describe the prompt instead, such as text:12,image:256,text:5",
    )
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="with a checkpoint: layer whose mask to draw, from 0. Matters for Gemma 3, where most "
        "layers have a window; default: a layer without one",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="with --segments: a query sees the last N positions, its own included",
    )
    parser.add_argument(
        "--bidirectional-images",
        action="store_true",
        help="with --segments: all tokens of an image see each other, as in Gemma 3",
    )
    parser.add_argument(
        "--category",
        type=category,
        default=HeadCategory.INTRA_IMAGE_SINK,
        help=f"{CATEGORY_NAMES}; default: intra_image_sink",
    )
    parser.add_argument("--output", type=Path, default=Path("mask.png"), help="default: mask.png")
    parser.set_defaults(run=_mask)


def _mask(options: argparse.Namespace) -> None:
    if options.checkpoint is None:
        import_jax()
    else:
        import_libraries(options, devices=False)
    from bsjax.masks.picture import plot_mask
    from bsjax.masks.query_rows import density

    template, visibility = template_and_visibility(options)
    plot_mask(template, options.category, visibility, options.output)
    images = template.num_images
    print(
        f"{template.tokens} tokens, {images} image{'' if images == 1 else 's'}, "
        f"{options.category.name}: {density(template, options.category, visibility):.1%} of the "
        "dense attention"
        + (f" in a window of {visibility.window}" if visibility.window is not None else "")
    )
    print(options.output)


def template_and_visibility(options: argparse.Namespace) -> "tuple[Template, Visibility]":
    """The prompt's template, and the visibility of the layer."""
    from bsjax.masks.template import Template

    if options.segments is not None:
        if options.checkpoint is not None:
            raise TemplateError("Give a checkpoint and a question, or --segments; not both.")
        of_checkpoints = (options.image, options.system, options.max_pixels, options.pan_and_scan)
        given = any(value not in (None, False, []) for value in of_checkpoints)
        if given or options.layer is not None:
            raise TemplateError(
                "--image, --system, --max-pixels, --pan-and-scan and --layer need a checkpoint, "
                "not --segments."
            )
        visibility = Visibility(options.bidirectional_images, options.window)
        return Template.from_segments(_segments(options.segments)), visibility
    if options.window is not None or options.bidirectional_images:
        raise TemplateError(
            "--window and --bidirectional-images need --segments: a checkpoint defines what its "
            "layers see. Choose a layer with --layer."
        )
    if options.question is None:
        raise TemplateError("Give a checkpoint and a question, or --segments.")
    from bsjax.checkpoint.folder import folder_path
    from bsjax.checkpoint.loading import read_processor

    processor = read_processor(folder_path(options.checkpoint))
    processor = dataclasses.replace(processor, image_sources=image_sources_of(options))
    prompt = processor.prompt(messages_of(options))
    template = processor.family.template(prompt, processor.config)
    return template, _visibility(processor.family, processor.config, options.layer)


def _visibility(family: Any, config: Any, layer: int | None) -> Visibility:
    """The visibility of a layer; for None, that of the last kind of layer, which is global."""
    visibilities = family.visibilities(config)
    kinds = family.layer_kinds(config)
    if layer is None:
        return visibilities[kinds.max()]
    if not 0 <= layer < kinds.size:
        raise TemplateError(f"--layer must be from 0 to {kinds.size - 1}, got {layer}.")
    return visibilities[kinds[layer]]


def _segments(text: str) -> list[Any]:
    from bsjax.masks.template import Image, Text

    kinds = {"text": Text, "image": Image}
    segments = []
    for part in text.split(","):
        kind, _, tokens = part.strip().partition(":")
        # No prompt has a number of tokens with more digits, and Python reads at most 4300.
        if kind not in kinds or not tokens.isdecimal() or len(tokens) > 18:
            raise TemplateError(
                f"--segments: {part.strip()!r} is not text:N or image:N. "
                "Example: text:12,image:256,text:5"
            )
        segments.append(kinds[kind](int(tokens)))
    return segments
