"""Conversations that compute no token twice: each call begins where the cache stops agreeing."""

import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, overload

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import DescribedModel, LoadedModel
from bsjax.checks import check_not_forked, truth_value, whole_number
from bsjax.errors import GenerationError
from bsjax.profiles.profile import Profile
from bsjax.runtime.arguments import (
    Messages,
    ProfileLike,
    check_stream,
    checked_max_tokens,
    checked_prompt,
    checked_settings,
    one_conversation,
)
from bsjax.runtime.generation import (
    Logits,
    TokenIds,
    answer_once,
    forward_once,
    generate_once,
    pieces_of,
    result_of,
)
from bsjax.runtime.image_cache import DEFAULT_BYTES, ImageCache, image_cache_of
from bsjax.runtime.kept_cache import MOST_CONVERSATIONS, KeptCache
from bsjax.runtime.likelihood import score_once
from bsjax.runtime.programs import check_model
from bsjax.runtime.results import Result, Score, Token
from bsjax.runtime.session_file import read_session, write_session
from bsjax.timing import Stopwatch


def checked_session(
    model: DescribedModel, *, profile: ProfileLike, max_tokens: int, backend: str
) -> tuple[Profile | None, str]:
    """The profile and the backend of a `Session`, whose arguments are checked without weights.

    Raises:
      BsjaxError: as for `Session`.
    """
    checked_max_tokens(model, max_tokens, least=2)
    backend = resolve_backend(backend)
    return Profile.resolve(profile, model), backend


