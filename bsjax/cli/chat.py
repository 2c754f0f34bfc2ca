"""`bsjax chat`: a conversation on the terminal, which computes no token twice."""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bsjax.cli.arguments import (
    add_device_options,
    add_image_settings,
    described_model,
    image_options,
    image_part,
    with_profile,
)
from bsjax.cli.distributed import add_process_options, is_distributed, same_lines
from bsjax.cli.imports import import_libraries
from bsjax.errors import BsjaxError

if TYPE_CHECKING:
    from bsjax.runtime.results import Stats

_COMMANDS = """\
commands:
  /image PATH   add an image to the next question
  /new          begin a new conversation
  /quit         end, as does the end of the input
"""


def add_to(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "chat",
        help="talk about images, turn by turn",
        description="Answers questions turn by turn. Each turn runs only what is new. Answers go "
        "to stdout, statistics to stderr.",
        epilog=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a converted checkpoint's folder")
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="a profile file, or the name of a shipped profile; default: dense attention",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="the most tokens of the conversation; default: 8192",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="of an answer; default: 256"
    )
    add_image_settings(parser)
    add_device_options(parser)
    add_process_options(parser)
    parser.set_defaults(run=_chat)


def _chat(options: argparse.Namespace) -> None:
    import_libraries(options)
    import bsjax
    from bsjax.checkpoint.loading import with_weights
    from bsjax.runtime.choice import Choice
    from bsjax.runtime.kept_cache import check_room
    from bsjax.runtime.session import checked_session

    # What can be refused is refused before the weights are read, and not again at every question.
    described = described_model(options)
    profile, backend = checked_session(
        described,
        profile=options.profile,
        max_tokens=options.max_tokens,
        backend=options.backend,
    )
    new_tokens = Choice(max_new_tokens=options.max_new_tokens).new_tokens()
    described.check_image_options(image_options(options))
    begin: list[dict[str, Any]] = []
    if options.system is not None:
        begin = [{"role": "system", "content": options.system}]
    shortest = described.prompt([*begin, {"role": "user", "content": "?"}])
    check_room(shortest, new_tokens, options.max_tokens)
    session = bsjax.Session(
        with_weights(with_profile(described, profile)),
        profile=profile,
        max_tokens=options.max_tokens,
        backend=backend,
    )
    messages, images = list(begin), []

    def show(piece: str, token_id: int) -> None:
        print(piece, end="", flush=True)

    for line in same_lines(_lines()):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            break
        if command == "/new":
            messages, images = list(begin), []
        elif command == "/image" and rest.strip():
            images.append(image_part(rest.strip(), options))
        elif command.startswith("/"):
            print(f"error: {line!r} is not a command.\n{_COMMANDS}", end="", file=sys.stderr)
        elif line:
            question = [*images, {"type": "text", "text": line}]
            asked = [*messages, {"role": "user", "content": question}]
            try:
                result = session.generate(asked, max_new_tokens=options.max_new_tokens, stream=show)
            except BsjaxError as error:
                if is_distributed(options):  # It may be an error of this process only.
                    raise
                # The conversation goes on as if this had not been asked.
                images = []
                print(f"error: {error}", file=sys.stderr)
                continue
            except KeyboardInterrupt:
                if is_distributed(options):  # The other processes go on with the answer.
                    raise
                print("\ninterrupted: ask again, or /quit.", file=sys.stderr)
                continue
            images = []
            print(flush=True)
            print(_figures(result.stats), file=sys.stderr)
            messages = [*asked, {"role": "assistant", "content": result.text}]


def _lines() -> Iterator[str]:
    """Lines of the input, without the spaces around them."""
    if not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin)
        return
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        yield line.strip()


def _figures(stats: "Stats") -> str:
    return (
        f"({stats.reused_tokens:,} of {stats.prompt_tokens:,} tokens reused; "
        f"vision {stats.vision_seconds:.2f} s, prefill {stats.prefill_seconds:.2f} s, "
        f"decode {stats.decode_seconds:.2f} s, compile {stats.compile_seconds:.2f} s)"
    )
