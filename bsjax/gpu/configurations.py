"""GPUs, and how kernels are compiled for them: tables of block sizes, warps and pipeline stages.

Each package of kernels has a table for its prefill kernel, configurations.json. Every entry says
what it applies to (target, head width, bytes per element, dense or sparse heads) and how it was
chosen: "compiled" by `tools.choose_configurations`, from the compiled code, or "measured" by
`tools.tune`, on a GPU of that kind.
"""

import contextlib
import contextvars
import functools
import json
from collections.abc import Iterator
from importlib import resources
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bsjax.errors import BackendError
from bsjax.gpu.pieces import SHORTEST_SIDE, pieces_of, width_of

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100")
"""Kinds of GPUs that have configurations: A100; RTX 40, L40S; H100, H200; B200."""

WIDTHS = (64, 80, 128, 256)
"""Head widths (of all pieces together) that have configurations; others use the next larger one."""

LARGEST_HEAD_DIM = WIDTHS[-1]

# Without a GPU and without a named target, masks get the block sizes of the most likely GPU.
_DEFAULT_TARGET = "sm_90"

_named_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


class KernelConfiguration(NamedTuple):
    """How one kernel is compiled."""

    block_q: int
    """Query rows of a program; a power of two."""
    block_kv: int
    """Keys of a block; a power of two."""
    num_warps: int
    num_stages: int
    """Blocks of keys and values in shared memory at a time, including the one in use."""


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Within this context, configurations are those of `target`, one of `TARGETS`.

    Raises:
      BackendError: the target is unknown.
    """
    if target not in TARGETS:
        raise BackendError(f"Unknown target {target!r}; choose one of {', '.join(TARGETS)}.")
    token = _named_target.set(target)
    try:
        yield
    finally:
        _named_target.reset(token)


def named_target() -> str | None:
    """The target to compile for, if this is not a GPU in this machine."""
    named = _named_target.get()
    return named or (None if jax.default_backend() == "gpu" else _DEFAULT_TARGET)


def compiles_for_gpus() -> bool:
    """Whether programs are compiled for a GPU: that of `compiling_for`, or this machine's."""
    return _named_target.get() is not None or jax.default_backend() == "gpu"


def target_in_use() -> str:
    """The target of `compiling_for`, or else of the GPU in this machine.

    Raises:
      BackendError: the GPU is not an NVIDIA GPU of the Ampere generation or later.
    """
    named = named_target()
    if named is not None:
        return named
    # ROCm devices report "gfx..." here.
    return target_of(str(getattr(jax.devices()[0], "compute_capability", "")))


def target_of(compute_capability: str) -> str:
    """The target for a GPU of this compute capability, such as "8.6".

    Raises:
      BackendError: it is not that of an NVIDIA GPU of the Ampere generation or later.
    """
    major, _, minor = compute_capability.partition(".")
    match int(major) if major.isdigit() else 0:
        case 8:
            return "sm_80" if minor == "0" else "sm_89"
        case 9:
            return "sm_90"
        case 10 | 11:
            return "sm_100"
        case generation if generation >= 12:
            # Consumer Blackwell has the shared memory and the tensor core instructions of Ada.
            return "sm_89"
    raise BackendError(
        f"The GPU kernel needs an NVIDIA GPU of compute capability 8.0 or later, not "
        f"{compute_capability or 'this one'}: use backend='xla'."
    )


