"""The console script `bsjax`: `generate` answers a question about images, `mask` draws a mask."""

import argparse
import dataclasses
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsjax.categories import BaseVisibility, HeadCategory
from bsjax.errors import BsjaxError, TemplateError

if TYPE_CHECKING:
    from bsjax.generation import Result
    from bsjax.template import Template

_EPILOG = """\
examples:
  bsjax generate checkpoints/qwen2-vl-2b "Which picture shows a cat?" one.jpg two.jpg --stream
  bsjax mask checkpoints/qwen2-vl-2b "Which picture shows a cat?" one.jpg two.jpg --output mask.png
  bsjax mask --segments text:12,image:256,text:5,image:300,text:9 --category sink

Checkpoints are folders written by `python -m convert`.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="bsjax",
        description="Block-sparse prefill for vision-language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_mask(commands)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer a question about images",
        description="Answers a question about images: the answer to stdout, figures to stderr.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a converted checkpoint's folder")
    parser.add_argument("question", metavar="QUESTION")
    _add_images(parser)
    profiles = parser.add_mutually_exclusive_group()
    profiles.add_argument(
        "--profile", metavar="FILE", help="a profile's file, or a shipped one's name; else dense"
    )
    profiles.add_argument(
        "--uniform",
        metavar="CATEGORY",
        type=_category,
        help=f"for experiments: the same category in all heads ({_CATEGORY_NAMES})",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print the answer as it comes")
    output.add_argument("--json", action="store_true", help="print answer and figures as JSON")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default): the likeliest token each time"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens of probability P"
    )
    parser.add_argument("--seed", type=int, default=0, help="for --temperature above 0")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: by device")
    parser.add_argument(
        "--backend", default="auto", help="of the attention: auto, pallas, xla, reference"
    )
    parser.set_defaults(run=_generate)


def _add_mask(commands: Any) -> None:
    parser = commands.add_parser(
        "mask",
        help="draw a prompt's mask to a picture",
        description="Draws what the queries of a prompt see, in prompt order and in packed order. "
        "Reads a checkpoint's tokenizer and image settings, not its weights. For Gemma 3 the mask "
        "is a global layer's.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?")
    parser.add_argument("question", metavar="QUESTION", nargs="?")
    _add_images(parser)
    parser.add_argument(
        "--segments",
        metavar="LIST",
        help="describe the prompt instead, such as text:12,image:256,text:5",
    )
    parser.add_argument(
        "--category",
        type=_category,
        default=HeadCategory.INTRA_IMAGE_SINK,
        help=f"{_CATEGORY_NAMES}; default: intra_image_sink",
    )
    parser.add_argument("--output", type=Path, default=Path("mask.png"), help="default: mask.png")
    parser.set_defaults(run=_mask)


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="paths or URLs, in order")
    parser.add_argument(
        "--image", action="append", default=[], metavar="IMAGE", help="one more, after those"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument(
        "--max-pixels", type=int, metavar="N", help="scale larger images down to N pixels (Qwen)"
    )
    parser.add_argument(
        "--pan-and-scan", action="store_true", help="add crops of long images (Gemma 3)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      The exit status: 0 done, 2 bad input (one line on stderr says what), 130 interrupted.
    """
    options = build_parser().parse_args(arguments)
    # transformers is used for tokenizers and images: torch need not be there.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Answers hold characters that not every terminal's encoding has.
        sys.stdout.reconfigure(errors="replace")
    try:
        options.run(options)
    except BsjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _generate(options: argparse.Namespace) -> None:
    import bsjax

    model = bsjax.load(options.checkpoint, dtype=options.dtype)
    profile = options.profile
    if options.uniform is not None:
        profile = bsjax.Profile.uniform(options.uniform, model)

    def show(piece: str, token_id: int) -> None:
        print(piece, end="", flush=True)

    result = bsjax.generate(
        model,
        _messages(options),
        profile=profile,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stream=show if options.stream else None,
        backend=options.backend,
    )
    assert isinstance(result, bsjax.Result)
    if options.json:
        print(json.dumps(dataclasses.asdict(result), ensure_ascii=False, indent=2))
        return
    print("" if options.stream else result.text)
    print(_figures(result), file=sys.stderr)


