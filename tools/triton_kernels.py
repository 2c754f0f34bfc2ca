"""Reports on the Triton kernels of a program, for GPUs that the machine need not have.

jax-triton compiles each kernel to PTX while the program is lowered, and puts it into the program
with everything that its launch needs. NVIDIA's assembler and disassembler report on the PTX, as in
`tools.gpu_targets`.
"""

import dataclasses
import hashlib
import importlib.metadata
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bsjax.gpu.configurations import KernelConfiguration, compiling_for
from bsjax.masks.schedule import KeyRange
from bsjax.masks.transposed import BLOCK, KeyTile, TransposedSchedule
from bsjax.masks.visibility import CAUSAL, Visibility
from bsjax.triton import configurations
from bsjax.triton.backward import attention_gradients
from bsjax.triton.decode import decode_attention
from bsjax.triton.gradient_configurations import gradient_configuration
from bsjax.triton.prefill import prefill_attention
from tools import compiled_kernels
from tools.compiled_kernels import DecodeKernel, PrefillKernel, decode_kernel, prefill_kernel
from tools.gpu_targets import TARGETS, KernelReport, assembled, lowered

_MASK_BLOCKS = (128, 64)
"""The blocks that a `BlockMask` has by default."""


class TritonLaunch(NamedTuple):
    """One kernel of a lowered program, and how it is launched."""

    name: str
    grid: tuple[int, int, int]
    warps: int
    shared_memory: int
    """Bytes of one block."""
    pointers: int
    """Parameters that the launcher is given; it appends one for scratch memory."""
    ptx: str

    @property
    def parameters(self) -> int:
        """Parameters that the kernel has."""
        entry = self.ptx[self.ptx.index(".visible .entry") :]
        return entry[: entry.index("\n)")].count(".param")

    def report(self, gpu: str) -> KernelReport:
        """What the assembler says about the kernel."""
        target = TARGETS[gpu]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.ptx"
            file.write_text(self.ptx)
            ((registers, spilled, sass),) = assembled(file, target.architecture).values()
        return KernelReport(
            self.grid, 32 * self.warps, self.shared_memory, registers, spilled, self.ptx, sass
        )


def triton_launches(
    function: Callable[..., Any], arguments: tuple[Any, ...], gpu: str
) -> list[TritonLaunch]:
    """The Triton kernels of a program, in order; arguments as in `gpu_targets.compile_for`."""
    with compiling_for(compiled_kernels.target_name(gpu)):
        module: Any = lowered(function, arguments, gpu).compiler_ir("stablehlo")
    return [
        _launch(zlib.decompress(_message(operation.attributes)))
        for operation in _operations(module.operation)
        if operation.name == "stablehlo.custom_call"
        and "triton_kernel_call" in str(operation.attributes["call_target_name"])
    ]


def triton_reports(
    function: Callable[..., Any], arguments: tuple[Any, ...], gpu: str
) -> dict[str, KernelReport]:
    """Compiles the Triton kernels of a program and reports on them, by name."""
    return {each.name: each.report(gpu) for each in triton_launches(function, arguments, gpu)}


def triton_digest(function: Callable[..., Any], arguments: tuple[Any, ...], gpu: str) -> str:
    """SHA-256 of everything that determines the Triton kernels of a program, without compiling."""
    packages = ("jax", "triton", "jax-triton", "nvidia-cuda-nvcc-cu12")
    determining: list[Any] = [importlib.metadata.version(package) for package in packages]
    with compiling_for(compiled_kernels.target_name(gpu)):
        program: Any = jax.make_jaxpr(function)(*arguments)
    for call in _calls(program.jaxpr):
        parameters = dict(call.params)
        kernel = parameters.pop("fn")
        types = [value.aval.dtype for value in (*call.invars, *call.outvars)]
        determining += [kernel.cache_key, types, sorted(parameters.items())]
    return hashlib.sha256("\n".join(map(str, determining)).encode()).hexdigest()


