"""`bsjax generate`: answers a question about images."""

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from bsjax.cli.arguments import (
    add_device_options,
    add_images,
    add_profiles,
    described_model,
    messages_of,
    profile_of,
)
from bsjax.cli.cuda_noise import import_jax

if TYPE_CHECKING:
    from bsjax.runtime.results import Result


def add_to(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "generate",
        help="answer a question about images",
        description="Answers a question about images. Prints statistics to stderr.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a converted checkpoint's folder")
    parser.add_argument("question", metavar="QUESTION")
    add_images(parser)
    add_profiles(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print the answer as it is generated")
    output.add_argument(
        "--json", action="store_true", help="print the answer and its statistics as JSON"
    )
    parser.add_argument(
        "--use-generation-config",
        action="store_true",
        help="what the options below do not say, as the checkpoint's generation config says",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 64")
    parser.add_argument("--temperature", type=float, help="0 (default): always the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest tokens whose total probability is P",
    )
    parser.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="draw from tokens with at least this share of the likeliest one's probability",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="above 1: tokens that have occurred become less likely",
    )
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before this text"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    add_device_options(parser)
    parser.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    import_jax(devices=True)
    from bsjax.checkpoint.loading import with_weights
    from bsjax.runtime.arguments import checked_prompt, checked_settings
    from bsjax.runtime.generation import generate_once, result_of

    # What can be refused is refused before the weights are read.
    described = described_model(options)
    settings = checked_settings(
        described,
        options.backend,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=options.stop,
        seed=options.seed,
        use_generation_config=options.use_generation_config,
    )
    profile = profile_of(options, described)
    messages, new_tokens = messages_of(options), settings.new_tokens
    prompt = checked_prompt(described, messages, profile, described.options(), new_tokens)

    def show(piece: str, token_id: int) -> None:
        print(piece, end="", flush=True)

    stream = show if options.stream else None
    model = with_weights(described)
    events = generate_once(model, prompt, profile, settings, one_by_one=stream is not None)
    result = result_of(events, stream)
    if options.json:
        print(json.dumps(dataclasses.asdict(result), ensure_ascii=False, indent=2))
        return
    print("" if options.stream else result.text)
    print(_figures(result), file=sys.stderr)


def _figures(result: "Result") -> str:
    stats = result.stats
    images = ", ".join(map(str, stats.image_tokens)) or "none"
    share = stats.attention_flops_sparse / max(stats.attention_flops_dense, 1)
    kinds = ", ".join(
        f"{kind.sparse / kind.dense:.1%} in {kind.name}"
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
