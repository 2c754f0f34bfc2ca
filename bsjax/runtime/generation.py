"""`generate`, `stream` and `forward`: from chat messages to logits or an answer.

    messages -> prompt -> inputs -> chunks                   on the host
    prefill -> decode, or scoring, chunk by chunk            compiled programs, on the device

`docs/architecture.md` describes each step.
"""

import atexit
import inspect
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import numpy as np
from jaxtyping import Float32, Int32

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import check_not_forked, naming, shown, truth_value
from bsjax.errors import BsjaxError, GenerationError
from bsjax.profiles.profile import Profile
from bsjax.prompts.image_reader import ImageReader
from bsjax.prompts.prompt import Prompt, PromptOptions
from bsjax.runtime.answers import Answer, tokens_of
from bsjax.runtime.arguments import (
    Messages,
    ProfileLike,
    check_conversations,
    check_stream,
    checked_prompt,
    checked_settings,
    conversations_of,
    one_conversation,
    settings_of_copies,
)
from bsjax.runtime.batch import Task, run_batch
from bsjax.runtime.chunks import PlacedPrompt
from bsjax.runtime.decoding import Answers, AnswerSettings, DecodeState, Decoding
from bsjax.runtime.inputs import Placed, prepare_inputs
from bsjax.runtime.kept_cache import (
    KeptCache,
    available_bytes,
    cache_of,
    earlier_rings,
    image_cache_in,
    known_images_of,
    layout_of,
    moving_stages,
)
from bsjax.runtime.memory import (
    check_cache_memory,
    check_host_memory,
    check_memory,
    host_bytes_available,
)
from bsjax.runtime.prefill import Prefill
from bsjax.runtime.programs import check_model, programs_of
from bsjax.runtime.results import Result, Token, seconds_of, stats_of
from bsjax.runtime.reuse import NOTHING
from bsjax.runtime.scoring import Scoring
from bsjax.timing import Stopwatch

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
    if is_batch:
        check_conversations(model, conversations, options)
    backend = resolve_backend(backend)
    resolved = Profile.resolve(profile, model)
    results: list[Any] = []
    for number, conversation in enumerate(conversations):
        with naming(f"conversations[{number}]" if is_batch else None):
            logits, _, token_ids = forward_once(model, conversation, resolved, backend, options)
            results.append((logits, token_ids) if with_ids else logits)
    return results if is_batch else results[0]


class AnswerOptions(TypedDict, total=False):
    """The keyword arguments that all overloads of `generate` share."""

    profile: ProfileLike
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None
    seed: int
    use_generation_config: bool
    log_probabilities: int | None
    backend: str
    max_pixels: int | None
    continue_final_message: bool
    allow_files: bool | None
    allow_urls: bool | None


@overload
def generate(
    model: LoadedModel,
    messages: Messages,
    *,
    n: None = None,
    stream: Callable[[str, int], None] | None = None,
    **options: Unpack[AnswerOptions],
) -> Result: ...


@overload
def generate(
    model: LoadedModel, messages: Messages, *, n: int, **options: Unpack[AnswerOptions]
) -> list[Result]: ...


@overload
def generate(
    model: LoadedModel,
    messages: Sequence[Messages],
    *,
    n: None = None,
    return_errors: Literal[False] = False,
    **options: Unpack[AnswerOptions],
) -> list[Result]: ...


@overload
def generate(
    model: LoadedModel,
    messages: Sequence[Messages],
    *,
    n: int,
    return_errors: Literal[False] = False,
    **options: Unpack[AnswerOptions],
) -> list[list[Result]]: ...


@overload
def generate(
    model: LoadedModel,
    messages: Sequence[Messages],
    *,
    n: None = None,
    return_errors: bool,
    **options: Unpack[AnswerOptions],
) -> list[Result | BsjaxError]: ...