class Session:
    """Answers the turns of conversations without computing again what earlier turns computed.

    A call compares its prompt with the tokens in the session's cache, token by token, images by
    their pixels. What both begin with is used again, and only the rest runs; what the cache holds
    beyond that is dropped. The answer is that of `bsjax.generate`: keys and values depend on
    earlier tokens only, so they are the same to rounding. Calls take whole conversations, as
    `bsjax.generate` does: append the answer and the next question to the messages, or edit any of
    them.

    With `conversations` above 1, a session keeps several: a prompt goes on with the one that it
    shares the most with, and one that leaves it before its last answer becomes a conversation of
    its own, with a copy of what they share. When there is no room for another one, the least
    recently used is dropped.

    Layers with a window keep only the tokens in it (Gemma 3). If the prompt does not continue all
    tokens in the cache, and the window has moved on, everything runs again. An answer that a stop
    text ended is continued from a few tokens before that text.
    `Result.stats.reused_tokens` says how many tokens were used again.

    One call runs at a time. A stream that is dropped or closed before its end leaves the tokens
    that it has generated.

    Example:
      >>> session = bsjax.Session(model, profile="profile.json", max_tokens=8192)
      >>> answer = session.generate(messages)
      >>> messages.append({"role": "assistant", "content": answer.text})
      >>> messages.append({"role": "user", "content": "And in the last image?"})
      >>> session.generate(messages).stats.reused_tokens
      1956
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        profile: ProfileLike = None,
        max_tokens: int = 8192,
        conversations: int = 1,
        image_cache_bytes: int = DEFAULT_BYTES,
        backend: str = "auto",
    ) -> None:
        """Prepares a session. The cache is allocated by the first call.

        Args:
          model: from `bsjax.load`.
          profile: head categories of prefill; None is dense.
          max_tokens: the most tokens of a prompt and its answer, which set the size of the cache
            of a conversation.
          conversations: the most conversations that are kept.
          image_cache_bytes: the most bytes of host memory for the features of images, so that an
            image that comes again, in any order or conversation, needs no vision tower. A model
            that was loaded with a cache of its own shares that one with the session.
          backend: attention backend, see `sparse_attention`.

        Raises:
          ProfileError: the profile is malformed, or was made for another model.
          CapacityError: the model has fewer positions than `max_tokens`.
          GenerationError: an argument is out of range.
          BackendError: the backend is unknown.
        """
        check_model(model, GenerationError)
        self._model = model
        self._profile, self._backend = checked_session(
            model, profile=profile, max_tokens=max_tokens, backend=backend
        )
        conversations = whole_number(
            "conversations", conversations, least=1, most=MOST_CONVERSATIONS, error=GenerationError
        )
        image_cache_bytes = whole_number(
            "image_cache_bytes", image_cache_bytes, least=0, error=GenerationError
        )
        shared = image_cache_of(model)
        own = ImageCache(image_cache_bytes) if image_cache_bytes else None
        self._kept = KeptCache(
            model, self._profile, max_tokens, conversations, own if shared is None else shared
        )
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """How many tokens the cache holds, of all conversations."""
        return self._kept.tokens

    @property
    def max_tokens(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self._kept.max_tokens

    def clear(self) -> None:
        """Forgets all tokens and frees the cache."""
        with self._one_call():
            self._kept.clear()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the cache, so that another process can go on with the conversation.

        The file holds keys and values of the tokens, which say what the conversation was about:
        keep it as private as the conversation. Only this user can read it. It is written completely
        or not at all, even if the process is killed.

        Raises:
          SessionError: the file cannot be written.
          GenerationError: while a call of this session runs.
        """
        with self._one_call():
            write_session(path, self._model, self._profile, self._kept)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: LoadedModel,
        *,
        profile: ProfileLike = None,
        backend: str = "auto",
        image_cache_bytes: int = DEFAULT_BYTES,
    ) -> "Session":
        """A session that goes on where a saved one was.

        Args:
          path: a file written by `save`.
          model: the model that the session was saved with, in the same dtype, on any devices.
          profile: the profile that the session was saved with.
          backend: attention backend, see `sparse_attention`.
          image_cache_bytes: as for `Session`. Features of images are not saved.

        Raises:
          SessionError: the file is missing or damaged, or was saved with another checkpoint,
            profile, settings or dtype.
          BsjaxError: as for `Session`.
        """
        check_model(model, GenerationError)
        backend = resolve_backend(backend)
        resolved = Profile.resolve(profile, model)
        saved = read_session(path, model, resolved)
        session = cls(
            model,
            profile=resolved,
            max_tokens=saved.max_tokens,
            conversations=saved.most,
            backend=backend,
            image_cache_bytes=image_cache_bytes,
        )
        session._kept.conversations += saved.conversations
        return session

    def generate(
        self,
        messages: Messages,
        *,
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
        max_pixels: int | None = None,
        continue_final_message: bool = False,
        allow_files: bool | None = None,
        allow_urls: bool | None = None,
    ) -> Result:
        """Like `bsjax.generate`, for one conversation.

        Raises:
          CapacityError: also if the prompt and the answer need more than `max_tokens`.
          GenerationError: also while another call of this session runs.
          BsjaxError: as for `bsjax.generate`.
        """
        check_stream(stream)
        settings = checked_settings(
            self._model,
            self._backend,
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
        options = self._model.options(allow_files, allow_urls, max_pixels, continue_final_message)
        conversation = one_conversation("a session", messages)
        events = self._events(
            partial(
                answer_once,
                messages=conversation,
                options=options,
                settings=settings,
                one_by_one=stream is not None,
            )
        )
        return result_of(events, stream)

    def stream(
        self,
        messages: Messages,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int = 0,
        use_generation_config: bool = False,
        max_pixels: int | None = None,
        continue_final_message: bool = False,
        allow_files: bool | None = None,
        allow_urls: bool | None = None,
    ) -> Iterator[str]:
        """Like `bsjax.stream`.

        Raises:
          BsjaxError: as for `generate`.
        """
        settings = checked_settings(
            self._model,
            self._backend,
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
        options = self._model.options(allow_files, allow_urls, max_pixels, continue_final_message)
        conversation = one_conversation("a session", messages)
        check_not_forked(GenerationError)
        stopwatch = Stopwatch()
        prompt = checked_prompt(
            self._model, conversation, self._profile, options, settings.new_tokens, stopwatch
        )
        answer = partial(
            generate_once, prompt=prompt, settings=settings, one_by_one=True, stopwatch=stopwatch
        )
        return pieces_of(self._events(answer))

    @overload
    def forward(
        self,
        messages: Messages,
        *,
        return_token_ids: Literal[False] = False,
        max_pixels: int | None = None,
        continue_final_message: bool = False,
        allow_files: bool | None = None,
        allow_urls: bool | None = None,
    ) -> tuple[Logits, int]: ...

    @overload
    def forward(
        self,
        messages: Messages,
        *,
        return_token_ids: Literal[True],
        max_pixels: int | None = None,
        continue_final_message: bool = False,
        allow_files: bool | None = None,
        allow_urls: bool | None = None,
    ) -> tuple[Logits, int, TokenIds]: ...

    def forward(
        self,
        messages: Messages,
        *,
        return_token_ids: bool = False,
        max_pixels: int | None = None,
        continue_final_message: bool = False,
        allow_files: bool | None = None,
        allow_urls: bool | None = None,
    ) -> tuple[Logits, int] | tuple[Logits, int, TokenIds]:
        """Logits of the tokens that were not in the cache.

        The arguments are those of `bsjax.forward`.

        Returns:
          The logits, float32 [tokens, vocabulary], and the position of the first of these tokens;
          with `return_token_ids`, also their ids, int32 [tokens]. The last row is always that of
          the prompt's last token.

        Raises:
          BsjaxError: as for `generate`.
        """
        with_ids = truth_value("return_token_ids", return_token_ids, error=GenerationError)
        options = self._model.options(allow_files, allow_urls, max_pixels, continue_final_message)
        conversation = one_conversation("forward", messages)
        with self._one_call():
            logits, first, token_ids = forward_once(
                self._model, conversation, self._profile, self._backend, options, self._kept
            )
        return (logits, first, token_ids) if with_ids else (logits, first)

    def score(
        self,
        messages: Messages,
        *,
        max_pixels: int | None = None,
        allow_files: bool | None = None,
        allow_urls: bool | None = None,
    ) -> Score:
        """Like `bsjax.score`, for one conversation.

        What several answers to one question have in common runs only for the first of them.

        Raises:
          BsjaxError: as for `generate`.
        """
        options = self._model.options(allow_files, allow_urls, max_pixels)
        conversation = one_conversation("score", messages)
        with self._one_call():
            check_not_forked(GenerationError)
            answered = self._model.answered_prompt(conversation, options)
            return score_once(self._model, answered, self._profile, self._backend, self._kept)

    def _events(
        self, answer: Callable[..., Generator[Token | Result, None, None]]
    ) -> Generator[Token | Result, None, None]:
        """The tokens, then the result, of a call that `answer` answers in this session's cache."""
        check_not_forked(GenerationError)
        with self._one_call():
            yield from answer(model=self._model, profile=self._profile, kept=self._kept)

    @contextmanager
    def _one_call(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise GenerationError(
                "This session is answering another call: wait for it, or close its stream, or use "
                "a session for each conversation."
            )
        try:
            yield
        finally:
            self._lock.release()
