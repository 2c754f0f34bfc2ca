"""The arguments of public functions, checked before anything runs.

No check needs weights: where one needs a model, a `DescribedModel` is enough.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
from jaxtyping import Int32

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import DescribedModel
from bsjax.checks import argument, naming, shown, truth_value, whole_number
from bsjax.errors import CapacityError, GenerationError, MessageError
from bsjax.profiles.profile import Profile
from bsjax.prompts.image_reader import ImageReader
from bsjax.prompts.messages import Messages
from bsjax.prompts.prompt import AnsweredPrompt, Prompt, PromptImage, PromptOptions
from bsjax.runtime.choice import Choice
from bsjax.runtime.decoding import MAX_END_TOKENS, AnswerSettings
from bsjax.runtime.inputs import Placed, place
from bsjax.runtime.sampling import MOST_TOP_TOKENS
from bsjax.timing import Stopwatch

ProfileLike = Profile | str | PathLike[str] | None
"""None (dense), a profile, a path, or the name of a shipped profile."""

_MOST_COPIES = 10_000


def check_stream(stream: Any) -> None:
    """Checks the `stream` argument of `generate`.

    Raises:
      GenerationError: it is neither a function nor None.
    """
    if stream is not None and not callable(stream):
        raise GenerationError(f"stream must be a function or None, got {shown(stream)}.")


def one_conversation(what: str, messages: Any) -> Messages:
    """The messages of one conversation.

    Args:
      what: what takes them, for the error message.
      messages: the argument of a public function.

    Raises:
      GenerationError: it is a batch.
    """
    conversations, is_batch = conversations_of(messages)
    if is_batch:
        raise GenerationError(f"{what} takes one conversation, not a batch.")
    return conversations[0]


def conversations_of(messages: Any) -> tuple[list[Messages], bool]:
    """The conversations in `messages`, and whether it is a batch rather than one conversation."""
    if isinstance(messages, Sequence) and not len(messages):
        raise MessageError("The list of messages is empty: give at least one user message.")
    # A malformed conversation among others has an error of its own.
    if isinstance(messages, list | tuple) and any(
        isinstance(each, list | tuple) for each in messages
    ):
        return list(messages), True
    return [messages], False


def check_conversations(
    model: DescribedModel,
    conversations: Sequence[Messages],
    options: PromptOptions,
    *,
    answered: bool = False,
) -> None:
    """Finds mistakes in all conversations of a batch, before the first of them runs.

    Args:
      model: the model that they are for.
      conversations: the batch.
      options: how messages become prompts.
      answered: whether the last message of each is the answer to the others.

    Raises:
      MessageError: as for `Processor.check`.
    """
    for number, conversation in enumerate(conversations):
        with naming(f"conversations[{number}]"):
            model.check(conversation, options, answered=answered)


def checked_prompt(
    model: DescribedModel,
    messages: Messages,
    profile: Profile | None,
    options: PromptOptions,
    new_tokens: int,
    stopwatch: Stopwatch | None = None,
    check: Callable[[Placed], None] | None = None,
    reader: ImageReader | None = None,
) -> Prompt:
    """The prompt of a conversation, which can be answered if there is enough memory.

    Args:
      model: the model that is to answer.
      messages: one conversation.
      profile: head categories of prefill.
      options: how the messages become a prompt.
      new_tokens: how many tokens the answer may have.
      stopwatch: counts the parts `prompt` and `images`.
      check: raises an error if the prompt is to be refused, before its images are decoded.
      reader: reads the images after this call; None reads them now.

    Raises:
      MessageError: a message has an invalid form, or an image cannot be read.
      CapacityError: the prompt and its answer need more positions than the model has.
    """
    stopwatch = stopwatch or Stopwatch()
    if reader is None:
        with ImageReader(stopwatch) as reader, stopwatch.part("prompt"):
            return checked_prompt(
                model, messages, profile, options, new_tokens, stopwatch, check, reader
            ).complete()
    with stopwatch.part("prompt"):
        prompt = model.prompt_of(messages, options, reader)
        placed = place(model.architecture, prompt, profile, new_tokens=new_tokens)
        if check is not None:
            check(placed)
        return prompt


def checked_answered_prompts(
    model: DescribedModel,
    conversations: Sequence[Messages],
    profile: Profile | None,
    options: PromptOptions,
) -> list[AnsweredPrompt]:
    """The prompts of conversations that end with answers, which `bsjax.score` could score.

    Answers to one question share the pixels of its images, so that many fit into memory.

    Args:
      model: the model that is to score them.
      conversations: several conversations.
      profile: head categories of prefill.
      options: how messages become prompts.

    Raises:
      MessageError: as for `Processor.answered_prompt`.
      CapacityError: a prompt needs more positions than the model has.
    """
    prompts: list[AnsweredPrompt] = []
    known: dict[str, PromptImage] = {}
    for conversation in conversations:
        prompt, first = model.answered_prompt(conversation, options)
        place(model.architecture, prompt, profile)
        known |= {image.digest: image for image in prompt.images if image.digest not in known}
        shared = tuple(known[image.digest] for image in prompt.images)
        prompts.append(AnsweredPrompt(replace(prompt, images=shared), first))
    return prompts


def checked_settings(
    model: DescribedModel,
    backend: str,
    *,
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    stop: str | Sequence[str] | None,
    seed: int,
    use_generation_config: bool,
    log_probabilities: int | None = None,
) -> AnswerSettings:
    """How a prompt is to be answered, from a user's arguments; see `generate`.

    Raises:
      GenerationError: an argument is out of range.
      BackendError: the backend is unknown.
    """
    choice = Choice(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop
    ).completed(
        model.generation_config
        if truth_value("use_generation_config", use_generation_config, error=GenerationError)
        else None
    )
    return AnswerSettings(
        new_tokens=choice.new_tokens(),
        sampling=choice.sampling(seed),
        stop=choice.stops(),
        end_tokens=_end_tokens(model),
        backend=resolve_backend(backend),
        top_tokens=log_probabilities
        if log_probabilities is None
        else whole_number(
            "log_probabilities",
            log_probabilities,
            least=0,
            most=MOST_TOP_TOKENS,
            error=GenerationError,
        ),
    )


def settings_of_copies(settings: AnswerSettings, n: int) -> list[AnswerSettings]:
    """The settings of several answers to one prompt, which differ in their seeds.

    Raises:
      GenerationError: `n` is not a whole number of at least 1, or the answers would all be the
        same, or a seed is too large.
    """
    n = whole_number("n", n, least=1, most=_MOST_COPIES, error=GenerationError)
    if n > 1 and not settings.sampling.temperature > 0:
        raise GenerationError(
            f"{argument('n')} is {n}, but without a temperature all answers are the same: set "
            f"{argument('temperature')} above 0, or leave {argument('n')} out."
        )
    seed = int(settings.sampling.seed)
    if seed + n > 2**32:
        raise GenerationError(
            f"{argument('n')} = {n} answers have the seeds {seed} to {seed + n - 1}, but seeds "
            f"must be below 2**32: lower {argument('seed')}."
        )
    return [
        replace(settings, sampling=settings.sampling._replace(seed=np.uint32(seed + copy)))
        for copy in range(n)
    ]


def checked_max_tokens(model: DescribedModel, max_tokens: int, *, least: int) -> int:
    """The `max_tokens` argument of `bsjax.warmup` and `bsjax.Session`.

    Raises:
      GenerationError: it is not a whole number, or below `least`.
      CapacityError: the model has fewer positions.
    """
    max_tokens = whole_number("max_tokens", max_tokens, least=least, error=GenerationError)
    limit = model.config.get_text_config().max_position_embeddings
    if max_tokens > limit:
        raise CapacityError(
            f"{argument('max_tokens')} is {shown(max_tokens)}, but the model has {limit} "
            f"positions. Lower it to {limit} or less."
        )
    return max_tokens


def _end_tokens(model: DescribedModel) -> Int32[np.ndarray, "end_tokens"]:
    """The ids in the checkpoint's generation config that end an answer, padded with -1."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else np.atleast_1d(np.asarray(ids, object)).tolist()
    ids = [whole_number("eos_token_id", token, least=0, error=GenerationError) for token in ids]
    if max(ids, default=0) >= 2**31:
        raise GenerationError(f"eos_token_id must be a token id, got {shown(max(ids))}.")
    if len(ids) > MAX_END_TOKENS:
        raise GenerationError(
            f"The checkpoint's generation config has {len(ids)} end-of-sequence tokens; at most "
            f"{MAX_END_TOKENS} are supported."
        )
    return np.asarray(ids + [-1] * (MAX_END_TOKENS - len(ids)), np.int32)
