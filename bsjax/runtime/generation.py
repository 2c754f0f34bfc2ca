"""`generate`, `stream` and `forward`: from chat messages to logits or an answer.

    messages -> prompt -> inputs -> chunks                   on the host
    prefill -> decode, or scoring, chunk by chunk            compiled programs, on the device

`docs/architecture.md` describes each step.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from os import PathLike
from typing import Any, Literal, overload

import jax
import numpy as np
from jaxtyping import Float32, Int32

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import check_not_forked, naming, shown, truth_value, whole_number
from bsjax.errors import CapacityError, GenerationError, MessageError
from bsjax.profiles.profile import Profile
from bsjax.prompts.prompt import PromptOptions
from bsjax.runtime.choice import Choice
from bsjax.runtime.chunks import PlacedPrompt
from bsjax.runtime.decoding import (
    DECODE_CHUNK,
    MAX_END_TOKENS,
    Answers,
    AnswerSettings,
    DecodeState,
    Decoding,
)
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.kept_cache import KeptCache, available_bytes, cache_of, layout_of
from bsjax.runtime.memory import check_host_memory, check_memory, host_bytes_available
from bsjax.runtime.prefill import Prefill
from bsjax.runtime.programs import check_model, programs_of
from bsjax.runtime.results import IncrementalText, Result, Stats, Token
from bsjax.runtime.reuse import NOTHING
from bsjax.runtime.scoring import Scoring

Messages = Sequence[Mapping[str, Any]]
"""One conversation: Hugging Face chat messages."""
ProfileLike = Profile | str | PathLike[str] | None
"""None (dense), a profile, a path, or the name of a shipped profile."""
Logits = Float32[np.ndarray, "tokens vocabulary"]
TokenIds = Int32[np.ndarray, "tokens"]


@overload
def forward(
    model: LoadedModel,
    messages: Messages,
    *,
    profile: ProfileLike = None,
    return_token_ids: Literal[False] = False,
    backend: str = "auto",
    max_pixels: int | None = None,
    continue_final_message: bool = False,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Logits: ...


@overload
def forward(
    model: LoadedModel,
    messages: Sequence[Messages],
    *,
    profile: ProfileLike = None,
    return_token_ids: Literal[False] = False,
    backend: str = "auto",
    max_pixels: int | None = None,
    continue_final_message: bool = False,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> list[Logits]: ...


@overload
def forward(
    model: LoadedModel,
    messages: Messages,
    *,
    profile: ProfileLike = None,
    return_token_ids: Literal[True],
    backend: str = "auto",
    max_pixels: int | None = None,
    continue_final_message: bool = False,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> tuple[Logits, TokenIds]: ...


@overload
def forward(
    model: LoadedModel,
    messages: Sequence[Messages],
    *,
    profile: ProfileLike = None,
    return_token_ids: Literal[True],
    backend: str = "auto",
    max_pixels: int | None = None,
    continue_final_message: bool = False,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> list[tuple[Logits, TokenIds]]: ...


def forward(
    model: LoadedModel,
    messages: Messages | Sequence[Messages],
    *,
    profile: ProfileLike = None,
    return_token_ids: bool = False,
    backend: str = "auto",
    max_pixels: int | None = None,
    continue_final_message: bool = False,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Logits | list[Logits] | tuple[Logits, TokenIds] | list[tuple[Logits, TokenIds]]:
    """Logits of every token of a prompt, in prompt order.

    Args:
      model: from `bsjax.load`.
      messages: Hugging Face chat messages of one conversation, or a list of conversations (a
        batch).
      profile: head categories of prefill; None is dense.
      return_token_ids: whether to return the token of each row, too.
      backend: attention backend, see `sparse_attention`.
      max_pixels: as for `generate`.
      continue_final_message: as for `generate`: the last row is that of the last message's last
        token, rather than of the token before a new answer.
      allow_files: whether messages may name files as images; None for what the model was loaded
        with (`bsjax.load(..., image_sources=...)`).
      allow_urls: whether messages may name images to download; None as for `allow_files`.

    Returns:
      float32 [tokens, vocabulary] on the host: row i predicts token i + 1. With
      `return_token_ids`, a pair of that and the ids of the tokens, int32 [tokens], in which an
      image has the image token's id once for each of its tokens. For a batch, a list.

    Raises:
      BsjaxError: as for `generate`, for the arguments that both have.
    """
    check_model(model, GenerationError)
    with_ids = truth_value("return_token_ids", return_token_ids, error=GenerationError)
    options = model.options(allow_files, allow_urls, max_pixels, continue_final_message)
    conversations, is_batch = conversations_of(messages)
    backend = resolve_backend(backend)
    resolved = Profile.resolve(profile, model)
    results: list[Any] = []
    for number, conversation in enumerate(conversations):
        with naming(f"conversations[{number}]" if is_batch else None):
            logits, _, token_ids = forward_once(model, conversation, resolved, backend, options)
            results.append((logits, token_ids) if with_ids else logits)
    return results if is_batch else results[0]


@overload
def generate(
    model: LoadedModel,
    messages: Messages,
    *,
    profile: ProfileLike = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    use_generation_config: bool = False,
    stream: Callable[[str, int], None] | None = None,
    backend: str = "auto",
    max_pixels: int | None = None,
    continue_final_message: bool = False,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Result: ...


@overload
def generate(
    model: LoadedModel,
    messages: Sequence[Messages],
    *,
    profile: ProfileLike = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    use_generation_config: bool = False,
    backend: str = "auto",
    max_pixels: int | None = None,
    continue_final_message: bool = False,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> list[Result]: ...


def generate(
    model: LoadedModel,
    messages: Messages | Sequence[Messages],
    *,
    profile: ProfileLike = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    use_generation_config: bool = False,
    stream: Callable[[str, int], None] | None = None,
    backend: str = "auto",
    max_pixels: int | None = None,
    continue_final_message: bool = False,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Result | list[Result]:
    """Answers a conversation, or each conversation of a batch.

    Args:
      model: from `bsjax.load`.
      messages: Hugging Face chat messages of one conversation, or a list of conversations (a
        batch). The conversations of a batch run one after the other, independently.
      profile: head categories of prefill; None is dense. Decoding is always dense.
      max_new_tokens: the most tokens to generate; by default 64.
      temperature: 0, the default, always chooses the likeliest token; above 0, tokens are drawn.
      top_k: draw only from the k likeliest tokens.
      top_p: draw only from the likeliest tokens that together reach this probability.
      min_p: draw only from tokens with at least this share of the likeliest token's probability.
      repetition_penalty: above 1, tokens of the prompt and of the answer so far become less likely
        (transformers' RepetitionPenaltyLogitsProcessor); also where the likeliest is taken.
      stop: a text, or several, that end the answer. The answer's text ends before it; its tokens
        include those that complete it.
      seed: seed of the draws.
      use_generation_config: whether the arguments above that are not given are what the
        checkpoint's generation config says, as in transformers: `do_sample`, `temperature`,
        `top_k` (50 where the config draws tokens and does not say), `top_p`, `min_p`,
        `repetition_penalty`, `max_new_tokens` (64 where it does not say) and `stop_strings`. To
        undo a setting of the checkpoint, give a value without effect, such as `top_p=1`, or for
        `top_k` a number as large as the vocabulary.
      stream: called with (piece of text, token id) for each token as it is generated; the piece is
        empty while the token's text is incomplete. Not available for batches.
      backend: attention backend, see `sparse_attention`.
      max_pixels: scales images with more pixels down to this number; for a model that scales
        images to any size (Qwen). An image whose part of the messages has a `max_pixels` of its own
        keeps it.
      continue_final_message: whether the answer continues the last message, which is the
        assistant's (the argument of that name of transformers' `apply_chat_template`). The result
        has only what is new. Spaces at the end of the message are kept if the checkpoint's chat
        template keeps them.
      allow_files: whether messages may name files as images; None for what the model was loaded
        with (`bsjax.load(..., image_sources=...)`).
      allow_urls: whether messages may name images to download; None as for `allow_files`.

    Returns:
      The result; for a batch, a list of results.

    Raises:
      MessageError: a message has an invalid form, or an image cannot be read.
      ProfileError: the profile is malformed, or was made for another model.
      GenerationError: an argument is out of range, or the checkpoint's generation config asks for
        something that bsjax does not compute.
      CapacityError: the prompt needs more positions than the model has, or more memory than is
        available.
      BackendError: the backend is unknown.
    """
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
        use_generation_config=use_generation_config,
    )
    options = model.options(allow_files, allow_urls, max_pixels, continue_final_message)
    check_stream(stream)
    conversations, is_batch = conversations_of(messages)
    if stream is not None and is_batch:
        raise GenerationError("stream takes one conversation, not a batch.")
    resolved = Profile.resolve(profile, model)
    results = []
    for number, conversation in enumerate(conversations):
        with naming(f"conversations[{number}]" if is_batch else None):
            events = generate_once(
                model, conversation, resolved, settings, options, one_by_one=stream is not None
            )
            results.append(result_of(events, stream))
    return results if is_batch else results[0]


def stream(
    model: LoadedModel,
    messages: Messages,
    *,
    profile: ProfileLike = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] | None = None,
    seed: int = 0,
    use_generation_config: bool = False,
    backend: str = "auto",
    max_pixels: int | None = None,
    continue_final_message: bool = False,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Iterator[str]:
    """Like `generate`, for one conversation, but yields the text in pieces as it is generated.

    This call checks the arguments; the prompt runs when the first piece is requested.

    Raises:
      BsjaxError: as for `generate`.
    """
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
        use_generation_config=use_generation_config,
    )
    options = model.options(allow_files, allow_urls, max_pixels, continue_final_message)
    conversation = one_conversation("stream", messages)
    resolved = Profile.resolve(profile, model)
    events = generate_once(model, conversation, resolved, settings, options, one_by_one=True)
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


def pieces_of(events: Iterator[Token | Result]) -> Iterator[str]:
    """The pieces of text that are not empty."""
    return (event.text for event in events if isinstance(event, Token) and event.text)


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
    if isinstance(messages, list | tuple) and isinstance(messages[0], list | tuple):
        return list(messages), True
    return [messages], False


def checked_settings(
    model: LoadedModel,
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
) -> AnswerSettings:
    """How a prompt is to be answered, from a user's arguments; see `generate`.

    Raises:
      GenerationError: an argument is out of range.
      BackendError: the backend is unknown.
    """
    check_model(model, GenerationError)
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
    )


def checked_max_tokens(model: LoadedModel, max_tokens: int, *, least: int) -> int:
    """The `max_tokens` argument of `bsjax.warmup` and `bsjax.Session`.

    Raises:
      GenerationError: it is not a whole number, or below `least`.
      CapacityError: the model has fewer positions.
    """
    max_tokens = whole_number("max_tokens", max_tokens, least=least, error=GenerationError)
    limit = model.config.get_text_config().max_position_embeddings
    if max_tokens > limit:
        raise CapacityError(
            f"max_tokens is {max_tokens}, but the model has {limit} positions. Lower it to {limit} "
            "or less."
        )
    return max_tokens


def _end_tokens(model: LoadedModel) -> Int32[np.ndarray, "end_tokens"]:
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


def forward_once(
    model: LoadedModel,
    messages: Messages,
    profile: Profile | None,
    backend: str,
    options: PromptOptions,
    kept: KeptCache | None = None,
) -> tuple[Logits, int, TokenIds]:
    """Logits of the tokens that run, the position of the first of them, and their ids."""
    prompt = model.prompt_of(messages, options)
    reuse = NOTHING if kept is None else kept.reuse(prompt, new_tokens=0)
    inputs = prepare_inputs(model.architecture, prompt, profile, backend=backend, start=reuse.start)
    layout = layout_of(kept, inputs.tokens)
    programs = programs_of(model)
    scoring = Scoring(programs, PlacedPrompt(inputs, reuse), layout, backend)
    check_memory(inputs, scoring.stages, available_bytes(kept))
    # On a CPU, the programs and the result share the host's memory.
    on_host = max(stage.peak for stage in scoring.stages) if jax.default_backend() == "cpu" else 0
    check_host_memory(inputs, scoring.result_bytes + on_host, host_bytes_available())
    logits, cache = scoring.logits(cache_of(kept, reuse, programs.module, layout))
    if kept is not None:
        kept.put(prompt, inputs.template, reuse, (), cache)
    return logits, reuse.start, prompt.token_ids[reuse.start :]


def generate_once(
    model: LoadedModel,
    messages: Messages,
    profile: Profile | None,
    settings: AnswerSettings,
    options: PromptOptions,
    *,
    one_by_one: bool,
    kept: KeptCache | None = None,
) -> Generator[Token | Result, None, None]:
    """Yields every token, then the result.

    Args:
      model: from `bsjax.load`.
      messages: one conversation.
      profile: head categories of prefill.
      settings: from `checked_settings`.
      options: how the messages become a prompt.
      one_by_one: whether to yield each token as soon as it is generated.
      kept: the cache of a session, of which the call uses as much as it can; None for a cache of
        its own.
    """
    # Again, because a stream may be asked for its next piece in a forked child.
    check_not_forked(GenerationError)
    programs = programs_of(model)
    compiled_before = programs.compile_seconds, programs.compilations
    prompt = model.prompt_of(messages, options)
    reuse = NOTHING if kept is None else kept.reuse(prompt, settings.new_tokens)
    inputs = prepare_inputs(
        model.architecture,
        prompt,
        profile,
        backend=settings.backend,
        new_tokens=settings.new_tokens,
        start=reuse.start,
    )
    layout = layout_of(kept, inputs.tokens + settings.new_tokens)
    prompt_in_cache = PlacedPrompt(inputs, reuse)
    prefill = Prefill(programs, [prompt_in_cache], layout, [settings], settings.backend)
    decoding = Decoding(programs, layout, settings.end_tokens, settings.backend)
    check_memory(inputs, [*prefill.stages, *decoding.stages], available_bytes(kept))
    cache = cache_of(kept, reuse, programs.module, layout)
    first, state = prefill.first_token(DecodeState.before(programs.module, layout, cache))
    new_ids = [int(first.token[0])]
    chosen = list(new_ids)
    answers = Answers.of([inputs], [settings])

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
            (new,), state = decoding.run(state, answers, steps=limit)
            new_ids = new.token.tolist()
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
