"""The attention implementations that are compared, behind one interface.

All variants of a workload get the same random q, k and v. Random rows have no order of their own,
so they serve as rows in packed order and in prompt order, and nothing has to be permuted. The
expected output of a variant follows from its mask and from the order of its rows.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_arrays import Arrays
from benchmarks.dense_rows import dense_rows
from benchmarks.device_timing import Sampler, jax_sampler, repeated, repeats_for
from benchmarks.kernels import problem_of
from benchmarks.workloads import HeadMask, Workload
from bsjax.attention import GPU_KERNELS, block_sizes, ragged_attention
from bsjax.masks.schedule import build_schedule, category_tables
from bsjax.masks.visibility import TokenInfo, Visibility

BSJAX, FLEX, FLEX_PACKED = "bsjax", "FlexAttention", "FlexAttention, packed order"
CUDNN, JAX_XLA, TOKAMAX, SDPA = "cuDNN", "jax.nn, XLA", "tokamax", "torch SDPA"


def bsjax_name(backend: str) -> str:
    """How the variant is called that is bsjax with a backend."""
    return f"{BSJAX}, {backend}"


class NotAvailable(Exception):
    """A variant cannot run here; the message says why, and goes into the table."""


class Prepared(Protocol):
    """A variant that is compiled for its arrays."""

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Runs once; returns these rows of the output, float32 [rows, q_heads, head_dim]."""
        ...

    def sampler(self) -> Sampler: ...


@dataclass(frozen=True)
class Variant:
    """One implementation on one mask."""

    name: str
    mask: HeadMask
    visibility: Visibility
    order: np.ndarray
    """int32 [tokens], the prompt index of each of its rows."""
    prepare: Callable[[Arrays], Prepared]
    """Compiles the variant. Raises NotAvailable if it cannot run here, and otherwise whatever the
    implementation raises."""
    note: str = ""
    """What the variant computes, if that is not the workload's mask."""


def wanted_rows(
    workload: Workload,
    mask: HeadMask,
    arrays: Arrays,
    order: np.ndarray,
    rows: np.ndarray,
    *,
    visibility: Visibility | None = None,
) -> np.ndarray:
    """The expected values of `rows` of the output, float32 [rows, q_heads, head_dim].

    Args:
      workload: shape and prompt.
      mask: categories of all heads.
      arrays: q, k and v, with rows in `order`.
      order: int32 [tokens], the prompt index of each row.
      rows: indices of the rows.
      visibility: the visibility that the implementation computes; by default the workload's.
    """
    shape = workload.shape
    info = TokenInfo(*(part[order] for part in workload.template.info))
    out, _ = dense_rows(
        arrays.q[rows],
        arrays.k,
        arrays.v,
        TokenInfo(*(part[rows] for part in info)),
        info,
        np.asarray([category.groups for category in mask.categories], np.int32),
        visibility or shape.visibility,
        scale=shape.head_dim**-0.5,
    )
    return np.asarray(out)


def variants(
    workload: Workload, masks: list[HeadMask], *, backends: Sequence[str], torch: bool
) -> list[Variant]:
    """All variants of a workload: dense implementations first, then those that take masks.

    Args:
      workload: shape and prompt.
      masks: masks for the sparse implementations. DENSE is added if it is missing, because the
        others are compared with it.
      backends: those of bsjax.
      torch: whether to include PyTorch.
    """
    on_gpu = jax.default_backend() == "gpu"
    dense = next((mask for mask in masks if mask.is_dense), None) or workload.masks(["DENSE"])[0]
    masks = [dense, *(mask for mask in masks if not mask.is_dense)]
    chosen = [
        _dense_jax(workload, dense, CUDNN, _cudnn) if on_gpu else None,
        None if on_gpu else _dense_jax(workload, dense, JAX_XLA, _jax_xla),
        _dense_jax(workload, dense, TOKAMAX, _tokamax) if on_gpu else None,
        _torch_sdpa(workload, dense) if torch else None,
        *(_bsjax(workload, mask, backend) for backend in backends for mask in masks),
    ]
    if torch and on_gpu:
        for mask in masks:
            chosen.append(_flex(workload, mask, packed=False))
            if not mask.is_dense:
                chosen.append(_flex(workload, mask, packed=True))
    return [variant for variant in chosen if variant is not None]


def _variant(
    workload: Workload, name: str, mask: HeadMask, order: np.ndarray, prepare: Any
) -> Variant:
    return Variant(name, mask, workload.shape.visibility, order, prepare)


def _causal(variant: Variant) -> Variant:
    """`variant` without bidirectional images, for implementations that do not support them."""
    if not variant.visibility.bidirectional_images:
        return variant
    causal = Visibility(window=variant.visibility.window)
    return replace(variant, visibility=causal, note="causal inside images too")