def kernel_names(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[str]:
    """The names of the Triton kernels that a program calls, in order, without compiling."""
    program: Any = jax.make_jaxpr(function)(*arguments)
    return [str(call.params["name"]) for call in _calls(program.jaxpr)]


def kernel_constants(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> list[dict[str, Any]]:
    """The constants of each Triton kernel that a program calls, in order, without compiling."""
    program: Any = jax.make_jaxpr(function)(*arguments)
    # jax-triton 0.4 keeps them apart from its own parameters.
    every = [dict(call.params) for call in _calls(program.jaxpr)]
    return [{**each, **each.get("metaparams", {})} for each in every]


def default_prefill(
    gpu: str, head_dim: int, dtype: str, *, sparse: bool = True
) -> KernelConfiguration:
    """The table's configuration of the Triton kernel for a GPU."""
    with compiling_for(compiled_kernels.target_name(gpu)):
        blocks = configurations.default_blocks(head_dim, dtype, sparse=sparse)
        return configurations.configuration(head_dim, dtype, *blocks)


def triton_prefill(
    gpu: str,
    head_dim: int,
    dtype: str,
    *,
    chosen: KernelConfiguration | None = None,
    blocks: tuple[int, int] | None = None,
    sparse: bool = True,
    **options: Any,
) -> PrefillKernel:
    """The Triton prefill kernel, to be compiled; arguments as in `compiled_kernels`."""
    with compiling_for(compiled_kernels.target_name(gpu)):
        if blocks is None:
            blocks = chosen[:2] if chosen else None
            blocks = blocks or configurations.default_blocks(head_dim, dtype, sparse=sparse)
        running = chosen or configurations.configuration(head_dim, dtype, *blocks)
    kernel = prefill_kernel(gpu, head_dim, dtype, chosen=running, blocks=blocks, **options)

    def attend(*arguments):
        return prefill_attention(*arguments, scale=head_dim**-0.5, configuration=running)

    return kernel._replace(function=attend)


def triton_decode(gpu: str, head_dim: int, dtype: str, **options: Any) -> DecodeKernel:
    """The Triton decode kernels, to be compiled; arguments as in `compiled_kernels`."""

    def attend(*arguments):
        return decode_attention(*arguments, scale=head_dim**-0.5)

    return decode_kernel(gpu, head_dim, dtype, **options)._replace(function=attend)


def gradient_configurations(
    gpu: str, head_dim: int, dtype: str, *, windowed: bool = False
) -> dict[str, KernelConfiguration]:
    """How the kernels of the gradients are compiled, by name, for a mask with its own blocks."""
    with compiling_for(compiled_kernels.target_name(gpu)):
        return {
            "query_gradients": gradient_configuration(
                "queries", head_dim, dtype, *_MASK_BLOCKS, windowed=windowed
            ),
            "key_gradients": gradient_configuration(
                "keys", head_dim, dtype, BLOCK, BLOCK, windowed=windowed
            ),
        }


def triton_gradients(
    gpu: str,
    head_dim: int,
    dtype: str,
    *,
    tokens: int = 36_864,
    visibility: Visibility = CAUSAL,
    **options: Any,
) -> PrefillKernel:
    """The kernels of the gradients of `sparse_attention`, to be compiled.

    Args:
      gpu: a key of `gpu_targets.TARGETS`.
      head_dim: channels per head.
      dtype: dtype of queries, keys and values.
      tokens: query rows and key rows.
      visibility: visibility of the schedule.
      options: more arguments of `prefill_kernel`.
    """
    windowed = visibility.window is not None
    chosen = gradient_configurations(gpu, head_dim, dtype, windowed=windowed)
    forward = prefill_kernel(
        gpu,
        head_dim,
        dtype,
        blocks=_MASK_BLOCKS,
        tokens=tokens,
        visibility=visibility,
        whole=True,
        **options,
    )
    q, k, _, schedule, head_category = forward.arguments
    tables, _, _ = schedule.tile_columns.shape
    entries = 3 * tokens // BLOCK // 2

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    transposed = TransposedSchedule(
        integers(tables, entries, len(KeyTile._fields)),
        integers(4 * tables * entries, len(KeyRange._fields)),
        block_q=BLOCK,
        block_kv=BLOCK,
    )
    k = jax.ShapeDtypeStruct((1, *k.shape), dtype)
    lse = jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)
    schedule = dataclasses.replace(schedule, transposed=transposed)

    def gradients(*arguments):
        return attention_gradients(
            *arguments,
            scale=head_dim**-0.5,
            of_queries=chosen["query_gradients"],
            of_keys=chosen["key_gradients"],
        )

    arguments = (q, k, k, schedule, head_category, integers(), q, lse, q, lse)
    return PrefillKernel(gradients, arguments, gpu, forward.grid)


def _calls(program: Any) -> Iterator[Any]:
    for equation in program.eqns:
        if equation.primitive.name == "triton_kernel_call":
            yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from _calls(inner)


def _operations(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _operations(inner.operation)


def _message(attributes: Any) -> bytes:
    """What jax-triton passes to the launcher."""
    if "mhlo.backend_config" in attributes:  # jax-triton 0.4
        return attributes["mhlo.backend_config"]["opaque"].value_bytes
    return attributes["backend_config"].value_bytes


def _launch(message: bytes) -> TritonLaunch:
    """A message `TritonAnyKernelCall` of jaxlib/gpu/triton.proto."""
    named = dict(_fields(message))
    call = list(_fields(named[1]))
    kernel = dict(_fields(dict(call)[1]))
    sizes = {number: value for number, value in call if number in (2, 3, 4)}
    return TritonLaunch(
        named[4].decode(),
        (sizes.get(2, 1), sizes.get(3, 1), sizes.get(4, 1)),
        kernel[2],
        kernel.get(3, 0),
        sum(number == 5 for number, _ in call),
        kernel[4].decode(),
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: an int, or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        elif kind == 2:
            size = varint()
            place += size
            yield number, message[place - size : place]
        else:
            raise ValueError(f"A protobuf field of kind {kind}, which jax-triton does not write.")
