"""The caches of a session between its calls."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import argument
from bsjax.errors import CapacityError
from bsjax.masks.template import Template
from bsjax.models import ImageTextModel
from bsjax.models.language_model import LanguageModel
from bsjax.profiles.profile import Profile
from bsjax.prompts.known_images import KnownImages
from bsjax.prompts.prompt import Prompt
from bsjax.runtime.chunks import CacheLayout
from bsjax.runtime.decoding import STEPS_BEFORE_STOP, AnswerSettings
from bsjax.runtime.image_cache import ImageCache, image_cache_of
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.memory import bytes_available
from bsjax.runtime.programs import Program, Programs, Stage, programs_of, size_in_bytes
from bsjax.runtime.reuse import NOTHING, CachedTokens, Reuse, has_moved_on
from bsjax.runtime.sizes import cache_rows

MOST_CONVERSATIONS = 1024
"""The most conversations of a session."""


def moving_program(programs: Programs, rows: int) -> Program:
    """The program that moves the rows of all tokens in a cache of this many rows."""
    cache = jax.eval_shape(partial(programs.module.language_model.empty_cache, rows))
    sources = jax.ShapeDtypeStruct((rows,), np.int32)
    return programs.get(move_rows, (cache, sources), donate=(0,))


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


class KeptConversation(NamedTuple):
    """A conversation in the cache of a session.

    Attributes:
      tokens: its tokens.
      prompt_tokens: how many of them are the prompt of its last call. The others are the answer.
      cache: a cache with their keys and values.
    """

    tokens: CachedTokens
    prompt_tokens: int
    cache: Any


class KeptCache:
    """The caches of a session between its calls, and the tokens that they hold.

    Attributes:
      max_tokens: the most tokens of a conversation, answers included.
      rows: rows of a conversation's cache.
      most: the most conversations.
      conversations: the conversations, least recently used first.
      image_cache: features of images, which all conversations share; None if none are kept.
      known_images: digests of images of earlier calls.
    """

    def __init__(
        self,
        model: LoadedModel,
        profile: Profile | None,
        max_tokens: int,
        most: int = 1,
        image_cache: ImageCache | None = None,
    ) -> None:
        self.image_cache = image_cache
        self.known_images = KnownImages()
        self.max_tokens, self.most = max_tokens, most
        self.rows = cache_rows(max_tokens)
        self.conversations: list[KeptConversation] = []
        self._model, self._profile = model, profile

    @property
    def tokens(self) -> int:
        """How many tokens the caches hold."""
        return sum(each.tokens.token_ids.size for each in self.conversations)

    def clear(self) -> None:
        """Forgets all tokens and frees the caches."""
        self.conversations.clear()

    def reuse(self, prompt: Prompt, new_tokens: int) -> Reuse:
        """How much of a prompt the caches hold. Changes nothing.

        Raises:
          CapacityError: the prompt and the new tokens are more than `max_tokens`.
        """
        check_room(prompt, new_tokens, self.max_tokens)
        best = NOTHING
        if not self.conversations:
            return best
        family, config = self._model.family, self._model.config
        for image in prompt.images:
            if image.known_digest() is None:
                image.begin()
        sinks = None if self._profile is None else self._profile.sinks
        template = family.template(prompt, config, sinks)
        for index, each in enumerate(self.conversations):
            found = each.tokens.reuse(
                prompt,
                template,
                family.visibilities(config),
                self.rows,
                packed=self._profile is not None and self._profile.is_sparse,
            )
            if found.start and found.start >= best.start:
                best = replace(found, conversation=index)
        return best

    def _branches(self, reuse: Reuse) -> bool:
        """Whether a prompt leaves a conversation before its last answer, and both are kept."""
        if self.most == 1 or not reuse.start:
            return False
        # Another answer to the last question takes the place of the one before.
        return reuse.start < self.conversations[reuse.conversation].prompt_tokens - 1

    def freed_bytes(self, reuse: Reuse) -> int:
        """Bytes on the device that `take` frees or hands over."""
        if not self.conversations:
            return 0
        is_taken = reuse.start and not self._branches(reuse)
        is_full = len(self.conversations) == self.most
        return size_in_bytes(self.conversations[0].cache) if is_taken or is_full else 0

    def stages(self, reuse: Reuse) -> list[Stage]:
        """What `take` runs on the device. Compiles it if it has not been compiled."""
        if reuse.moved is None:
            return []
        return [Stage("moving kept rows", moving_program(programs_of(self._model), self.rows))]

    def take(self, reuse: Reuse) -> Any:
        """Hands a cache over, cut to the tokens that are used again; None if there are none.

        If there is no room for another conversation, the least recently used one is dropped. The
        cache is not kept until `put`: programs update it in place, so that a call that fails half
        way leaves nothing that could be used.
        """
        branches = self._branches(reuse)
        taken = self.conversations.pop(reuse.conversation) if reuse.start else None
        if len(self.conversations) + branches == self.most:
            self.conversations.pop(0)
        if taken is None:
            return None
        cache = taken.cache
        if branches:
            self.conversations.append(taken)
            cache = jax.tree.map(jnp.copy, cache)
        if reuse.moved is not None:
            rows = np.zeros(self.rows, np.int32)
            rows[: reuse.start] = reuse.moved
            cache = moving_program(programs_of(self._model), self.rows)(cache, rows)
        return cache

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
        self.conversations.append(KeptConversation(tokens, prompt.token_ids.size, cache))


class EarlierRings:
    """A copy of a session's rings, from before the stop text that may end an answer.

    The next prompt has the answer up to the stop text. Decoding writes the tokens of that text, and
    some after it, over the oldest tokens of the window, without which the next turn could use
    nothing again. With the copy, a session goes on from where it was made.

    Attributes:
      bytes: those of the copy on each device.
    """

    def __init__(self, language_model: LanguageModel, cache: Any) -> None:
        """Prepares a copy, which is made by `renew`.

        Args:
          language_model: of the model.
          cache: shapes and dtypes of its cache.
        """
        self._language_model = language_model
        self.bytes = size_in_bytes(language_model.rings(cache))
        self._rings: Any = None
        self._tokens = 0

    def renew(self, cache: Any, tokens: int) -> None:
        """Copies the rings, unless the copy is hardly older.

        Args:
          cache: the cache.
          tokens: how many tokens of the answer are in it.
        """
        if self._rings is None or tokens - self._tokens >= STEPS_BEFORE_STOP:
            # First, so that there is no second copy at any time.
            self._rings = None
            self._rings = jax.tree.map(jnp.copy, self._language_model.rings(cache))
            self._tokens = tokens

    def restored(self, answer: list[int], cache: Any) -> tuple[list[int], Any]:
        """The tokens of an answer that are in the cache, and the cache, as they were then."""
        if self._rings is None:
            return answer, cache
        return answer[: self._tokens], self._language_model.with_rings(cache, self._rings)


def known_images_of(kept: KeptCache | None) -> KnownImages | None:
    """The images that a session knows; None for a call without one."""
    return None if kept is None else kept.known_images


def earlier_rings(
    kept: KeptCache | None,
    inputs: ModelInputs,
    settings: AnswerSettings,
    language_model: LanguageModel,
    cache: Any,
) -> EarlierRings | None:
    """What a call needs so that its answer may end with a stop text; None if it needs nothing.

    Args:
      kept: the cache of a session; None if the call has one of its own.
      inputs: the prompt.
      settings: how it is answered.
      language_model: of the model.
      cache: shapes and dtypes of the cache.
    """
    if kept is None or not settings.stop:
        return None
    if not has_moved_on(inputs.visibilities, kept.rows, inputs.tokens + settings.new_tokens):
        return None
    return EarlierRings(language_model, cache)


def image_cache_in(kept: KeptCache | None, model: LoadedModel) -> ImageCache | None:
    """The image features that a call may use: a session's, or those of all calls of the model."""
    return image_cache_of(model) if kept is None else kept.image_cache


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


def available_bytes(kept: KeptCache | None, reuse: Reuse, mesh: Mesh | None) -> int | None:
    """Free bytes on each device, those of a cache that is taken over included; None if unknown."""
    available = bytes_available(mesh)
    return available if available is None or kept is None else available + kept.freed_bytes(reuse)


def moving_stages(kept: KeptCache | None, reuse: Reuse) -> list[Stage]:
    """The stage that moves the rows of a session's cache, if they have to move."""
    return [] if kept is None else kept.stages(reuse)
