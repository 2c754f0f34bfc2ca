"""The cache of a session between its calls."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import argument
from bsjax.errors import CapacityError
from bsjax.masks.template import Template
from bsjax.models import ImageTextModel
from bsjax.profiles.profile import Profile
from bsjax.prompts.prompt import Prompt
from bsjax.runtime.chunks import CacheLayout
from bsjax.runtime.memory import bytes_available
from bsjax.runtime.programs import Program, Programs, Stage, programs_of, size_in_bytes
from bsjax.runtime.reuse import CachedTokens, Reuse, has_moved_on
from bsjax.runtime.sizes import cache_rows


def moving_program(programs: Programs, rows: int) -> Program:
    """The program that moves the rows of all tokens in a cache of this many rows."""
    cache = jax.eval_shape(partial(programs.module.language_model.empty_cache, rows))
    from_rows = jax.ShapeDtypeStruct((rows,), np.int32)
    return programs.get(move_rows, (cache, from_rows), donate=(0,))


def move_rows(module: ImageTextModel, cache: Any, rows: Int[Array, "cache_rows"]) -> Any:
    """The cache with the rows of all tokens taken from other rows. Donate `cache`."""
    return module.language_model.moved(cache, rows)


def check_room(prompt: Prompt, new_tokens: int, max_tokens: int) -> None:
    """Rejects a prompt for which a session has no room.

    Raises:
      CapacityError: the prompt and the new tokens are more than `max_tokens`.
    """
    tokens = prompt.token_ids.size
    if tokens + new_tokens > max_tokens:
        follow = f" and up to {new_tokens} new tokens follow" if new_tokens else ""
        raise CapacityError(
            f"The prompt has {tokens} tokens{follow}, but the session has room for {max_tokens}: "
            f"raise its {argument('max_tokens')}, or begin a new conversation."
        )


class KeptCache:
    """The cache of a session between its calls, and the tokens that it holds.

    Attributes:
      max_tokens: the most tokens, answers included.
      rows: rows of the cache.
    """

    def __init__(self, model: LoadedModel, profile: Profile | None, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.rows = cache_rows(max_tokens)
        self._model, self._profile = model, profile
        self._tokens: CachedTokens | None = None
        self._cache: Any = None

    @property
    def size(self) -> int:
        """Bytes on the device."""
        return 0 if self._cache is None else size_in_bytes(self._cache)

    @property
    def tokens(self) -> int:
        """How many tokens the cache holds."""
        return 0 if self._tokens is None else self._tokens.token_ids.size

    def clear(self) -> None:
        """Forgets all tokens and frees the cache."""
        self._tokens = self._cache = None

    def reuse(self, prompt: Prompt, new_tokens: int) -> Reuse:
        """How much of a prompt the cache holds. Changes nothing.

        Raises:
          CapacityError: the prompt and the new tokens are more than `max_tokens`.
        """
        check_room(prompt, new_tokens, self.max_tokens)
        if self._tokens is None:
            return Reuse(cache_rows=self.rows)
        family, config = self._model.family, self._model.config
        sinks = None if self._profile is None else self._profile.sinks
        return self._tokens.reuse(
            prompt,
            family.template(prompt, config, sinks),
            family.visibilities(config),
            self.rows,
            packed=self._profile is not None and self._profile.is_sparse,
        )

    def stages(self, reuse: Reuse) -> list[Stage]:
        """What `take` runs on the device. Compiles it if it has not been compiled."""
        if reuse.moved is None:
            return []
        return [Stage("moving kept rows", moving_program(programs_of(self._model), self.rows))]

    def take(self, reuse: Reuse) -> Any:
        """Hands the cache over, cut to the tokens that are used again; None if there are none.

        Nothing is kept until `put`: programs update the cache in place, so that a call that fails
        half way leaves nothing that could be used.
        """
        cache = self._cache
        self.clear()
        if not reuse.start:
            return None
        if reuse.moved is not None:
            rows = np.zeros(self.rows, np.int32)
            rows[: reuse.start] = reuse.moved
            cache = moving_program(programs_of(self._model), self.rows)(cache, rows)
        return cache

    def held(self) -> tuple[CachedTokens | None, Any]:
        """The tokens and the cache."""
        return self._tokens, self._cache

    def hold(self, tokens: CachedTokens | None, cache: Any) -> None:
        """Takes over tokens and their cache."""
        self._tokens, self._cache = tokens, cache

    def put(
        self,
        prompt: Prompt,
        template: Template,
        reuse: Reuse,
        answer: Sequence[int],
        cache: Any,
    ) -> None:
        """Keeps a cache for the next call.

        Args:
          prompt: the prompt.
          template: its template.
          reuse: how it ran.
          answer: the tokens of the answer that are in the cache.
          cache: the cache. If a program that it was given to has failed, nothing is kept.
        """
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
            return
        family, config = self._model.family, self._model.config
        image_token_id = family.image_token_id(config)
        tokens = CachedTokens.of(prompt, template, answer, reuse.span_starts, image_token_id)
        written = prompt.token_ids.size + len(answer)
        visibilities = family.visibilities(config)
        if tokens.token_ids.size < written and has_moved_on(visibilities, self.rows, written):
            # The tokens that were left out have taken rows of the window before them.
            return
        self.hold(tokens, cache)


def layout_of(kept: KeptCache | None, tokens: int) -> CacheLayout:
    """The shape of the cache of a call.

    Args:
      kept: the cache of a session; None if the call has one of its own.
      tokens: tokens of the prompt and of its answer.
    """
    return CacheLayout(cache_rows(tokens) if kept is None else kept.rows)


def cache_of(
    kept: KeptCache | None, reuse: Reuse, module: ImageTextModel, layout: CacheLayout
) -> Any:
    """The cache that a call begins with: that of the session, or an empty one.

    Args:
      kept: the cache of a session; None if the call has one of its own.
      reuse: which tokens are used again.
      module: the model.
      layout: the shape of the cache.
    """
    cache = None if kept is None else kept.take(reuse)
    return module.language_model.empty_cache(*layout) if cache is None else cache


def available_bytes(kept: KeptCache | None) -> int | None:
    """Free bytes on the device, those of a cache that is taken over included; None if unknown."""
    available = bytes_available()
    return available if available is None or kept is None else available + kept.size


def moving_stages(kept: KeptCache | None, reuse: Reuse) -> list[Stage]:
    """The stage that moves the rows of a session's cache, if they have to move."""
    return [] if kept is None else kept.stages(reuse)
