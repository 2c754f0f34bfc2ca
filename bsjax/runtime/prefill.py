"""Prefill: prompts run chunk by chunk over one cache, and their last rows give the first tokens.

    images of the chunk -> chunk -> images of the next chunk -> next chunk -> ...

The cache is allocated once, and each chunk updates it in place. Image features are kept, until
their chunk runs, in an array with room for those of a chunk and those of a group of images. When
its rows are used up, image tokens start again from the first row.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int
from typing_extensions import override

from bsjax.models import ImageTextModel
from bsjax.models.cache import PADDING_ROW
from bsjax.models.collectives import (
    CONTEXT,
    TENSOR,
    Shares,
    of_first_context,
    own_part,
    rows_of_all,
)
from bsjax.models.sharding import device_count, replicated, sharded_shapes, size_along
from bsjax.runtime.chunks import CacheLayout, Chunk, ChunkArguments, Chunks, PlacedPrompt
from bsjax.runtime.decoding import AnswerSettings, DecodeState
from bsjax.runtime.image_cache import ImageCache
from bsjax.runtime.images import (
    ImageEncoder,
    image_groups,
    most_round_tokens,
    own_groups,
    rounds_until,
    uncut_tokens,
)
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.processes import check_alike, spans_processes
from bsjax.runtime.programs import Program, Programs, Stage, size_in_bytes
from bsjax.runtime.sampling import Chosen, Sampling, choose, stacked
from bsjax.runtime.sizes import Sizes, most_parts, sizes_in_use
from bsjax.timing import Stopwatch


class FirstTokens(NamedTuple):
    """The first tokens that a chunk chooses: one for each of its `outputs`.

    Attributes:
      sequence: int32 [outputs], the sequence that each token is for; `PADDING_ROW` for outputs that
        are not used.
      sampling: how they are chosen; each field is an array [outputs].
      occurred: bool [outputs, vocabulary], which tokens are in the prompts.
      scored: bool, whether log-probabilities are computed.
    """

    sequence: Any
    sampling: Sampling
    occurred: Any
    scored: Any


def prefill(
    module: ImageTextModel,
    state: DecodeState,
    features: Float[Array, "features hidden"] | None,
    chunk: ChunkArguments,
    head_category: Int[Array, "layers q_heads"],
    first: FirstTokens,
    backend: str,
) -> tuple[Chosen, DecodeState]:
    """Runs a chunk, and chooses the first token of each answer whose prompt ends in it.

    Args:
      module: the model.
      state: empty, or from the previous chunk or `decode`. Donate it so that the cache is updated
        in place.
      features: features of images, in the rows that `chunk.feature_row` names; None if the model
        reads no images.
      chunk: the chunk, with the rows of last tokens as `outputs`.
      head_category: `HeadCategory` of every query head of every layer.
      first: the tokens to choose.
      backend: attention backend.

    Returns:
      The tokens, and the state with the chunk and with these tokens.
    """
    hidden, cache = _run_chunk(module, state.cache, features, chunk, head_category, backend)
    step = jnp.zeros(hidden.shape[0], jnp.int32)
    chosen = choose(module.logits(hidden), first.sampling, step, first.occurred, first.scored)
    chosen = jax.tree.map(of_first_context, chosen)
    return chosen, DecodeState(
        state.token.at[first.sequence].set(chosen.token, mode="drop"),
        state.chosen.at[first.sequence].set(1, mode="drop"),
        state.occurred.at[first.sequence].set(first.occurred, mode="drop"),
        cache,
    )


def all_logits(
    module: ImageTextModel,
    cache: Any,
    features: Float[Array, "features hidden"] | None,
    chunk: ChunkArguments,
    head_category: Int[Array, "layers q_heads"],
    backend: str,
) -> tuple[Shares, Any]:
    """Runs a chunk for the logits of all its rows. The arguments are those of `prefill`.

    Returns:
      The logits of each row, padding included, float32 [devices, rows, vocabulary], and the cache
      with the chunk.
    """
    hidden, cache = _run_chunk(module, cache, features, chunk, head_category, backend)
    return Shares(module.logits(hidden)[None]), cache


SCORED_ROWS = 128
"""Rows whose logits `log_probabilities` holds at a time: 78 MB with a vocabulary of 152K tokens."""


class ScoredRows(NamedTuple):
    """The rows of a chunk whose next tokens are scored, padded to a multiple of `SCORED_ROWS`."""

    count: Any
    """int32, how many there are."""
    rows: Any
    """int32 [scored], the rows."""
    next_token_ids: Any
    """int32 [scored], the token that follows each of them in the prompt."""


def log_probabilities(
    module: ImageTextModel,
    cache: Any,
    features: Float[Array, "features hidden"] | None,
    chunk: ChunkArguments,
    head_category: Int[Array, "layers q_heads"],
    scored: ScoredRows,
    backend: str,
) -> tuple[tuple[Float32[Array, "scored"], Bool[Array, "scored"]], Any]:
    """Runs a chunk for the log-probabilities of the tokens that follow some of its rows.

    The arguments are those of `prefill`, without the chunk's `outputs`.

    Returns:
      For each of the scored rows, the log-probability of its next token and whether that is the
      likeliest one; and the cache with the chunk.
    """
    hidden, cache = _run_chunk(module, cache, features, chunk, head_category, backend)

    def of_some(index: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        first = index * SCORED_ROWS
        rows = jax.lax.dynamic_slice(scored.rows, (first,), (SCORED_ROWS,))
        token_ids = jax.lax.dynamic_slice(scored.next_token_ids, (first,), (SCORED_ROWS,))
        logits = module.logits(rows_of_all(hidden, rows))
        chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=1)[:, 0]
        scores = chosen - jax.nn.logsumexp(logits, axis=1)
        # As `sample` chooses it: of equally likely tokens, the first.
        likeliest = jnp.argmax(logits, axis=1) == token_ids
        return (
            jax.lax.dynamic_update_slice(results[0], scores, (first,)),
            jax.lax.dynamic_update_slice(results[1], likeliest, (first,)),
        )

    # Logits are computed only for the rows that are scored, which most chunks have none of.
    groups = (scored.count + (SCORED_ROWS - 1)) // SCORED_ROWS
    size = scored.rows.shape
    nothing = jnp.zeros(size, jnp.float32), jnp.zeros(size, bool)
    return jax.lax.fori_loop(jnp.int32(0), groups, of_some, nothing), cache


def _run_chunk(
    module: ImageTextModel,
    cache: Any,
    features: Float[Array, "features hidden"] | None,
    chunk: ChunkArguments,
    head_category: Int[Array, "layers q_heads"],
    backend: str,
) -> tuple[Float[Array, "outputs hidden"], Any]:
    """Embeds the rows of a chunk and runs the layers."""
    embeddings = module.language_model.embed(chunk.token_ids)
    if features is not None:
        is_image = (chunk.feature_row != PADDING_ROW)[:, None]
        of_images = features.at[chunk.feature_row].get(mode="clip")
        embeddings = jnp.where(is_image, of_images, embeddings)
    return module.language_model.prefill(
        embeddings,
        chunk.position_ids,
        chunk.cached_rows,
        own_part(head_category, TENSOR, axis=1),
        cache,
        only=chunk.outputs,
        backend=backend,
    )


class ChunkedRun:
    """Runs prompts chunk by chunk: what answering and scoring have in common.

    Attributes:
      chunks: the chunks of the prompts.
      groups: the images of the prompts, in the groups in which they go through the vision tower.
      carried: shapes and dtypes of what each chunk passes to the next: the cache, alone or with
        more.
      features: shape and dtype of the array of image features; None if the model reads no images.
      stages: all stages: one for each size of image group, and one for each size of chunk.
      stopwatch: counts the parts `images`, `transfer`, `vision` and `prefill` of `run`. Chunks that
        are built while the device runs the one before count as `prefill`.
    """

    def __init__(
        self,
        programs: Programs,
        prompts: Sequence[PlacedPrompt],
        layout: CacheLayout,
        step: Callable[..., Any],
        backend: str,
        *,
        sizes: Sizes,
        carried: Any,
        all_outputs: bool = False,
        image_cache: ImageCache | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """Compiles the programs that are needed.

        Args:
          programs: the programs of the model.
          prompts: the prompts, in the order in which they run.
          layout: the shape of the cache.
          step: the function that runs a chunk: `prefill`, `all_logits` or `log_probabilities`.
          backend: attention backend.
          sizes: sizes of chunks.
          carried: shapes and dtypes of what each chunk passes to the next.
          all_outputs: whether `step` needs the hidden states of all rows, not only those of the
            prompts' last tokens.
          image_cache: keeps features of images; None keeps none.
          stopwatch: counts the time; None for one of its own.
        """
        if spans_processes(programs.mesh):
            check_alike(_what_runs(prompts))
        self.stopwatch = stopwatch or Stopwatch()
        self._programs, self._step, self._backend = programs, step, backend
        self.carried = carried = sharded_shapes(carried, programs.mesh)
        language_model = programs.module.language_model
        inputs = prompts[0].inputs
        self._categories = programs.in_head_order(inputs.head_category)
        self._inputs = inputs
        # Of the devices, added up over the chunks, because they wait for each other in each.
        self._most_blocks, self._mean_blocks = 0.0, 0.0
        images = [image for prompt in prompts for image in prompt.images]
        self._groups_at_once = everywhere = device_count(programs.mesh)
        self.groups = image_groups(
            inputs.architecture, images, backend, image_cache, mesh=programs.mesh
        )
        round_tokens = most_round_tokens(inputs.architecture, images, everywhere)
        devices = size_along(programs.mesh, CONTEXT)
        sizes = sizes.on_devices(devices)
        self.chunks = Chunks(
            prompts,
            layout,
            sizes.chunks_for(layout.rows, uncut_tokens(inputs.architecture)),
            inputs.head_category.shape[1] // language_model.kv_heads,
            feature_rows=sizes.chunks[-1] + round_tokens,
            most_parts=most_parts(backend, language_model.dtype),
            all_outputs=all_outputs,
            devices=devices,
            on_a_mesh=programs.mesh is not None,
        )
        self.features: jax.ShapeDtypeStruct | None = None
        if round_tokens:
            shape = (self.chunks.feature_rows, language_model.embed_tokens.features)
            self.features = jax.ShapeDtypeStruct(shape, language_model.dtype)
        self._images = ImageEncoder(
            programs,
            self.groups,
            self.features,
            self.chunks.feature_row,
            backend,
            cache=image_cache,
            other_bytes=size_in_bytes(carried),
        )
        # Programs are compiled for the shapes of one chunk of each size. `_build` uses it again.
        of_size = {rows: (parts, rows) for parts, rows in self.chunks.borders}
        self._built = {borders[0]: self.chunks.chunk(*borders) for borders in of_size.values()}
        self.stages = [
            *self._images.stages,
            *(Stage("prefill", self.program_of(chunk)) for chunk in self._built.values()),
        ]

    @property
    def imbalance(self) -> float:
        """Greatest over mean of what the devices have computed in attention: see `Stats`."""
        of_rows = self._most_blocks / self._mean_blocks if self._mean_blocks else 1.0
        return of_rows * self._programs.imbalance_of_heads(self._inputs)

    @property
    def reused_images(self) -> int:
        """How many images have been encoded before."""
        return sum(len(group.images) for group in self.groups if group.features)

    def complete_images(self) -> None:
        """Waits for the images that this process reads.

        Raises:
          MessageError: an image cannot be read.
        """
        for group in own_groups(self.groups, self._programs.mesh):
            for image in group.images:
                image.read()

    def run(self, carried: Any) -> Iterator[tuple[Chunk, Any, Any]]:
        """Runs one chunk after the other. Yields each chunk, its result and what is carried on.

        Args:
          carried: what the first chunk is given: the cache, with the tokens that come before the
            prompts' first chunks, alone or with more. It is donated, and so is what is yielded.
        """
        features = None
        groups = self.groups
        part = self.stopwatch.part
        chunks = self._build()
        with part("prefill"):
            if self.features is not None:
                where = replicated(self._programs.mesh)
                features = jnp.zeros(self.features.shape, self.features.dtype, device=where)
            chunk = next(chunks, None)
        while chunk is not None:
            if features is not None:
                ready = rounds_until(groups, chunk.images_end, self._groups_at_once)
                features = self._images.encode(features, groups[:ready], self.stopwatch)
                groups = groups[ready:]
                with part("vision"):
                    jax.block_until_ready(features)
            with part("prefill"):
                arguments = self._all_arguments(chunk, carried, features)
                result, carried = self._program(arguments)(*arguments)
                # The device runs this chunk meanwhile.
                following = next(chunks, None)
                jax.block_until_ready(result)
            if chunk.blocks is not None:
                self._most_blocks += float(chunk.blocks.max())
                self._mean_blocks += float(chunk.blocks.mean())
            yield chunk, result, carried
            chunk = following

    def _build(self) -> Iterator[Chunk]:
        for parts, rows in self.chunks.borders:
            yield self._built.pop(parts, None) or self.chunks.chunk(parts, rows)

    def program_of(self, chunk: Chunk) -> Program:
        """The program that runs a chunk: the same for all chunks of one size."""
        return self._program(self._all_arguments(chunk, self.carried, self.features))

    def _program(self, arguments: tuple[Any, ...]) -> Program:
        return self._programs.get(self._step, arguments, static=(self._backend,), donate=(0,))

    def _all_arguments(self, chunk: Chunk, carried: Any, features: Any) -> tuple[Any, ...]:
        more = self.more_arguments(chunk)
        return (carried, features, chunk.arguments, self._categories, *more)

    def more_arguments(self, chunk: Chunk) -> tuple[Any, ...]:
        """Arguments of the function that runs a chunk, after the head categories.

        A method, because a function that holds this object would keep the pixels of the prompts
        until Python collects garbage.
        """
        return ()


def _what_runs(prompts: Sequence[PlacedPrompt]) -> dict[str, bytes]:
    """What several processes must have in common, by its name."""
    inputs = [prompt.inputs for prompt in prompts]
    images = [image.known_digest() for prompt in prompts for image in prompt.images]
    return {
        "prompt": b"".join(each.token_ids.tobytes() for each in inputs),
        "image": repr(images).encode(),
        "profile": b"".join(each.head_category.tobytes() for each in inputs),
    }


def occurring_tokens(module: ImageTextModel, inputs: ModelInputs) -> Bool[np.ndarray, "vocabulary"]:
    """Which tokens are in a prompt."""
    vocabulary = module.language_model.embed_tokens.num_embeddings
    occurred = np.zeros(vocabulary, bool)
    # The image token needs no embedding, and may be beyond the vocabulary.
    occurred[inputs.token_ids[inputs.token_ids < vocabulary]] = True
    return occurred


class Prefill(ChunkedRun):
    """The stages from prompts to the first tokens of their answers."""

    def __init__(
        self,
        programs: Programs,
        prompts: Sequence[PlacedPrompt],
        layout: CacheLayout,
        settings: Sequence[AnswerSettings],
        backend: str,
        *,
        image_cache: ImageCache | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """Compiles the programs that are needed.

        Args:
          programs: the programs of the model.
          prompts: the prompts, in the order in which they run.
          layout: the shape of the cache.
          settings: how each prompt is answered.
          backend: attention backend.
          image_cache: as for `ChunkedRun`.
          stopwatch: as for `ChunkedRun`.
        """
        self._settings = {id(prompt): each for prompt, each in zip(prompts, settings, strict=True)}
        self._module = programs.module
        super().__init__(
            programs,
            prompts,
            layout,
            prefill,
            backend,
            sizes=sizes_in_use(),
            carried=jax.eval_shape(lambda: DecodeState.empty(programs.module, layout)),
            image_cache=image_cache,
            stopwatch=stopwatch,
        )

    @override
    def more_arguments(self, chunk: Chunk) -> tuple[FirstTokens]:
        most = self.chunks.layout.most_prompts
        vocabulary = self._module.language_model.embed_tokens.num_embeddings
        sequence = np.full(most, PADDING_ROW, np.int32)
        occurred = np.zeros((most, vocabulary), bool)
        settings = [self._settings[id(chunk.parts[0].prompt)]] * most
        for output, part in enumerate(chunk.last_parts):
            sequence[output] = part.prompt.sequence
            occurred[output] = occurring_tokens(self._module, part.prompt.inputs)
            settings[output] = self._settings[id(part.prompt)]
        scored = any(each.top_tokens is not None for each in settings)
        sampling = stacked([each.sampling for each in settings])
        return (FirstTokens(sequence, sampling, occurred, np.bool_(scored)),)

    def first_token(self, state: DecodeState) -> tuple[Chosen, DecodeState]:
        """Runs all chunks of a single prompt; returns the first token and the state.

        Args:
          state: as for `run`.
        """
        *_, (_, chosen, state) = self.run(state)
        return chosen, state