class ConfigurationTable:
    """The configurations of one package's prefill kernel, from its configurations.json."""

    def __init__(self, package: str) -> None:
        self._package = package

    def default_blocks(self, head_dim: int, dtype: DTypeLike, *, sparse: bool) -> tuple[int, int]:
        """The best (block_q, block_kv) of a schedule for heads of `head_dim` elements of `dtype`.

        Args:
          head_dim: up to 256.
          dtype: bfloat16, float16 or float32.
          sparse: whether any head is sparse. All heads of a launch share their block sizes.

        Raises:
          BackendError: the kernel does not support the head dimension or dtype.
        """
        chosen = self._tabled(target_in_use(), head_dim, dtype, sparse=sparse)
        return chosen.block_q, chosen.block_kv

    def configuration(
        self, head_dim: int, dtype: DTypeLike, block_q: int, block_kv: int
    ) -> KernelConfiguration:
        """How the kernel is compiled for a schedule of these block sizes.

        For the sizes of `default_blocks`, this is the table's entry. Larger blocks are visited in
        steps of the table's size; smaller ones get fewer warps.

        Raises:
          BackendError: the kernel does not support the head dimension or dtype.
        """
        target = target_in_use()
        for sparse in (True, False):
            tabled = self._tabled(target, head_dim, dtype, sparse=sparse)
            if (block_q, block_kv) == (tabled.block_q, tabled.block_kv):
                return tabled
        tabled = self._tabled(target, head_dim, dtype, sparse=True)
        rows = min(block_q, tabled.block_q)
        # As many rows per warp as in the table.
        warps = max(4, tabled.num_warps * rows // tabled.block_q)
        return KernelConfiguration(rows, min(block_kv, tabled.block_kv), warps, tabled.num_stages)

    def checked_configuration(
        self,
        head_dim: int,
        dtype: DTypeLike,
        block_q: int,
        block_kv: int,
        given: KernelConfiguration | None,
    ) -> KernelConfiguration:
        """The configuration that is given, or else that of `configuration`, if it can run.

        Args:
          head_dim: channels of a head.
          dtype: dtype of queries, keys and values.
          block_q: query rows of a tile of the schedule.
          block_kv: keys of a block of the schedule.
          given: how to compile, for tuning; None for the table's.

        Raises:
          BackendError: the kernel does not support the block sizes, head dimension or dtype.
        """
        for name, block in (("block_q", block_q), ("block_kv", block_kv)):
            if block < SHORTEST_SIDE or block & (block - 1):
                raise BackendError(
                    f"The GPU kernel needs {name} to be a power of two of at least "
                    f"{SHORTEST_SIDE}, got {block}: build the mask with the sizes of "
                    f"`{self._package}.configurations.default_blocks`."
                )
        check_supported(head_dim, dtype)
        chosen = given or self.configuration(head_dim, dtype, block_q, block_kv)
        if block_kv % chosen.block_kv or block_q % chosen.block_q:
            raise BackendError(
                f"A kernel of {chosen.block_q} x {chosen.block_kv} cannot run a schedule of "
                f"{block_q} x {block_kv}: its block sizes must divide the schedule's."
            )
        return chosen

    def _tabled(
        self, target: str, head_dim: int, dtype: DTypeLike, *, sparse: bool
    ) -> KernelConfiguration:
        check_supported(head_dim, dtype)
        heads = "sparse" if sparse else "dense"
        return self._entries[target, table_width(head_dim), jnp.dtype(dtype).itemsize, heads]

    @functools.cached_property
    def _entries(self) -> dict[tuple[str, int, int, str], KernelConfiguration]:
        text = resources.files(self._package).joinpath("configurations.json").read_text()
        return {
            (entry["target"], entry["width"], entry["bytes"], entry["heads"]): KernelConfiguration(
                *(entry[field] for field in KernelConfiguration._fields)
            )
            for entry in json.loads(text)["entries"]
        }


def table_width(head_dim: int) -> int:
    """The width in the table for heads of `head_dim` elements, up to `LARGEST_HEAD_DIM`."""
    return next(width for width in WIDTHS if width >= width_of(pieces_of(head_dim)))


def check_supported(head_dim: int, dtype: DTypeLike) -> None:
    """Does nothing if the GPU kernels support heads of `head_dim` elements of `dtype`.

    Raises:
      BackendError: they do not.
    """
    element = jnp.dtype(dtype)
    if element not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise BackendError(
            f"The GPU kernel computes in bfloat16, float16 or float32, not in {element}."
        )
    if not 1 <= head_dim <= LARGEST_HEAD_DIM:
        raise BackendError(
            f"The GPU kernel supports head dimensions up to {LARGEST_HEAD_DIM}, got {head_dim}."
        )