@overload
def generate(
    model: LoadedModel,
    messages: Sequence[Messages],
    *,
    n: int,
    return_errors: bool,
    **options: Unpack[AnswerOptions],
) -> list[list[Result] | BsjaxError]: ...


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
    n: int | None = None,
    log_probabilities: int | None = None,
    return_errors: bool = False,
    stream: Callable[[str, int], None] | None = None,
    backend: str = "auto",
    max_pixels: int | None = None,
    continue_final_message: bool = False,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Any:
    """Answers a conversation, or each conversation of a batch.

    The conversations of a batch run together: their prompts share chunks, and their answers are
    generated side by side. What several prompts begin with, such as a document, runs once. Each
    answer is that of a call of its own, apart from rounding: it does not depend on what else is in
    the batch.

    Args:
      model: from `bsjax.load`.
      messages: Hugging Face chat messages of one conversation, or a list of conversations (a
        batch).
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
      n: how many answers to give to each prompt, with the seeds `seed` to `seed + n - 1`; None for
        one answer that is not in a list.
      log_probabilities: of how many tokens, the likeliest ones, to return the log-probabilities
        beside that of each generated token, 0 to 20; None returns none.
      return_errors: whether a conversation of a batch that cannot be answered gives its error in
        place of a result; otherwise the error is raised, with the number of the conversation.
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
      The result; with `n`, a list of results. For a batch, a list of what its conversations give,
      in their order.

    Raises:
      MessageError: a message has an invalid form, or an image cannot be read.
      ProfileError: the profile is malformed, or was made for another model.
      GenerationError: an argument is out of range, or the checkpoint's generation config asks for
        something that bsjax does not compute.
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
        use_generation_config=use_generation_config,
        log_probabilities=log_probabilities,
    )
    options = model.options(allow_files, allow_urls, max_pixels, continue_final_message)
    copies = [settings] if n is None else settings_of_copies(settings, n)
    return_errors = truth_value("return_errors", return_errors, error=GenerationError)
    check_stream(stream)
    conversations, is_batch = conversations_of(messages)
    if stream is not None and (is_batch or n is not None):
        raise GenerationError(
            "stream needs one conversation and one answer: leave out n, and do not pass a batch."
        )
    resolved = Profile.resolve(profile, model)
    if not is_batch and n is None:
        events = answer_once(
            model, conversations[0], options, resolved, settings, one_by_one=stream is not None
        )
        return result_of(events, stream)
    return_errors = return_errors and is_batch
    stopwatch = Stopwatch()
    if is_batch and not return_errors:
        with stopwatch.part("prompt"):
            check_conversations(model, conversations, options)
    results: list[Any] = [[None] * len(copies) for _ in conversations]
    tasks = [
        Task(number, conversation, tuple(copies), f"conversations[{number}]" if is_batch else None)
        for number, conversation in enumerate(conversations)
    ]
    for number, copy, outcome in run_batch(
        model,
        tasks,
        resolved,
        options,
        return_errors=return_errors,
        ahead=True,
        stopwatch=stopwatch,
    ):
        results[number][copy] = outcome
    for number, of_conversation in enumerate(results):
        errors = [each for each in of_conversation if isinstance(each, BsjaxError)]
        if errors or n is None:
            results[number] = errors[0] if errors else of_conversation[0]
    return results if is_batch else results[0]


def generate_iter(
    model: LoadedModel,
    conversations: Iterable[Messages],
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
    log_probabilities: int | None = None,
    return_errors: bool = False,
    backend: str = "auto",
    max_pixels: int | None = None,
    continue_final_message: bool = False,
    allow_files: bool | None = None,
    allow_urls: bool | None = None,
) -> Iterator[tuple[int, Result | BsjaxError]]:
    """Like `generate` for a batch, but yields each result as soon as its answer has ended.

    Conversations are taken from the iterable as they are needed, a limited number ahead, so that it
    may be long, or read from a file. This call checks the other arguments; the first conversation
    is taken when the first result is requested.

    Yields:
      The number of a conversation, counted from 0, and its result; with `return_errors`, the error
      of a conversation that cannot be answered.

    Raises:
      BsjaxError: as for `generate`.

    Example:
      >>> for number, result in bsjax.generate_iter(model, conversations):
      ...     print(number, result.text)
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
        use_generation_config=use_generation_config,
        log_probabilities=log_probabilities,
    )
    options = model.options(allow_files, allow_urls, max_pixels, continue_final_message)
    return_errors = truth_value("return_errors", return_errors, error=GenerationError)
    if isinstance(conversations, str | bytes | Mapping) or not isinstance(conversations, Iterable):
        raise GenerationError(
            f"conversations must be an iterable of conversations, got {shown(conversations)}."
        )
    resolved = Profile.resolve(profile, model)
    tasks = (
        Task(number, conversation, (settings,), f"conversations[{number}]")
        for number, conversation in enumerate(conversations)
    )
    outcomes = run_batch(model, tasks, resolved, options, return_errors=return_errors)
    _open_streams.add(outcomes)
    return ((number, outcome) for number, _, outcome in outcomes)


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
        use_generation_config=use_generation_config,
    )
    options = model.options(allow_files, allow_urls, max_pixels, continue_final_message)
    conversation = one_conversation("stream", messages)
    resolved = Profile.resolve(profile, model)
    stopwatch = Stopwatch()
    programs = programs_of(model)

    def check_cache(placed: Placed) -> None:
        layout = layout_of(None, placed.template.tokens + settings.new_tokens)
        check_cache_memory(placed, programs, layout, available_bytes(None, NOTHING, programs.mesh))

    prompt = checked_prompt(
        model, conversation, resolved, options, settings.new_tokens, stopwatch, check_cache
    )
    events = generate_once(model, prompt, resolved, settings, one_by_one=True, stopwatch=stopwatch)
    return pieces_of(events)


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