def _mask(options: argparse.Namespace) -> None:
    from bsjax.block_mask import BlockMask

    template, visibility = _template(options)
    mask = BlockMask(template, [options.category], **visibility._asdict())
    mask.plot(options.output)
    images = mask.template.num_images
    print(
        f"{mask.template.tokens} tokens, {images} image{'' if images == 1 else 's'}, "
        f"{options.category.name}: {mask.density:.1%} of the dense attention"
    )
    print(options.output)


def _template(options: argparse.Namespace) -> "tuple[Template, BaseVisibility]":
    """The prompt's template, and what a layer lets its queries see: the family's last kind."""
    from bsjax.template import Template

    if options.segments is not None:
        if options.checkpoint is not None:
            raise TemplateError("Give a checkpoint and a question, or --segments; not both.")
        of_checkpoints = (options.image, options.system, options.max_pixels, options.pan_and_scan)
        if any(value not in (None, False, []) for value in of_checkpoints):
            raise TemplateError(
                "--image, --system, --max-pixels and --pan-and-scan belong to a checkpoint's "
                "prompt."
            )
        return Template.from_segments(_segments(options.segments)), BaseVisibility()
    if options.question is None:
        raise TemplateError("Give a checkpoint and a question, or --segments.")
    from bsjax.checkpoint import read_prompt_files
    from bsjax.prompts import prepare_prompt

    files = read_prompt_files(Path(options.checkpoint).expanduser())
    prompt = prepare_prompt(
        _messages(options), files.tokenizer, files.image_processor, files.config
    )
    template = Template.from_tokens(
        prompt.token_ids,
        files.family.prompts.image_token_id(files.config),
        image_tokens=prompt.image_tokens,
    )
    return template, files.family.visibilities(files.config)[-1]


def _segments(text: str) -> list[Any]:
    from bsjax.template import Image, Text

    kinds = {"text": Text, "image": Image}
    segments = []
    for part in text.split(","):
        kind, _, tokens = part.strip().partition(":")
        if kind not in kinds or not tokens.isdecimal():
            raise TemplateError(
                f"--segments: {part.strip()!r} is neither text:N nor image:N. "
                "Example: text:12,image:256,text:5"
            )
        segments.append(kinds[kind](int(tokens)))
    return segments


def _messages(options: argparse.Namespace) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [
        {
            "type": "image",
            "image": image,
            "max_pixels": options.max_pixels,
            "do_pan_and_scan": options.pan_and_scan or None,
        }
        for image in (*options.images, *options.image)
    ]
    content.append({"type": "text", "text": options.question})
    messages = [{"role": "user", "content": content}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    return messages


def _figures(result: "Result") -> str:
    stats = result.stats
    images = ", ".join(map(str, stats.image_tokens)) or "none"
    share = stats.attention_flops_sparse / max(stats.attention_flops_dense, 1)
    kinds = ", ".join(
        f"{kind.sparse / kind.dense:.1%} in {kind.layers} "
        + ("global layers" if kind.window is None else f"layers with a window of {kind.window}")
        for kind in stats.attention_flops_per_kind
        if kind.dense
    )
    by_kind = f" ({kinds})" if len(stats.attention_flops_per_kind) > 1 else ""
    return (
        f"{stats.prompt_tokens} prompt tokens (images: {images}), {len(result.token_ids)} new; "
        f"prefill attention {stats.attention_flops_sparse:.3g} FLOPs, {share:.1%} of "
        f"dense{by_kind}; "
        f"vision {stats.vision_seconds:.2f} s, prefill {stats.prefill_seconds:.2f} s, "
        f"decode {stats.decode_seconds:.2f} s, compile {stats.compile_seconds:.2f} s"
    )


def _category(text: str) -> HeadCategory:
    try:
        return HeadCategory.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {_CATEGORY_NAMES}") from None


_CATEGORY_NAMES = ", ".join(category.name.lower() for category in HeadCategory)

if __name__ == "__main__":
    sys.exit(main())
