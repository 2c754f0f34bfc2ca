"""`forward`, `generate` and `stream`: from chat messages to logits or an answer.

    messages -> prompt -> inputs -> chunks                   on the host
    prefill -> decode, or scoring, chunk by chunk            compiled programs, on the device

`docs/architecture.md` describes each step.
"""

import atexit
import inspect
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from os import PathLike
from typing import Any, overload

import jax
import numpy as np
from jaxtyping import Float32, Int32

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import DescribedModel, LoadedModel
from bsjax.checks import argument, check_not_forked, naming, shown, whole_number
from bsjax.errors import CapacityError, GenerationError, MessageError
from bsjax.profiles.profile import Profile
from bsjax.prompts.prompt import Prompt
from bsjax.prompts.sources import ImageSources
from bsjax.runtime.decoding import (
    DECODE_CHUNK,
    MAX_END_TOKENS,
    AnswerSettings,
    DecodeState,
    Decoding,
)
from bsjax.runtime.inputs import place, prepare_inputs
from bsjax.runtime.kept_cache import KeptCache
from bsjax.runtime.memory import (
    bytes_available,
    check_host_memory,
    check_memory,
    host_bytes_available,
)
from bsjax.runtime.prefill import Prefill, occurring_tokens
from bsjax.runtime.programs import Stage, check_model, programs_of
from bsjax.runtime.results import IncrementalText, Result, Stats, Token, checked_stop
from bsjax.runtime.reuse import NOTHING, Reuse
from bsjax.runtime.sampling import Sampling
from bsjax.runtime.scoring import Scoring

Messages = Sequence[Mapping[str, Any]]
"""One conversation: Hugging Face chat messages."""
ProfileLike = Profile | str | PathLike[str] | None
"""None (dense), a profile, a path, or the name of a shipped profile."""
Logits = Float32[np.ndarray, "tokens vocabulary"]


