"""Prefill attention on GPUs: one program per tile of query rows and head.

                       keys, in schedule order
                 text            sinks     image 3          the tile's ranges
               . F F F F F p . . p p . . F F F F p .         full     [1, 6)   [13, 17)
    tile ->    . F F F F F p . . p p . . F F F F p .         partial  [6, 7)   [9, 11)  [17, 18)
               . F F F F F p . . p p . . F F F F p .

One column is a block of `block_kv` keys. In F blocks every row of the tile sees every key: one
pipelined loop walks them all, across ranges, and evaluates no mask. In p blocks the predicate
decides pair by pair, and the last block of a range is cut at the range's end. Blocks in no range
(.) are never read. The walk is three scalars, carried through both loops: which range, where the
next block starts, where the range ends.

All heads of all categories run in one launch. The grid's first axis, which runs fastest, is the
head: the query heads that share a key head then read the same keys at about the same time, from L2.
The second axis is the tile, and schedules stand longest first; where a tile has more rows than the
registers hold, several programs share it.

No read of keys or values is masked by rows: the pipelined loops then copy them to shared memory
without detours, and Triton's allocator of shared memory as of JAX 0.12 does not return from the
combination of masked reads and the predicate's.

Offsets: Pallas computes an array's offsets in 64 bits once the array has more than 2**32 bytes.
Below that, elements of two bytes or more have indices under 2**31, which 32 bits hold.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from bsjax.errors import BackendError
from bsjax.masks.schedule import Schedule
from bsjax.masks.visibility import KeyVisibility, TokenInfo, Visibility, key_visibility, sees
from bsjax.pallas import configurations
from bsjax.pallas.configurations import KernelConfiguration
from bsjax.pallas.exponential import LOG2_E, scaled_exp2
from bsjax.pallas.pieces import SHORTEST_SIDE, Piece, pieces_of, width_of


def prefill_attention(
    q: Float[Array, "tokens q_heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    schedule: Schedule,
    head_category: Int[Array, "q_heads"],
    *,
    scale: float,
    return_lse: bool = False,
    interpret: bool = False,
    configuration: KernelConfiguration | None = None,
) -> (
    Float[Array, "tokens q_heads head_dim"]
    | tuple[Float[Array, "tokens q_heads head_dim"], Float[Array, "tokens q_heads"]]
):
    """Block-sparse attention over a whole prompt, for NVIDIA GPUs.

    Args:
      q: queries, rows in the schedule's order; bfloat16, float16 or float32.
      k: keys, of the dtype of `q`. Query head h reads key head h // (q_heads // kv_heads). All
        finite, as `v`: padding rows, and rows that no query sees, too.
      v: values, of the shape and dtype of `k`.
      schedule: which blocks to visit; both block sizes powers of two, 16 or more.
      head_category: int32, the schedule's table that each query head uses.
      scale: factor of the scores, above 0.
      return_lse: whether to return the log-sum-exp of the scores too.
      interpret: run on any device in plain JAX, slowly, for tests.
      configuration: how to compile, for tuning; its block sizes divide the schedule's. By default
        what `configurations.configuration` says.

    Returns:
      Attention output in the dtype of `q`; with `return_lse` also the natural log-sum-exp of every
      row's scores, float32 [tokens, q_heads]. A row that sees no key, a padding row too, yields
      zeros and -inf. Sums are in float32; float32 inputs are multiplied in float32, not in TF32.

    Raises:
      BackendError: shapes, dtypes, block sizes or scale are not those named above.
    """
    _check(q, k, v, schedule, head_category, scale)
    tokens, q_heads, head_dim = q.shape
    group = q_heads // k.shape[1]
    pieces = pieces_of(head_dim)
    width = width_of(pieces)
    if configuration is None:
        configuration = configurations.configuration(
            head_dim, q.dtype, schedule.block_q, schedule.block_kv
        )
    if schedule.block_kv % configuration.block_kv or schedule.block_q % configuration.block_q:
        raise BackendError(
            f"A kernel of {configuration.block_q} x {configuration.block_kv} cannot run a schedule "
            f"of {schedule.block_q} x {schedule.block_kv}."
        )
    programs_per_tile = schedule.block_q // configuration.block_q
    settings = _Settings(
        pieces=pieces,
        block_q=configuration.block_q,
        programs_per_tile=programs_per_tile,
        block_kv=configuration.block_kv,
        steps_per_block=schedule.block_kv // configuration.block_kv,
        visibility=schedule.visibility,
        scale=scale,
        interpret=interpret,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )

    groups = jnp.asarray(schedule.groups)[:, None]
    info = TokenInfo(*(jnp.asarray(field)[None, :] for field in schedule.info))
    keys = key_visibility(info, groups, schedule.visibility)
    # Blocks of keys are read whole, so a prompt shorter than one is padded to it; no other is.
    missing = max(0, configuration.block_kv - tokens)
    k, v = (jnp.pad(array, ((0, missing), (0, 0), (0, 0))) for array in (k, v))
    keys = KeyVisibility(*(jnp.pad(field, ((0, 0), (0, missing))) for field in keys))

    def of_head(rows: int, heads_per_row: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, None, width), lambda head, tile: (0, head // heads_per_row, 0))

    row_of_head = pl.BlockSpec((tokens, None), lambda head, tile: (0, head))
    whole = pl.BlockSpec()
    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    out_specs = [of_head(tokens, 1)]
    if return_lse:
        out_shape.append(jax.ShapeDtypeStruct((tokens, q_heads), jnp.float32))
        out_specs.append(row_of_head)
    outputs = pl.pallas_call(
        functools.partial(_attend_tile, settings),
        out_shape=out_shape,
        grid=(q_heads, schedule.tiles.shape[1] * programs_per_tile),
        in_specs=[of_head(tokens, 1)] + [of_head(k.shape[0], group)] * 2 + [whole] * 7,
        out_specs=out_specs,
        compiler_params=pltriton.CompilerParams(
            num_warps=configuration.num_warps, num_stages=configuration.num_stages
        ),
        interpret=interpret,
        name="prefill_attention",
    )(
        q,
        k,
        v,
        keys.position[0],
        keys.image[0],
        keys.own_from,
        keys.other_from,
        jnp.asarray(head_category),
        jnp.asarray(schedule.tiles),
        jnp.asarray(schedule.ranges),
    )
    return tuple(outputs) if return_lse else outputs[0]


class _Settings(NamedTuple):
    """What the kernel is specialised for, beyond shapes."""

    pieces: tuple[Piece, ...]
    block_q: int
    programs_per_tile: int
    block_kv: int
    steps_per_block: int
    """Of the kernel, to walk one of the schedule's blocks."""
    visibility: Visibility
    scale: float
    interpret: bool
    precision: jax.lax.Precision | None


