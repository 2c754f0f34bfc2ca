"""`forward`, `generate` and `stream`: from chat messages to logits or an answer.

messages -> prompt -> inputs (packed, padded)                host
embed -> encode images, by groups -> prefill, first token    one program each
decode -> decode -> ...                                      one program, a loop on the device
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import whole_number
from bsjax.errors import GenerationError, MessageError
from bsjax.profiles.profile import Profile
from bsjax.runtime.answering import DECODE_CHUNK, Answering
from bsjax.runtime.inputs import ModelInputs, prepare_inputs
from bsjax.runtime.memory import (
    bytes_available,
    check_host_memory,
    check_memory,
    host_bytes_available,
)
from bsjax.runtime.programs import programs_of
from bsjax.runtime.results import IncrementalText, Result, Stats
from bsjax.runtime.sampling import Sampling
from bsjax.runtime.scoring import Scoring

Messages = Sequence[Mapping[str, Any]]
"""One conversation: Hugging Face chat messages."""
ProfileLike = Profile | str | PathLike[str] | None
"""None (dense), a profile, a path, or the name of a shipped profile."""

# End-of-sequence tokens that a program has room for; the most a published model has is two.
_MAX_END_TOKENS = 8


def forward(
    model: LoadedModel,
    messages: Messages | Sequence[Messages],
    *,
    profile: ProfileLike = None,
    backend: str = "auto",
) -> Float32[np.ndarray, "tokens vocabulary"] | list[Float32[np.ndarray, "tokens vocabulary"]]:
    """Logits of every token of a prompt, in prompt order.

    Args:
      model: from `bsjax.load`.
      messages: Hugging Face chat messages; a list of conversations is a batch.
      profile: head categories of prefill; None is dense.
      backend: of the attention, see `sparse_attention`.

    Returns:
      float32 [tokens, vocabulary] on the host; a list of them for a batch.

    Raises:
      BsjaxError: as `generate`, for the arguments they share.
    """
    conversations, is_batch = _conversations(messages)
    logits = [_forward(model, each, profile, backend) for each in conversations]
    return logits if is_batch else logits[0]


def generate(
    model: LoadedModel,
    messages: Messages | Sequence[Messages],
    *,
    profile: ProfileLike = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stream: Callable[[str, int], None] | None = None,
    backend: str = "auto",
) -> Result | list[Result]:
    """Answers a conversation, or each of a batch of them.

    Args:
      model: from `bsjax.load`.
      messages: Hugging Face chat messages; a list of conversations is a batch. Conversations run
        one after the other, so that each result is the one it would have alone.
      profile: head categories of prefill; None is dense. Decoding is always dense.
      max_new_tokens: greatest number of tokens to generate.
      temperature: 0 takes the likeliest token every time; above, tokens are drawn.
      top_k: draw from the k likeliest tokens only.
      top_p: draw from the likeliest tokens that together reach this probability only.
      seed: what draws depend on, beside the prompt.
      stream: called with (piece of text, token id) for every token as it comes; a piece is empty
        where the token's text is not complete yet. Not for batches.
      backend: of the attention, see `sparse_attention`.

    Returns:
      The result, or a list of them for a batch.

    Raises:
      MessageError: messages that are no prompt, or an image that cannot be read.
      ProfileError: a profile that is malformed, or of another model.
      GenerationError: an argument out of range.
      CapacityError: a prompt longer than the model's positions, or than the memory at hand.
      BackendError: an unknown backend.
    """
    request = _Request.checked(profile, max_new_tokens, temperature, top_k, top_p, seed, backend)
    conversations, is_batch = _conversations(messages)
    if stream is not None and is_batch:
        raise GenerationError("stream takes one conversation, not a batch.")
    results = []
    for conversation in conversations:
        for event in _generate(model, conversation, request, one_by_one=stream is not None):
            if isinstance(event, Result):
                results.append(event)
            elif stream is not None:
                stream(event.text, event.token_id)
    return results if is_batch else results[0]


def stream(
    model: LoadedModel,
    messages: Messages,
    *,
    profile: ProfileLike = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> Iterator[str]:
    """As `generate`, for one conversation: yields the answer's text piece by piece as it comes.

    Arguments are checked when this is called; the first piece comes after prefill.

    Raises:
      BsjaxError: as `generate`.
    """
    request = _Request.checked(profile, max_new_tokens, temperature, top_k, top_p, seed, backend)
    conversations, is_batch = _conversations(messages)
    if is_batch:
        raise GenerationError("stream takes one conversation, not a batch.")
    events = _generate(model, conversations[0], request, one_by_one=True)
    return (event.text for event in events if isinstance(event, _Token) and event.text)


class _Token(NamedTuple):
    """One token as it comes."""

    text: str
    token_id: int


@dataclass(frozen=True)
class _Request:
    """Checked arguments of a generation."""

    profile: ProfileLike
    max_new_tokens: int
    sampling: Sampling
    backend: str

    @classmethod
    def checked(
        cls,
        profile: ProfileLike,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        backend: str,
    ) -> "_Request":
        max_new_tokens = whole_number(
            "max_new_tokens", max_new_tokens, least=1, error=GenerationError
        )
        sampling = Sampling.checked(temperature, top_k, top_p, seed)
        return cls(profile, max_new_tokens, sampling, resolve_backend(backend))


def _conversations(messages: Any) -> tuple[list[Messages], bool]:
    """The conversations of `messages`, and whether it is a batch of them rather than one."""
    if isinstance(messages, Sequence) and not len(messages):
        raise MessageError("The list of messages is empty: give at least one user message.")
    if isinstance(messages, list | tuple) and isinstance(messages[0], list | tuple):
        return list(messages), True
    return [messages], False


def _forward(
    model: LoadedModel, messages: Messages, profile: ProfileLike, backend: str
) -> Float32[np.ndarray, "tokens vocabulary"]:
    backend = resolve_backend(backend)
    inputs = _inputs(model, messages, profile, backend, new_tokens=0)
    scoring = Scoring(programs_of(model), inputs, backend)
    check_memory(inputs, scoring.stages, bytes_available())
    # Where the device is the host's processor, both take from the same memory.
    on_host = max(stage.peak for stage in scoring.stages) if jax.default_backend() == "cpu" else 0
    check_host_memory(inputs, scoring.result_bytes + on_host, host_bytes_available())
    return scoring.run()


def _generate(
    model: LoadedModel, messages: Messages, request: _Request, *, one_by_one: bool
) -> Iterator[_Token | Result]:
    """Yields every token, then the result."""
    programs = programs_of(model)
    compiled_before = programs.compile_seconds
    inputs = _inputs(model, messages, request.profile, request.backend, request.max_new_tokens)
    end_tokens = _end_tokens(model)
    run = Answering(
        programs,
        inputs,
        new_tokens=request.max_new_tokens,
        end_tokens=end_tokens,
        sampling=request.sampling,
        backend=request.backend,
    )
    check_memory(inputs, run.stages, bytes_available())
    compile_seconds = programs.compile_seconds - compiled_before

    embeddings, vision_seconds = run.embedding.run()
    start = time.perf_counter()
    state = run.prefill(embeddings)
    new_ids = [int(state.token)]
    prefill_seconds = time.perf_counter() - start

    token_ids: list[int] = []
    text = IncrementalText(model.tokenizer)
    decode_seconds = 0.0
    while True:
        for token_id in new_ids:
            token_ids.append(token_id)
            ended = bool(np.isin(token_id, end_tokens))
            last = ended or len(token_ids) == request.max_new_tokens
            yield _Token(text.add(token_id, last=last), token_id)
        if last:
            break
        left = request.max_new_tokens - len(token_ids)
        limit = 1 if one_by_one else min(DECODE_CHUNK, left)
        start = time.perf_counter()
        new_ids, state = run.decode(state, limit)
        decode_seconds += time.perf_counter() - start

    yield Result(
        text=text.whole,
        token_ids=tuple(token_ids),
        prompt_tokens=inputs.tokens,
        finish_reason="stop" if ended else "length",
        stats=Stats(
            prompt_tokens=inputs.tokens,
            image_tokens=inputs.template.image_tokens,
            attention_flops_dense=inputs.flops_dense,
            attention_flops_sparse=inputs.flops_sparse,
            vision_seconds=vision_seconds,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            compile_seconds=compile_seconds,
            backend=request.backend,
            attention_flops_per_kind=inputs.flops_per_kind,
        ),
    )


def _inputs(
    model: LoadedModel, messages: Messages, profile: ProfileLike, backend: str, new_tokens: int
) -> ModelInputs:
    resolved = Profile.resolve(profile, model)
    return prepare_inputs(
        model.architecture,
        model.prompt(messages),
        resolved,
        backend=backend,
        new_tokens=new_tokens,
    )


def _end_tokens(model: LoadedModel) -> Int32[np.ndarray, "end_tokens"]:
    """Ids that end an answer, as the checkpoint's generation config says, padded with -1."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else np.atleast_1d(ids).tolist()
    if len(ids) > _MAX_END_TOKENS:
        raise GenerationError(
            f"The checkpoint's generation config has {len(ids)} end-of-sequence tokens; at most "
            f"{_MAX_END_TOKENS} are supported."
        )
    return np.asarray(ids + [-1] * (_MAX_END_TOKENS - len(ids)), np.int32)
