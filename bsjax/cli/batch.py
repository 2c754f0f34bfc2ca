"""`bsjax generate --batch`: answers the conversations of a file, and goes on where it was ended."""

import argparse
import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from bsjax.checks import naming
from bsjax.cli.arguments import check_writable, image_options
from bsjax.errors import GenerationError
from bsjax.progress import counting

if TYPE_CHECKING:
    from bsjax.checkpoint.loading import DescribedModel
    from bsjax.profiles.profile import Profile
    from bsjax.runtime.answer_file import AnswerFile
    from bsjax.runtime.batch import Answered
    from bsjax.runtime.decoding import AnswerSettings
    from bsjax.samples.conversations import ConversationFile


def check_options(options: argparse.Namespace) -> None:
    """Refuses options that go with a question, and not with a file of conversations.

    Raises:
      GenerationError: names the option.
    """
    if options.output is None:
        raise GenerationError("--batch needs --output FILE, to which the answers are written.")
    for name, is_given in (
        ("a QUESTION", options.question is not None),
        ("--image", bool(options.image)),
        ("--system", options.system is not None),
        ("--stream", options.stream),
        ("--json", options.json),
        ("--timing", options.timing),
    ):
        if is_given:
            raise GenerationError(
                f"--batch does not go with {name}: each line of its file is a whole conversation, "
                "and --output has the answers."
            )
    check_writable(options.output, error=GenerationError)


def answer_batch(
    options: argparse.Namespace,
    described: "DescribedModel",
    settings: "AnswerSettings",
    profile: "Profile | None",
) -> int:
    """Answers all conversations that are not in the output yet.

    Returns:
      The exit status: 0 if all conversations have answers, 1 if some have errors.

    Raises:
      BsjaxError: the input or the output cannot be used.
      OSError: the output cannot be written.
    """
    from bsjax.runtime.answer_file import AnswerFile
    from bsjax.samples.conversations import ConversationFile

    of_images = {name: value for name, value in image_options(options).items() if value is not None}
    described.check_image_options(of_images)
    with ConversationFile(options.batch) as conversations:
        made_with = _made_with(described, settings, profile, of_images, conversations)
        with AnswerFile(options.output, made_with, conversations.ids) as answers:
            answers.resume()
            _check(conversations, answers, described, of_images)
            answers.begin()
            try:
                new_tokens, seconds = _answer(
                    conversations, answers, described, settings, profile, of_images
                )
            except KeyboardInterrupt:
                print(
                    f"{len(answers.done)} of {len(conversations.ids)} conversations are in "
                    f"{answers.path}; the same command goes on with the others.",
                    file=sys.stderr,
                )
                raise
            errors = sum(answers.done.values())
    print(_summary(len(answers.done), errors, new_tokens, seconds), file=sys.stderr)
    return 1 if errors else 0


def _made_with(
    described: "DescribedModel",
    settings: "AnswerSettings",
    profile: "Profile | None",
    of_images: Mapping[str, Any],
    conversations: "ConversationFile",
) -> dict[str, Any]:
    """What answers depend on, for the first line of the output."""
    from bsjax.profiling.state import conditions_of

    of_model = conditions_of(described, settings.backend)
    sampling = settings.sampling._asdict()
    return {
        "input SHA-256": conversations.sha256,
        "conversations": len(conversations.ids),
        "checkpoint fingerprint": of_model.pop("checkpoint"),
        **of_model,
        "profile": None
        if profile is None
        else f"SHA-256 {hashlib.sha256(profile.to_json().encode()).hexdigest()}",
        "max_new_tokens": settings.new_tokens,
        # As they are written, such as 0.7, and not the nearest float64 to their float32.
        **{
            name: float(str(value)) if value.dtype.kind == "f" else int(value)
            for name, value in sampling.items()
        },
        "stop": list(settings.stop),
        "end-of-sequence tokens": [int(token) for token in settings.end_tokens if token >= 0],
        "max_pixels": of_images.get("max_pixels"),
        "pan_and_scan": bool(of_images.get("do_pan_and_scan")),
    }


def _unanswered(conversations: "ConversationFile", answers: "AnswerFile") -> list[int]:
    return [number for number in conversations.ids if number not in answers.done]


def _messages(
    conversations: "ConversationFile", numbers: list[int], of_images: Mapping[str, Any]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    from bsjax.samples.content import with_image_options

    for number, messages in conversations.messages(numbers):
        yield number, with_image_options(messages, of_images) if of_images else messages


def _check(
    conversations: "ConversationFile",
    answers: "AnswerFile",
    described: "DescribedModel",
    of_images: Mapping[str, Any],
) -> None:
    """Finds mistakes in the conversations that are left, with the headers of their images."""
    numbers, options = _unanswered(conversations, answers), described.options()
    with counting("checking conversations", 0, len(numbers)) as report:
        for done, (number, messages) in enumerate(
            _messages(conversations, numbers, of_images), start=1
        ):
            with naming(conversations.place(number)):
                described.check(messages, options)
            report(done, "")


def _answer(
    conversations: "ConversationFile",
    answers: "AnswerFile",
    described: "DescribedModel",
    settings: "AnswerSettings",
    profile: "Profile | None",
    of_images: Mapping[str, Any],
) -> tuple[int, float]:
    """Answers what is left. Returns how many tokens are new, and the seconds that they took."""
    numbers = _unanswered(conversations, answers)
    if not numbers:
        return 0, 0.0
    from bsjax.checkpoint.loading import with_weights
    from bsjax.runtime.batch import Task, run_batch

    model = with_weights(described)
    tasks = (
        # The output says which line an error is of.
        Task(number, messages, (settings,), place=None)
        for number, messages in _messages(conversations, numbers, of_images)
    )
    new_tokens, errors, began = 0, sum(answers.done.values()), time.monotonic()
    total = len(conversations.ids)
    with counting("answering", len(answers.done), total) as report:
        outcomes: Any = run_batch(
            model, tasks, profile, described.options(), return_errors=True, ahead=True
        )
        with closing(outcomes):
            for answered in outcomes:
                new_tokens += _write(answers, answered)
                errors += answers.done[answered.number]
                rate = new_tokens / max(time.monotonic() - began, 1e-9)
                note = f"{errors} error{'s' * (errors != 1)}, {rate:.1f} tokens/s"
                report(len(answers.done), note)
    return new_tokens, time.monotonic() - began


def _write(answers: "AnswerFile", answered: "Answered") -> int:
    """Writes what became of a conversation. Returns how many tokens are new."""
    from bsjax.runtime.results import Result

    if not isinstance(answered.outcome, Result):
        answers.add(answered.number, {"error": str(answered.outcome)})
        return 0
    outcome = dataclasses.asdict(answered.outcome)
    # There are none: no option asks for them.
    del outcome["log_probabilities"]
    answers.add(answered.number, outcome)
    return len(answered.outcome.token_ids)


def _summary(done: int, errors: int, new_tokens: int, seconds: float) -> str:
    answered = done - errors
    return (
        f"{done} conversation{'s' * (done != 1)}: {answered} answer{'s' * (answered != 1)}, "
        f"{errors} error{'s' * (errors != 1)}; {new_tokens} new tokens in {seconds:.1f} s, "
        f"{new_tokens / seconds if seconds else 0:.1f} a second"
    )