_open_streams: "weakref.WeakSet[Generator[Any, None, None]]" = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """Ends the streams and batches that are still open when the interpreter exits.

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


def forward_once(
    model: LoadedModel,
    messages: Messages,
    profile: Profile | None,
    backend: str,
    options: PromptOptions,
    kept: KeptCache | None = None,
) -> tuple[Logits, int, TokenIds]:
    """Logits of the tokens that run, the position of the first of them, and their ids."""
    with ImageReader() as reader:
        prompt = model.prompt_of(messages, options, reader, known_images_of(kept))
        reuse = NOTHING if kept is None else kept.reuse(prompt, new_tokens=0)
        inputs = prepare_inputs(
            model.architecture, prompt, profile, backend=backend, start=reuse.start
        )
        placed = PlacedPrompt(inputs, reuse)
        layout, programs = layout_of(kept, inputs.tokens), programs_of(model)
        available = available_bytes(kept, reuse, programs.mesh)
        check_cache_memory(inputs, programs, layout, available)
        reader.start()
        image_cache = image_cache_in(kept, model)
        scoring = Scoring(programs, placed, layout, backend, image_cache)
        stages = [*scoring.stages, *moving_stages(kept, reuse)]
        check_memory(inputs, stages, available, programs, layout)
        # On a CPU, the programs and the result share the host's memory.
        on_host = (
            max(stage.peak for stage in scoring.stages) if jax.default_backend() == "cpu" else 0
        )
        check_host_memory(inputs, scoring.result_bytes + on_host, host_bytes_available())
        if kept is not None:
            scoring.complete_images()
        logits, cache = scoring.logits(cache_of(kept, reuse, programs.module, layout))
        if kept is not None:
            kept.put(prompt, inputs.template, reuse, (), cache)
        return logits, reuse.start, prompt.token_ids[reuse.start :]


def answer_once(
    model: LoadedModel,
    messages: Messages,
    options: PromptOptions,
    profile: Profile | None,
    settings: AnswerSettings,
    *,
    one_by_one: bool,
    kept: KeptCache | None = None,
) -> Generator[Token | Result, None, None]:
    """Like `generate_once`, from messages, whose images are read while the first of them run."""
    stopwatch = Stopwatch()
    with ImageReader(stopwatch) as reader:
        with stopwatch.part("prompt"):
            prompt = model.prompt_of(messages, options, reader, known_images_of(kept))
        yield from generate_once(
            model,
            prompt,
            profile,
            settings,
            one_by_one=one_by_one,
            kept=kept,
            reader=reader,
            stopwatch=stopwatch,
        )


def generate_once(
    model: LoadedModel,
    prompt: Prompt,
    profile: Profile | None,
    settings: AnswerSettings,
    *,
    one_by_one: bool,
    kept: KeptCache | None = None,
    reader: ImageReader | None = None,
    stopwatch: Stopwatch | None = None,
) -> Generator[Token | Result, None, None]:
    """Yields every token, then the result.

    Args:
      model: from `bsjax.load`.
      prompt: the prompt.
      profile: head categories of prefill.
      settings: from `checked_settings`.
      one_by_one: whether to yield each token as soon as it is generated.
      kept: the cache of a session, of which the call uses as much as it can; None for a cache of
        its own.
      reader: what reads the prompt's images; None if they have been read.
      stopwatch: has counted the part `prompt`, and counts the others.
    """
    # Again, because a stream may be asked for its next piece in a forked child.
    check_not_forked(GenerationError)
    programs = programs_of(model)
    compiled_before = programs.of_this_thread
    stopwatch = stopwatch or Stopwatch()
    with stopwatch.part("schedules"):
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
        available = available_bytes(kept, reuse, programs.mesh)
        check_cache_memory(inputs, programs, layout, available)
        placed = PlacedPrompt(inputs, reuse)
        if reader is not None:
            reader.start()
        prefill = Prefill(
            programs,
            [placed],
            layout,
            [settings],
            settings.backend,
            image_cache=image_cache_in(kept, model),
            stopwatch=stopwatch,
        )
        decoding = Decoding(programs, layout, settings.end_tokens, settings.backend)
        rings = earlier_rings(
            kept, inputs, settings, programs.module.language_model, prefill.carried.cache
        )
        decoding_stages = [
            stage._replace(other_bytes=rings.bytes) if rings else stage for stage in decoding.stages
        ]
        stages = [*prefill.stages, *decoding_stages, *moving_stages(kept, reuse)]
        check_memory(inputs, stages, available, programs, layout)
    # Here, because a stream's caller may have this thread compile programs for other calls.
    compile_seconds = programs.of_this_thread[0] - compiled_before[0]
    compiled_programs = programs.of_this_thread[1] - compiled_before[1]
    stopwatch.move(compile_seconds, "schedules", "compiling")
    if kept is not None:
        # An image that cannot be read must leave the session as it was.
        prefill.complete_images()
    with stopwatch.part("prefill"):
        cache = cache_of(kept, reuse, programs.module, layout)
        first, state = prefill.first_token(DecodeState.before(programs.module, layout, cache))
        answers = Answers.of([inputs], [settings])
        new = tokens_of(first)
    until_first_token = stopwatch.total
    chosen: list[int] = []
    answer = Answer(model.tokenizer, settings)
    try:
        while True:
            chosen += [int(each.token) for each in new]
            for each in new:
                with stopwatch.part("decode"):
                    token = answer.add(each)
                yield token
                if answer.has_ended:
                    break
            if answer.has_ended:
                break
            left = settings.new_tokens - len(answer.token_ids)
            limit = 1 if one_by_one else min(settings.steps, left)
            # The first token is not in the cache yet, whether or not a stop text begins with it.
            if rings is not None and (len(chosen) == 1 or not answer.is_cut):
                rings.renew(state.cache, len(chosen) - 1)
            check_not_forked(GenerationError)
            with stopwatch.part("decode"):
                (more,), state = decoding.run(state, answers, steps=limit)
                new = tokens_of(more)
    finally:
        # An interrupt may have come after the tokens were written, and before they were counted.
        if kept is not None and _has_chosen(state, len(chosen)):
            # The last token is not in the cache yet.
            cached, cache = chosen[:-1], state.cache
            if rings is not None and answer.is_cut:
                cached, cache = rings.restored(cached, cache)
            kept.put(prompt, inputs.template, reuse, cached, cache)

    yield answer.result(
        inputs,
        stats_of(
            inputs,
            seconds_of(stopwatch.seconds),
            backend=settings.backend,
            first_token_seconds=until_first_token,
            decode_seconds=stopwatch.seconds["decode"],
            compiled_programs=compiled_programs,
            reused_tokens=reuse.start,
            reused_images=prefill.reused_images,
            imbalance=prefill.imbalance,
        ),
    )


def _has_chosen(state: DecodeState, tokens: int) -> bool:
    """Whether the only sequence of a state has that many tokens of an answer."""
    return not state.chosen.is_deleted() and int(state.chosen[0]) == tokens
