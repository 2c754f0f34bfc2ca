"""`bsjax score`: how likely a model finds answers to a question."""

import argparse
import dataclasses
import json
from typing import Any

from bsjax.cli.arguments import (
    add_device_options,
    add_images,
    add_profiles,
    described_model,
    messages_of,
    profile_of,
    with_profile,
)
from bsjax.cli.imports import import_libraries


def add_to(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "score",
        help="how likely answers to a question are",
        description="Prints the log-probability of each answer, which is the sum of those of its "
        "tokens, how many tokens it has, and whether each of them is the likeliest one (greedy).",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a converted checkpoint's folder")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("answers", metavar="ANSWER", nargs="+")
    add_images(parser, only_options=True)
    add_profiles(parser)
    parser.add_argument("--json", action="store_true", help="print a list of the scores as JSON")
    add_device_options(parser)
    parser.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> None:
    import_libraries(options)
    from bsjax.attention import resolve_backend
    from bsjax.checkpoint.loading import with_weights
    from bsjax.runtime.arguments import checked_answered_prompts
    from bsjax.runtime.likelihood import BatchScoring

    # What can be refused is refused before the weights are read.
    described = described_model(options)
    backend = resolve_backend(options.backend)
    profile = profile_of(options, described)
    question = messages_of(options)
    conversations = [
        [*question, {"role": "assistant", "content": answer}] for answer in options.answers
    ]
    prompts = checked_answered_prompts(described, conversations, profile, described.options())
    model = with_weights(with_profile(described, profile))
    batch = BatchScoring(model, profile, backend)
    scores = [batch.score(prompt) for prompt in prompts]
    if options.json:
        print(json.dumps([dataclasses.asdict(score) for score in scores], indent=2))
        return
    for answer, score in zip(options.answers, scores, strict=True):
        tokens = len(score.token_ids)
        count = f"{tokens} token{'s' * (tokens > 1)}{', greedy' * score.is_greedy}"
        print(f"{score.log_probability:.4f}  {answer}  ({count})")