@dataclass(frozen=True)
class _PreparedJax:
    """A jitted JAX function of q and other arrays."""

    attend: Callable[..., jax.Array]
    looped: Callable[..., jax.Array]
    repeats: int
    arguments: tuple[Any, ...]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.attend(*self.arguments)[rows].astype(jnp.float32))

    def sampler(self) -> Sampler:
        return jax_sampler(lambda: self.looped(*self.arguments), self.repeats)


@functools.cache
def _jitted(function: Callable[..., jax.Array], repeats: int) -> Callable[..., jax.Array]:
    return jax.jit(repeated(function, repeats))


def _prepared_jax(
    function: Callable[..., jax.Array], arguments: tuple[Any, ...], flops: int
) -> _PreparedJax:
    repeats = repeats_for(flops)
    return _PreparedJax(_jitted(function, 1), _jitted(function, repeats), repeats, arguments)


def _bsjax(workload: Workload, mask: HeadMask, backend: str) -> Variant:
    """bsjax's attention on packed rows, with the schedule as an argument of the jitted function."""
    shape, name = workload.shape, bsjax_name(backend)
    problem = problem_of(backend) if backend in GPU_KERNELS else None
    if problem is not None:

        def cannot_run(_: Arrays) -> Prepared:
            raise NotAvailable(problem)

        return _variant(
            workload, name, mask, np.arange(workload.tokens, dtype=np.int32), cannot_run
        )
    blocks = block_sizes(backend, shape.head_dim, shape.dtype, sparse=not mask.is_dense)
    schedule = build_schedule(
        workload.template,
        category_tables(mask.categories),
        block_q=blocks[0],
        block_kv=blocks[1],
        visibility=shape.visibility,
    )

    def prepare(arrays: Arrays) -> Prepared:
        on_device = jax.device_put((schedule, np.asarray(mask.categories, np.int32)))
        flops = workload.flops(workload.visible_pairs(mask))
        attend = _bsjax_attention(shape.head_dim**-0.5, backend)
        return _prepared_jax(attend, (arrays.q, arrays.k, arrays.v, *on_device), flops)

    return _variant(workload, name, mask, np.asarray(schedule.queries.position), prepare)


@functools.cache
def _bsjax_attention(scale: float, backend: str) -> Callable[..., jax.Array]:
    """One function for all masks, so that masks of the same shapes share a compiled program."""
    return functools.partial(ragged_attention, scale=scale, backend=backend)


def _dense_jax(
    workload: Workload,
    mask: HeadMask,
    name: str,
    implementation: Callable[[int | None], Callable[..., jax.Array]],
) -> Variant:
    def prepare(arrays: Arrays) -> Prepared:
        attend = implementation(workload.shape.visibility.window)
        return _prepared_jax(attend, (arrays.q, arrays.k, arrays.v), workload.dense_flops)

    order = np.arange(workload.tokens, dtype=np.int32)
    return _causal(_variant(workload, name, mask, order, prepare))


@functools.cache
def _cudnn(window: int | None) -> Callable[..., jax.Array]:
    return functools.partial(_jax_nn, "cudnn", window)


@functools.cache
def _jax_xla(window: int | None) -> Callable[..., jax.Array]:
    return functools.partial(_jax_nn, "xla", window)


def _jax_nn(
    implementation: Any, window: int | None, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    return jax.nn.dot_product_attention(
        q[None],
        k[None],
        v[None],
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )[0]


@functools.cache
def _tokamax(window: int | None) -> Callable[..., jax.Array]:
    if importlib.util.find_spec("tokamax") is None:
        raise NotAvailable("tokamax is not installed")
    tokamax: Any = importlib.import_module("tokamax")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        # Its third implementation, plain XLA, would hold the whole score matrix.
        return tokamax.dot_product_attention(
            q[None],
            k[None],
            v[None],
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=("mosaic", "triton"),
        )[0]

    return attend


def _torch_module() -> Any:
    if importlib.util.find_spec("torch") is None:
        raise NotAvailable("torch is not installed")
    from benchmarks import torch_variants

    return torch_variants


def _torch_sdpa(workload: Workload, mask: HeadMask) -> Variant:
    def prepare(arrays: Arrays) -> Prepared:
        if workload.shape.visibility.window is not None:
            raise NotAvailable("a window would need a mask of tokens x tokens")
        return _torch_module().prepare_sdpa(arrays)

    order = np.arange(workload.tokens, dtype=np.int32)
    return _causal(_variant(workload, SDPA, mask, order, prepare))


def _flex(workload: Workload, mask: HeadMask, *, packed: bool) -> Variant:
    order = np.arange(workload.tokens, dtype=np.int32)
    if packed:
        order = workload.template.packed_order

    def prepare(arrays: Arrays) -> Prepared:
        module = _torch_module()
        if not module.sees_gpu():
            raise NotAvailable("torch sees no GPU")
        return module.prepare_flex(arrays, workload, mask, packed=packed)

    return _variant(workload, FLEX_PACKED if packed else FLEX, mask, order, prepare)
