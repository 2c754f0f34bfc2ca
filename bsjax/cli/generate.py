"""`bsjax generate`: answers a question about images."""

import argparse
import dataclasses
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsjax.cli.arguments import (
    add_device_options,
    add_images,
    add_profiles,
    described_model,
    messages_of,
    profile_of,
    with_profile,
)
from bsjax.cli.batch import answer_batch, check_options
from bsjax.cli.distributed import add_process_options, is_distributed
from bsjax.cli.imports import import_libraries
from bsjax.errors import GenerationError
from bsjax.timing import Stopwatch, seconds_of_process

if TYPE_CHECKING:
    from bsjax.runtime.results import Result, Stats


_USAGE = """\
bsjax generate CHECKPOINT QUESTION [IMAGE ...] [options]
       bsjax generate CHECKPOINT --batch FILE --output FILE [options]"""

_EPILOG = """\
Each line of a --batch FILE is a conversation: a list of chat messages, or {"messages": [...]} with
them, and optionally "id" and, for <image> placeholders or empty image parts, "images". Paths of
images are relative to the file's folder. A last message of the assistant's is left out.

The first line of --output says what the answers depend on. Every other line is written when an
answer has ended, with the number of its conversation's line: {"line": 1, "text": ..., "token_ids":
..., "finish_reason": ..., "prompt_tokens": ..., "stats": ...}, or {"line": 1, "error": ...}. The
same command goes on where an earlier one was ended, however that happened. Delete a line, such as
one with an error, to have its conversation answered again.

Exit status: 0 if all was answered, 1 if conversations of --batch have errors, 2 for bad input.
"""


class _Batch(argparse.Action):
    """`--batch FILE`, which takes the place of QUESTION.

    A QUESTION that could always be left out would be taken for missing in `CHECKPOINT --stream
    QUESTION`.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Called by argparse when it comes to the option."""
        del option_string
        setattr(namespace, self.dest, values)
        for action in parser._actions:  # noqa: SLF001 (there is no public way)
            if action.dest == "question":
                action.nargs, action.required = "?", False


def add_to(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "generate",
        help="answer a question about images, or a file of conversations",
        description="Answers a question about images, or all conversations of a file, which run\n"
        "together. Prints statistics to stderr.",
        usage=_USAGE,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a converted checkpoint's folder")
    parser.add_argument("question", metavar="QUESTION")
    add_images(parser)
    batch = parser.add_argument_group("many conversations")
    batch.add_argument(
        "--batch", action=_Batch, type=Path, metavar="FILE", help="conversations in JSON Lines"
    )
    batch.add_argument(
        "--output", type=Path, metavar="FILE", help="the answers to --batch, in JSON Lines"
    )
    add_profiles(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print the answer as it is generated")
    output.add_argument(
        "--json", action="store_true", help="print the answer and its statistics as JSON"
    )
    parser.add_argument(
        "--timing", action="store_true", help="print where the time went, to stderr"
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
    add_process_options(parser)
    parser.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    if options.batch is not None:
        check_options(options)
        if is_distributed(options):
            raise GenerationError("--batch cannot be run by several processes: leave out one.")
    elif options.output is not None:
        raise GenerationError("--output is for the answers to --batch; one answer is printed.")
    startup, stopwatch = Stopwatch(), Stopwatch()
    with startup.part("imports"):
        import_libraries(options)
        from bsjax.checkpoint.loading import WeightsReader
        from bsjax.prompts.image_reader import ImageReader
        from bsjax.runtime.arguments import checked_prompt, checked_settings
        from bsjax.runtime.generation import generate_once, result_of

    def show(piece: str, token_id: int) -> None:
        print(piece, end="", flush=True)

    stream = show if options.stream else None
    with ExitStack() as stack:
        # Of several processes, each reads the images that it encodes, which are dealt later.
        shared = is_distributed(options)
        images = stack.enter_context(ImageReader(stopwatch)) if shared else None
        with WeightsReader() as reader:
            # What can be refused is refused without waiting for the weights.
            with startup.part("checkpoint"):
                # Heads are dealt to devices by the profile, which is read later.
                early = options.batch is None and options.tensor == 1
                described = described_model(options, reader if early else None)
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
            described = with_profile(described, profile)
            if options.batch is not None:
                return answer_batch(options, described, settings, profile)
            prompt = checked_prompt(
                described,
                messages_of(options),
                profile,
                described.options(),
                settings.new_tokens,
                stopwatch,
                reader=images,
            )
            with startup.part("weights"):
                model = reader.model(described)
        events = generate_once(
            model,
            prompt,
            profile,
            settings,
            one_by_one=stream is not None,
            reader=images,
            stopwatch=stopwatch,
        )
        result = result_of(events, stream)
    seconds = _seconds(startup, result.stats)
    if options.json:
        document = dataclasses.asdict(result) | {"seconds": seconds}
        print(json.dumps(document, ensure_ascii=False, indent=2))
    else:
        print("" if options.stream else result.text)
        print(_figures(result), file=sys.stderr)
    if options.timing:
        for part, of_part in seconds.items():
            print(f"{of_part:9.3f} s  {part}", file=sys.stderr)
    return 0


def _seconds(startup: Stopwatch, stats: "Stats") -> dict[str, float]:
    """Where the time of the command went, since the process was started."""
    seconds = {
        "imports": startup.seconds["imports"],
        "settings and tokenizer": startup.seconds["checkpoint"],
        "prompt": stats.prompt_seconds,
        "waiting for images": stats.image_seconds,
        "waiting for weights": startup.seconds["weights"],
        "schedules": stats.schedule_seconds,
        "compiling": stats.compile_seconds,
        "pixels to the device": stats.transfer_seconds,
        "vision tower": stats.vision_seconds,
        "prefill": stats.prefill_seconds,
        "decode": stats.decode_seconds,
    }
    total = seconds_of_process()
    return {"start of Python, and other": total - sum(seconds.values()), **seconds, "total": total}


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
