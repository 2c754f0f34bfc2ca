"""Compiles the programs of a model before the first prompt arrives."""

import time
from dataclasses import dataclass

import numpy as np

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import DescribedModel, LoadedModel
from bsjax.checks import truth_value, whole_number
from bsjax.errors import GenerationError
from bsjax.models.collectives import CONTEXT
from bsjax.models.sharding import device_count, size_along
from bsjax.profiles.profile import Profile
from bsjax.prompts.prompt import Prompt, PromptImage
from bsjax.runtime.arguments import ProfileLike, checked_max_tokens
from bsjax.runtime.batch import copying_program, sequences_for
from bsjax.runtime.chunks import CacheLayout, PlacedPrompt
from bsjax.runtime.decoding import AnswerSettings, Decoding
from bsjax.runtime.image_cache import ImageCache
from bsjax.runtime.images import ImageEncoder, counted_patches, image_groups, uncut_tokens
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.kept_cache import moving_program
from bsjax.runtime.memory import bytes_available
from bsjax.runtime.prefill import Prefill
from bsjax.runtime.programs import check_model, programs_of
from bsjax.runtime.scoring import AnswerScoring
from bsjax.runtime.sizes import cache_rows, sizes_in_use


@dataclass(frozen=True)
class Warmup:
    """What `warmup` did.

    Attributes:
      programs: how many programs were compiled, or read from the persistent cache.
      seconds: how long that took.
    """

    programs: int
    seconds: float


def warmup(
    model: LoadedModel,
    *,
    max_tokens: int = 8192,
    images: bool = True,
    profile: ProfileLike = None,
    conversations: int = 1,
    scoring: bool = True,
    backend: str = "auto",
) -> Warmup:
    """Compiles what `generate`, sessions and `score` need, so that no prompt has to wait for it.

    A handful of programs serves all prompts up to a length: chunks, caches and groups of images
    have few sizes. They are kept with the model, and in JAX's persistent cache for later processes.

    Args:
      model: from `bsjax.load`.
      max_tokens: the most tokens that a prompt and its answer have. Sessions share all programs if
        they have the same `max_tokens`.
      images: whether prompts have images, for a model that reads them.
      profile: as for `generate`. All profiles with sparse heads share their programs; dense prompts
        need others. If prompts run both ways, call this once with and once without a profile.
      conversations: how many conversations batches have; 1 for no batches. Batches of other sizes
        may need other programs.
      scoring: whether answers are scored, which takes other programs for the same chunks.
      backend: attention backend, see `sparse_attention`.

    Raises:
      GenerationError: an argument is out of range.
      CapacityError: the model has fewer positions than `max_tokens`.
      ProfileError: the profile is malformed, or was made for another model.
      BackendError: the backend is unknown.

    Example:
      >>> bsjax.warmup(model, max_tokens=2048)
      Warmup(programs=..., seconds=...)
    """
    check_model(model, GenerationError)
    resolved, backend = checked_warmup(
        model,
        max_tokens=max_tokens,
        images=images,
        profile=profile,
        conversations=conversations,
        scoring=scoring,
        backend=backend,
    )
    programs = programs_of(model)
    before, start = programs.compilations, time.perf_counter()
    of_every_size = _images_of_every_size(model, backend) if images else ()
    groups = image_groups(model.architecture, of_every_size, backend, mesh=model.mesh)
    moves_rows = bool(groups) and resolved is not None and resolved.is_sparse
    prepared = {
        rows: prepare_inputs(
            model.architecture, _prompt_of_every_chunk(model, rows), resolved, backend=backend
        )
        for rows in cache_lengths(max_tokens)
    }
    # First, because a model that has too many programs drops those that were compiled first.
    for rows, inputs in prepared.items() if scoring else ():
        prompt = PlacedPrompt(inputs)
        AnswerScoring(programs, prompt, inputs.tokens - 1, CacheLayout(rows), backend)
        if moves_rows:
            # Of several answers to one question.
            moving_program(programs, rows)
    for rows, inputs in prepared.items():
        settings = AnswerSettings(1, backend)
        sequences = sequences_for(
            programs.module, rows, conversations, bytes_available(programs.mesh)
        )
        for layout in {CacheLayout(rows), CacheLayout(rows, sequences)}:
            prefill = Prefill(programs, [PlacedPrompt(inputs)], layout, [settings], backend)
            ImageEncoder(
                programs,
                groups,
                prefill.features,
                prefill.chunks.feature_row,
                backend,
                cache=ImageCache(1),
            )
            Decoding(programs, layout, settings.end_tokens, backend)
            if layout.sequences > 1:
                copying_program(programs, prefill.carried)
    if moves_rows:
        # Of a session with this many tokens.
        moving_program(programs, cache_rows(max_tokens))
    return Warmup(programs.compilations - before, time.perf_counter() - start)


def checked_warmup(
    model: DescribedModel,
    *,
    max_tokens: int,
    images: bool,
    profile: ProfileLike,
    conversations: int,
    scoring: bool,
    backend: str,
) -> tuple[Profile | None, str]:
    """The profile and the backend of `warmup`, whose arguments are checked without weights.

    Raises:
      BsjaxError: as for `warmup`.
    """
    checked_max_tokens(model, max_tokens, least=1)
    truth_value("images", images, error=GenerationError)
    truth_value("scoring", scoring, error=GenerationError)
    whole_number("conversations", conversations, least=1, error=GenerationError)
    backend = resolve_backend(backend)
    return Profile.resolve(profile, model), backend


def cache_lengths(max_tokens: int) -> list[int]:
    """Every number of rows that a cache for up to `max_tokens` tokens can have, ascending."""
    lengths = [cache_rows(1)]
    while lengths[-1] < max_tokens:
        lengths.append(cache_rows(lengths[-1] + 1))
    return lengths


def _prompt_of_every_chunk(model: LoadedModel, rows: int) -> Prompt:
    """Long enough for a chunk of each size that prompts with a cache of `rows` rows use."""
    limit = model.config.get_text_config().max_position_embeddings
    sizes = sizes_in_use().on_devices(size_along(model.mesh, CONTEXT))
    sizes = sizes.chunks_for(rows, uncut_tokens(model.architecture))
    return Prompt(np.zeros(min(sum(sizes[1:]) + 1, rows, limit), np.int32))


def _images_of_every_size(model: LoadedModel, backend: str) -> tuple[PromptImage, ...]:
    """Images that fill a group of each size that the smallest image fits into, largest first."""
    family, config = model.family, model.config
    if not family.reads_images:
        return ()
    grid = np.asarray(family.smallest_grid(config), np.int32)
    tokens = int(grid.prod()) // family.patches_per_token(config)
    nothing = np.zeros((int(grid.prod()), 0), np.uint8)
    image = PromptImage(grid, tokens, model.pixel_scale, lambda: nothing)
    counted = int(counted_patches(model.architecture, grid[None], backend)[0])
    devices = device_count(model.mesh)
    sizes = sizes_in_use().patches_for(2**63, devices)
    return (image,) * (devices * sum(size // counted for size in sizes))