class _Walk(NamedTuple):
    """Where the next block of keys is."""

    range_index: Any
    start: Any
    end: Any


class _Softmax(NamedTuple):
    """A softmax over the keys met so far, in powers of two: scores are scaled by log2(e) too."""

    maximum: Any
    """float32 [block_q]"""
    total: Any
    """float32 [block_q]: sum of exp2(score - maximum)"""
    weighted: Any
    """for each piece of the head, float32 [block_q, size]: sum of exp2(score - maximum) * value"""


def _attend_tile(
    settings: _Settings,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    position_ref: Any,
    image_ref: Any,
    own_from_ref: Any,
    other_from_ref: Any,
    category_ref: Any,
    tiles_ref: Any,
    ranges_ref: Any,
    out_ref: Any,
    lse_ref: Any = None,
) -> None:
    """One program: the attention of a tile's rows, or a part of them, for one head."""
    table = category_ref[pl.program_id(0)]
    tile = jax.lax.div(pl.program_id(1), settings.programs_per_tile)
    first_row, rows, first_range, full_blocks, partial_blocks = (
        tiles_ref[table, tile, column] for column in range(5)
    )
    earlier_rows = jax.lax.rem(pl.program_id(1), settings.programs_per_tile) * settings.block_q
    first_row, rows = first_row + earlier_rows, rows - earlier_rows

    to_log2 = settings.scale * LOG2_E

    def load(ref: Any, start: Any, size: int, inside: Any) -> list[Any]:
        """Rows of one head, piece by piece."""
        rows_and_columns = [
            (
                ref.at[pl.ds(start, size), pl.ds(piece.start, piece.size)],
                _both(None if inside is None else inside[:, None], piece.inside),
            )
            for piece in settings.pieces
        ]
        return [
            pltriton.load(part, mask=mask, other=None if mask is None else 0.0)
            for part, mask in rows_and_columns
        ]

    def product(left: Any, right: Any) -> Any:
        return jnp.dot(
            left, right, precision=settings.precision, preferred_element_type=jnp.float32
        )

    def scores_of(queries: list[Any], keys: list[Any]) -> Any:
        return sum(product(q_part, k_part.T) for q_part, k_part in zip(queries, keys, strict=True))

    def attend(softmax: _Softmax, scores: Any, values: list[Any]) -> _Softmax:
        # The maximum starts finite, so that a row which has seen nothing subtracts no infinities.
        maximum = jnp.maximum(softmax.maximum, scores.max(axis=1) * to_log2)
        weights = scaled_exp2(scores, to_log2, -maximum[:, None], interpret=settings.interpret)
        rescale = jnp.exp2(softmax.maximum - maximum)
        return _Softmax(
            maximum,
            softmax.total * rescale + weights.sum(axis=1),
            tuple(
                weighted * rescale[:, None] + product(weights.astype(part.dtype), part)
                for weighted, part in zip(softmax.weighted, values, strict=True)
            ),
        )

    def advance(step: Any, walk: _Walk) -> _Walk:
        start = walk.start + settings.block_kv
        done = start >= walk.end
        if settings.steps_per_block > 1:
            # A range's last block is walked to its end, past the range's, where it is masked.
            done &= jax.lax.rem(step + 1, settings.steps_per_block) == 0
        range_index = jnp.where(done, walk.range_index + 1, walk.range_index)
        return _Walk(
            range_index,
            jnp.where(done, ranges_ref[table, range_index, 0], start),
            ranges_ref[table, range_index, 1],
        )

    @pl.when(rows > 0)
    def _() -> None:
        inside_tile = jnp.arange(settings.block_q) < rows
        queries = load(q_ref, first_row, settings.block_q, inside_tile)
        query_position, query_image = (
            pltriton.load(ref.at[pl.ds(first_row, settings.block_q)], mask=inside_tile, other=0)[
                :, None
            ]
            for ref in (position_ref, image_ref)
        )
        last_start = k_ref.shape[0] - settings.block_kv

        def full_block(step: Any, carry: tuple[_Walk, _Softmax]) -> tuple[_Walk, _Softmax]:
            walk, softmax = carry
            keys = load(k_ref, walk.start, settings.block_kv, None)
            values = load(v_ref, walk.start, settings.block_kv, None)
            softmax = attend(softmax, scores_of(queries, keys), values)
            return advance(step, walk), softmax

        def partial_block(step: Any, carry: tuple[_Walk, _Softmax]) -> tuple[_Walk, _Softmax]:
            walk, softmax = carry
            # A block that would reach beyond the last row is read from further up, not masked.
            first_key = jnp.minimum(walk.start, last_start)
            rows_of_keys = first_key + jnp.arange(settings.block_kv)
            in_block = (rows_of_keys >= walk.start) & (rows_of_keys < walk.end)
            keys = load(k_ref, first_key, settings.block_kv, None)
            values = load(v_ref, first_key, settings.block_kv, None)
            block = pl.ds(first_key, settings.block_kv)
            key_visibility = KeyVisibility(
                *(
                    pltriton.load(part)[None, :]
                    for part in (
                        position_ref.at[block],
                        image_ref.at[block],
                        own_from_ref.at[table, block],
                        other_from_ref.at[table, block],
                    )
                )
            )
            seen = in_block[None, :] & sees(
                query_position, query_image, key_visibility, settings.visibility
            )
            scores = jnp.where(seen, scores_of(queries, keys), -jnp.inf)
            return advance(step, walk), attend(softmax, scores, values)

        walk = _Walk(
            first_range, ranges_ref[table, first_range, 0], ranges_ref[table, first_range, 1]
        )
        softmax = _Softmax(
            jnp.full((settings.block_q,), jnp.finfo(jnp.float32).min),
            jnp.zeros((settings.block_q,), jnp.float32),
            tuple(
                jnp.zeros((settings.block_q, piece.size), jnp.float32) for piece in settings.pieces
            ),
        )
        carry = jax.lax.fori_loop(
            0, full_blocks * settings.steps_per_block, full_block, (walk, softmax)
        )
        _, softmax = jax.lax.fori_loop(
            0, partial_blocks * settings.steps_per_block, partial_block, carry
        )

        total = jnp.where(softmax.total > 0, softmax.total, 1.0)
        for piece, weighted in zip(settings.pieces, softmax.weighted, strict=True):
            pltriton.store(
                out_ref.at[pl.ds(first_row, settings.block_q), pl.ds(piece.start, piece.size)],
                (weighted / total[:, None]).astype(out_ref.dtype),
                mask=_both(inside_tile[:, None], piece.inside),
            )
        if lse_ref is not None:
            lse = (softmax.maximum + jnp.log2(total)) / LOG2_E
            pltriton.store(
                lse_ref.at[pl.ds(first_row, settings.block_q)],
                jnp.where(softmax.total > 0, lse, -jnp.inf),
                mask=inside_tile,
            )