@overload
def forward(
    model: LoadedModel,
    messages: Messages,
    *,
    profile: ProfileLike = None,
    backend: str = "auto",
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Logits: ...


@overload
def forward(
    model: LoadedModel,
    messages: Sequence[Messages],
    *,
    profile: ProfileLike = None,
    backend: str = "auto",
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> list[Logits]: ...


def forward(
    model: LoadedModel,
    messages: Messages | Sequence[Messages],
    *,
    profile: ProfileLike = None,
    backend: str = "auto",
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Logits | list[Logits]:
    """Logits of every token of a prompt, in prompt order.

    Args:
      model: from `bsjax.load`.
      messages: Hugging Face chat messages of one conversation, or a list of conversations (a
        batch).
      profile: head categories of prefill; None is dense.
      backend: attention backend, see `sparse_attention`.
      allow_files: whether messages may name files as images; None for what the model was loaded
        with (`bsjax.load(..., image_sources=...)`).
      allow_urls: whether messages may name images to download; None as for `allow_files`.

    Returns:
      float32 [tokens, vocabulary] on the host; for a batch, a list of such arrays.

    Raises:
      BsjaxError: as for `generate`, for the arguments that both have.
    """
    check_model(model, GenerationError)
    sources = model.image_sources.restricted(allow_files, allow_urls)
    conversations, is_batch = _conversations(model, messages, sources)
    backend = resolve_backend(backend)
    resolved = Profile.resolve(profile, model)
    logits = []
    for number, conversation in enumerate(conversations):
        with naming(f"conversations[{number}]" if is_batch else None):
            logits.append(forward_once(model, conversation, resolved, backend, sources)[0])
    return logits if is_batch else logits[0]


@overload
def generate(
    model: LoadedModel,
    messages: Messages,
    *,
    profile: ProfileLike = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    stream: Callable[[str, int], None] | None = None,
    backend: str = "auto",
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Result: ...


@overload
def generate(
    model: LoadedModel,
    messages: Sequence[Messages],
    *,
    profile: ProfileLike = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    backend: str = "auto",
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> list[Result]: ...


def generate(
    model: LoadedModel,
    messages: Messages | Sequence[Messages],
    *,
    profile: ProfileLike = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    stream: Callable[[str, int], None] | None = None,
    backend: str = "auto",
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Result | list[Result]:
    """Answers a conversation, or each conversation of a batch.

    Args:
      model: from `bsjax.load`.
      messages: Hugging Face chat messages of one conversation, or a list of conversations (a
        batch). The conversations of a batch run one after the other, independently.
      profile: head categories of prefill; None is dense. Decoding is always dense.
      max_new_tokens: the most tokens to generate.
      temperature: 0 always chooses the likeliest token; above 0, tokens are drawn.
      top_k: draw only from the k likeliest tokens.
      top_p: draw only from the likeliest tokens that together reach this probability.
      min_p: draw only from tokens with at least this share of the likeliest token's probability.
      repetition_penalty: above 1, tokens of the prompt and of the answer so far become less likely
        (transformers' RepetitionPenaltyLogitsProcessor); also where the likeliest is taken.
      stop: a text, or several, that end the answer. The answer's text ends before it; its tokens
        include those that complete it.
      seed: seed of the draws.
      stream: called with (piece of text, token id) for each token as it is generated; the piece is
        empty while the token's text is incomplete. Not available for batches.
      backend: attention backend, see `sparse_attention`.
      allow_files: whether messages may name files as images; None for what the model was loaded
        with (`bsjax.load(..., image_sources=...)`).
      allow_urls: whether messages may name images to download; None as for `allow_files`.

    Returns:
      The result; for a batch, a list of results.

    Raises:
      MessageError: a message has an invalid form, or an image cannot be read.
      ProfileError: the profile is malformed, or was made for another model.
      GenerationError: an argument is out of range.
      CapacityError: the prompt needs more positions than the model has, or more memory than is
        available.
      BackendError: the backend is unknown.
    """
    check_model(model, GenerationError)
    settings = checked_settings(
        model,
        backend,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
    )
    sources = model.image_sources.restricted(allow_files, allow_urls)
    check_stream(stream)
    conversations, is_batch = _conversations(model, messages, sources)
    if stream is not None and is_batch:
        raise GenerationError("stream takes one conversation, not a batch.")
    resolved = Profile.resolve(profile, model)
    results = []
    for number, conversation in enumerate(conversations):
        with naming(f"conversations[{number}]" if is_batch else None):
            events = generate_once(
                model, conversation, resolved, settings, sources, one_by_one=stream is not None
            )
            results.append(result_of(events, stream))
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
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    backend: str = "auto",
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Iterator[str]:
    """Like `generate`, for one conversation, but yields the text in pieces as it is generated.

    This call checks the arguments and reads the messages and their images; the prompt runs when the
    first piece is requested.

    Raises:
      BsjaxError: as for `generate`.
    """
    check_model(model, GenerationError)
    settings = checked_settings(
        model,
        backend,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
    )
    sources = model.image_sources.restricted(allow_files, allow_urls)
    conversation = one_conversation("stream", messages)
    resolved = Profile.resolve(profile, model)
    prompt = checked_prompt(model, conversation, resolved, settings, sources)
    events = generate_once(model, prompt, resolved, settings, sources, one_by_one=True)
    return pieces_of(events)


def check_stream(stream: Any) -> None:
    """Checks the `stream` argument of `generate`.

    Raises:
      GenerationError: it is neither a function nor None.
    """
    if stream is not None and not callable(stream):
        raise GenerationError(f"stream must be a function or None, got {shown(stream)}.")


def result_of(
    events: Generator[Token | Result, None, None], stream: Callable[[str, int], None] | None
) -> Result:
    """The result that comes last. Each token is passed to `stream`."""
    result: Any = None
    # If `stream` raises, the call ends here, not when somebody lets go of the traceback.
    with closing(events):
        for event in events:
            if isinstance(event, Result):
                result = event
            elif stream is not None:
                stream(event.text, event.token_id)
    return result


_open_streams: "weakref.WeakSet[Generator[Token | Result, None, None]]" = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """Ends the streams that are still open when the interpreter exits.

    Python would end them later, when modules that they need on the way out are gone.
    """
    with ExitStack() as stack:
        for events in list(_open_streams):
            # What another thread is reading cannot be ended: such threads stop with the process.
            if inspect.getgeneratorstate(events) != inspect.GEN_RUNNING:
                stack.callback(events.close)


def pieces_of(events: Generator[Token | Result, None, None]) -> Iterator[str]:
    """The pieces of text that are not empty."""
    _open_streams.add(events)
    return (event.text for event in events if isinstance(event, Token) and event.text)


def one_conversation(what: str, messages: Any) -> Messages:
    """The messages of one conversation.

    Args:
      what: what takes them, for the error message.
      messages: the argument of a public function.

    Raises:
      GenerationError: it is a batch.
    """
    if _is_batch(messages):
        raise GenerationError(f"{what} takes one conversation, not a batch.")
    return messages


def _conversations(
    model: LoadedModel, messages: Any, sources: ImageSources
) -> tuple[list[Messages], bool]:
    """The conversations in `messages`, and whether it is a batch rather than one conversation.

    All conversations of a batch are checked before the first of them runs.
    """
    if not _is_batch(messages):
        return [messages], False
    for number, conversation in enumerate(messages):
        with naming(f"conversations[{number}]"):
            model.check(
                conversation, allow_files=sources.allow_files, allow_urls=sources.allow_urls
            )
    return list(messages), True


def _is_batch(messages: Any) -> bool:
    if isinstance(messages, Sequence) and not len(messages):
        raise MessageError("The list of messages is empty: give at least one user message.")
    return isinstance(messages, list | tuple) and isinstance(messages[0], list | tuple)


def checked_settings(
    model: DescribedModel,
    backend: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    stop: str | Sequence[str] | None,
    seed: int,
) -> AnswerSettings:
    """How a prompt is to be answered, from a user's arguments; see `generate`.

    Like everything that is checked against a `DescribedModel`, this needs no weights.

    Raises:
      GenerationError: an argument is out of range.
      BackendError: the backend is unknown.
    """
    sampling = Sampling.checked(
        temperature, top_k, top_p, seed, min_p=min_p, repetition_penalty=repetition_penalty
    )
    return AnswerSettings(
        new_tokens=checked_new_tokens(max_new_tokens),
        sampling=sampling,
        stop=checked_stop(stop),
        end_tokens=_end_tokens(model),
        backend=resolve_backend(backend),
    )


def checked_new_tokens(max_new_tokens: int) -> int:
    """The `max_new_tokens` argument of `generate`.

    Raises:
      GenerationError: it is not a whole number, or below 1.
    """
    return whole_number("max_new_tokens", max_new_tokens, least=1, error=GenerationError)


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


def checked_prompt(
    model: DescribedModel,
    messages: Messages,
    profile: Profile | None,
    settings: AnswerSettings,
    sources: ImageSources,
) -> Prompt:
    """The prompt of a conversation, which can be answered if there is enough memory.

    The arguments are those of `generate_once`.

    Raises:
      MessageError: a message has an invalid form, or an image cannot be read.
      CapacityError: the prompt and its answer need more positions than the model has.
    """
    prompt = _prompt(model, messages, sources)
    place(model.architecture, prompt, profile, new_tokens=settings.new_tokens)
    return prompt


def _prompt(model: DescribedModel, messages: Messages | Prompt, sources: ImageSources) -> Prompt:
    if isinstance(messages, Prompt):
        return messages
    return model.prompt(messages, allow_files=sources.allow_files, allow_urls=sources.allow_urls)


def forward_once(
    model: LoadedModel,
    messages: Messages,
    profile: Profile | None,
    backend: str,
    sources: ImageSources,
    kept: KeptCache | None = None,
) -> tuple[Logits, int]:
    """Logits of the tokens that run, and the position of the first of them."""
    prompt = _prompt(model, messages, sources)
    reuse = NOTHING if kept is None else kept.reuse(prompt, new_tokens=0)
    inputs = prepare_inputs(model.architecture, prompt, profile, backend=backend, start=reuse.start)
    scoring = Scoring(programs_of(model), inputs, backend, reuse)
    check_memory(inputs, [*scoring.stages, *_moving(kept, reuse)], _available(kept))
    # On a CPU, the programs and the result share the host's memory.
    on_host = max(stage.peak for stage in scoring.stages) if jax.default_backend() == "cpu" else 0
    check_host_memory(inputs, scoring.result_bytes + on_host, host_bytes_available())
    cache = None if kept is None else kept.take(reuse)
    logits, cache = scoring.logits_and_cache(cache)
    if kept is not None:
        kept.put(prompt, inputs.template, reuse, (), cache)
    return logits, reuse.start


def _moving(kept: KeptCache | None, reuse: Reuse) -> list[Stage]:
    """The stage that moves the rows of a session's cache, if they have to move."""
    return [] if kept is None else kept.stages(reuse)


def _available(kept: KeptCache | None) -> int | None:
    """Free bytes on the device, those of a cache that is taken over included."""
    available = bytes_available()
    return available if available is None or kept is None else available + kept.size


def generate_once(
    model: LoadedModel,
    messages: Messages | Prompt,
    profile: Profile | None,
    settings: AnswerSettings,
    sources: ImageSources,
    *,
    one_by_one: bool,
    kept: KeptCache | None = None,
) -> Generator[Token | Result, None, None]:
    """Yields every token, then the result.

    Args:
      model: from `bsjax.load`.
      messages: one conversation, or its prompt if it has been made.
      profile: head categories of prefill.
      settings: from `checked_settings`.
      sources: where images may come from.
      one_by_one: whether to yield each token as soon as it is generated.
      kept: the cache of a session, of which the call uses as much as it can; None for a cache of
        its own.
    """
    # Again, because a stream may be asked for its next piece in a forked child.
    check_not_forked(GenerationError)
    programs = programs_of(model)
    compiled_before = programs.compile_seconds, programs.compilations
    prompt = _prompt(model, messages, sources)
    reuse = NOTHING if kept is None else kept.reuse(prompt, settings.new_tokens)
    inputs = prepare_inputs(
        model.architecture,
        prompt,
        profile,
        backend=settings.backend,
        new_tokens=settings.new_tokens,
        start=reuse.start,
    )
    prefill = Prefill(
        programs,
        inputs,
        new_tokens=settings.new_tokens,
        sampling=settings.sampling,
        backend=settings.backend,
        reuse=reuse,
    )
    decoding = Decoding(programs, inputs, prefill.cache, settings)
    stages = [*prefill.stages, *decoding.stages, *_moving(kept, reuse)]
    check_memory(inputs, stages, _available(kept))
    token, cache = prefill.first_token(None if kept is None else kept.take(reuse))
    occurred = occurring_tokens(programs.module, inputs)
    state = DecodeState(token, np.int32(1), occurred, cache)
    new_ids = [int(token)]
    chosen = list(new_ids)

    token_ids: list[int] = []
    text = IncrementalText(model.tokenizer, settings.stop)
    decode_seconds = 0.0
    try:
        while True:
            for token_id in new_ids:
                token_ids.append(token_id)
                ended = bool(np.isin(token_id, settings.end_tokens))
                last = ended or len(token_ids) == settings.new_tokens
                yield Token(text.add(token_id, last=last), token_id)
                if text.stopped:
                    ended = last = True
                    break
            if last:
                break
            left = settings.new_tokens - len(token_ids)
            limit = 1 if one_by_one else min(DECODE_CHUNK, left)
            check_not_forked(GenerationError)
            start = time.perf_counter()
            new_ids, state = decoding.run(state, limit)
            chosen += new_ids
            decode_seconds += time.perf_counter() - start
    finally:
        if kept is not None:
            # The last token is not in the cache yet.
            kept.put(prompt, inputs.template, reuse, chosen[:-1], state.cache)

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
            vision_seconds=prefill.vision_seconds,
            prefill_seconds=prefill.seconds,
            decode_seconds=decode_seconds,
            compile_seconds=programs.compile_seconds - compiled_before[0],
            compiled_programs=programs.compilations - compiled_before[1],
            backend=settings.backend,
            attention_flops_per_kind=inputs.flops_per_kind,
            reused_tokens=reuse.start,
        ),
    )
