"""`score`: how likely a model finds an answer."""

import dataclasses
import math
from collections.abc import Sequence
from typing import overload

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import check_not_forked, naming
from bsjax.errors import GenerationError
from bsjax.profiles.profile import Profile
from bsjax.prompts.image_reader import ImageReader
from bsjax.prompts.prompt import AnsweredPrompt
from bsjax.runtime.arguments import (
    Messages,
    ProfileLike,
    check_conversations,
    conversations_of,
)
from bsjax.runtime.chunks import PlacedPrompt
from bsjax.runtime.image_cache import image_cache_of
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.kept_cache import (
    KeptCache,
    available_bytes,
    cache_of,
    image_cache_in,
    layout_of,
    moving_stages,
)
from bsjax.runtime.memory import check_cache_memory, check_memory
from bsjax.runtime.programs import check_model, programs_of
from bsjax.runtime.results import Score
from bsjax.runtime.reuse import NOTHING
from bsjax.runtime.scoring import AnswerScoring
from bsjax.runtime.sizes import cache_rows


@overload
def score(
    model: LoadedModel,
    messages: Messages,
    *,
    profile: ProfileLike = None,
    backend: str = "auto",
    max_pixels: int | None = None,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Score: ...


@overload
def score(
    model: LoadedModel,
    messages: Sequence[Messages],
    *,
    profile: ProfileLike = None,
    backend: str = "auto",
    max_pixels: int | None = None,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> list[Score]: ...


def score(
    model: LoadedModel,
    messages: Messages | Sequence[Messages],
    *,
    profile: ProfileLike = None,
    backend: str = "auto",
    max_pixels: int | None = None,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Score | list[Score]:
    """How likely a model finds the last message of a conversation, given all before it.

    The last message is the assistant's. Only the tokens of its text are scored, not what the chat
    template writes after it, such as the end of the turn. If the template trims the text, spaces at
    its ends are not scored.

    Prompt and answer are tokenized together, as evaluation harnesses do. What follows the tokens of
    the prompt, those that `bsjax.generate` would have before its first token, is scored. If the
    tokenizer joins the end of the prompt and the beginning of the answer in one token, such as two
    newlines, the prompt's tokens are not a prefix of all tokens. Scoring then begins at the first
    token that differs, so that the scored tokens hold every character of the answer, and a few of
    the prompt.

    Args:
      model: from `bsjax.load`.
      messages: Hugging Face chat messages of one conversation that ends with an answer, or a list
        of conversations (a batch). A prefix shared with the previous conversation runs only once,
        such as the question that several answers are scored for. In Gemma 3, whose local layers
        keep a window only, it must be shorter than the window.
      profile: head categories; None is dense. An answer is text, which sees everything, but it sees
        images as sparse heads have computed them.
      backend: attention backend, see `sparse_attention`.
      max_pixels: as for `generate`.
      allow_files: whether messages may name files as images; None for what the model was loaded
        with (`bsjax.load(..., image_sources=...)`).
      allow_urls: whether messages may name images to download; None as for `allow_files`.

    Returns:
      The score; for a batch, a list of scores.

    Raises:
      MessageError: the last message is not the assistant's or holds no text, nothing comes before
        it, or the chat template writes its text differently from the way that an answer begins.
      BsjaxError: as for `generate`, for the arguments that both have.

    Example:
      >>> answers = [{"role": "assistant", "content": letter} for letter in "ABCD"]
      >>> scores = bsjax.score(model, [[*question, answer] for answer in answers])
      >>> likeliest = max(scores, key=lambda score: score.log_probability)
    """
    check_model(model, GenerationError)
    options = model.options(allow_files, allow_urls, max_pixels)
    conversations, is_batch = conversations_of(messages)
    backend = resolve_backend(backend)
    resolved = Profile.resolve(profile, model)
    if is_batch:
        check_conversations(model, conversations, options, answered=True)
    if not is_batch:
        with ImageReader() as reader:
            answered = model.answered_prompt(conversations[0], options, reader)
            return score_once(model, answered, resolved, backend, reader=reader)
    batch = BatchScoring(model, resolved, backend)
    scores = []
    for number, conversation in enumerate(conversations):
        with naming(f"conversations[{number}]"), ImageReader() as reader:
            answered = model.answered_prompt(conversation, options, reader)
            scores.append(batch.score(answered, reader))
    return scores


class BatchScoring:
    """Scores conversations one after the other.

    A prefix shared with the previous conversation runs only once, unless layers with a window have
    moved on from it.
    """

    def __init__(self, model: LoadedModel, profile: Profile | None, backend: str) -> None:
        self._model, self._profile, self._backend = model, profile, backend
        self._kept: KeptCache | None = None

    def score(self, answered: AnsweredPrompt, reader: ImageReader | None = None) -> Score:
        """The score of the next conversation. The arguments are those of `score_once`."""
        rows = cache_rows(answered.prompt.token_ids.size)
        if self._kept is None or self._kept.rows != rows:
            images = image_cache_of(self._model)
            self._kept = KeptCache(self._model, self._profile, rows, image_cache=images)
        return score_once(self._model, answered, self._profile, self._backend, self._kept, reader)


def score_once(
    model: LoadedModel,
    answered: AnsweredPrompt,
    profile: Profile | None,
    backend: str,
    kept: KeptCache | None = None,
    reader: ImageReader | None = None,
) -> Score:
    """Scores one conversation.

    Args:
      model: from `bsjax.load`.
      answered: the prompt, with its answer.
      profile: head categories.
      backend: attention backend, already resolved.
      kept: the cache of a session; None for a cache of its own.
      reader: what reads the prompt's images; None if they have been read.
    """
    check_not_forked(GenerationError)
    prompt, first = answered
    reuse = NOTHING
    if kept is not None:
        # The token before the answer runs, even if the cache holds it: it predicts the first one.
        question = dataclasses.replace(prompt, token_ids=prompt.token_ids[:first])
        reuse = kept.reuse(question, new_tokens=prompt.token_ids.size - first)
    inputs = prepare_inputs(model.architecture, prompt, profile, backend=backend, start=reuse.start)
    programs, layout = programs_of(model), layout_of(kept, inputs.tokens)
    available = available_bytes(kept, reuse, programs.mesh)
    check_cache_memory(inputs, programs, layout, available)
    if reader is not None:
        reader.start()
    image_cache = image_cache_in(kept, model)
    scoring = AnswerScoring(
        programs, PlacedPrompt(inputs, reuse), first, layout, backend, image_cache
    )
    stages = [*scoring.stages, *moving_stages(kept, reuse)]
    check_memory(inputs, stages, available, programs, layout)
    if kept is not None:
        # An image that cannot be read must leave the session as it was.
        prompt.complete()
    scores, likeliest, cache = scoring.scores(cache_of(kept, reuse, programs.module, layout))
    if kept is not None:
        kept.put(prompt, inputs.template, reuse, (), cache)
    return Score(
        log_probability=math.fsum(scores.tolist()),
        is_greedy=bool(likeliest.all()),
        token_ids=tuple(prompt.token_ids[first:].tolist()),
        log_probabilities=tuple(scores.tolist()),
        prompt_tokens=first,
    )