def _both(rows: Any, columns: Any) -> Any:
    """The mask of a block whose rows and columns are masked; None masks nothing."""
    if rows is None or columns is None:
        return columns if rows is None else rows
    return rows & columns


def _check(
    q: Array, k: Array, v: Array, schedule: Schedule, head_category: Array, scale: float
) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape:
        raise BackendError(
            "The GPU kernel takes q [tokens, q_heads, head_dim] and k, v [tokens, kv_heads, "
            f"head_dim], got q {q.shape}, k {k.shape}, v {v.shape}."
        )
    if not q.shape[0] == k.shape[0] == schedule.tokens or q.shape[2] != k.shape[2]:
        raise BackendError(
            f"q {q.shape} and k {k.shape} must have the schedule's {schedule.tokens} rows and one "
            "head dimension."
        )
    if q.shape[1] % k.shape[1] or head_category.shape != (q.shape[1],):
        raise BackendError(
            f"{q.shape[1]} query heads need a divisor of that as key heads, got {k.shape[1]}, and "
            f"a head_category each, got shape {head_category.shape}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise BackendError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    for name, block in (("block_q", schedule.block_q), ("block_kv", schedule.block_kv)):
        if block < SHORTEST_SIDE or block & (block - 1):
            raise BackendError(
                f"The GPU kernel needs {name} to be a power of two of at least {SHORTEST_SIDE}, "
                f"got {block}: build the mask with the sizes of `bsjax.pallas.default_blocks`."
            )
    if not scale > 0:
        raise BackendError(f"The scale of attention scores must be above 0, got {scale}.")
