"""GPUs that bsjax can be compiled for on a machine without them.

XLA's CUDA plugin compiles ahead of time, including Pallas kernels, for a GPU that is described in a
few lines. `compile_for` returns the compiled program, with the same `memory_analysis()` as on the
real GPU; `kernel_reports` returns what the assembler reports about each kernel.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding


class GpuTarget(NamedTuple):
    """The figures from a GPU's data sheet that XLA's compilation depends on."""

    device_kind: str
    compute_capability: tuple[int, int]
    accelerated: bool
    """Whether code may use features of exactly this architecture, such as wgmma on sm_90a."""
    cores: int
    clock_ghz: float
    device_memory: int
    memory_bandwidth: int
    l2_cache: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    """The largest size that a kernel can opt into."""
    threads_per_core: int = 2048

    @property
    def architecture(self) -> str:
        """The architecture's name for ptxas."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}{'a' if self.accelerated else ''}"

    @property
    def configuration(self) -> str:
        """The text form of XLA's GpuTargetConfigProto."""
        major, minor = self.compute_capability
        capability = f"major: {major} minor: {minor}"
        if self.accelerated:
            capability += " feature_extension: ACCELERATED_FEATURES"
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ {capability} }}
              core_count: {self.cores}
              fpus_per_core: 128
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.device_memory}
              memory_bandwidth: {self.memory_bandwidth}
              l2_cache_size: {self.l2_cache}
              shared_memory_per_core: {self.shared_memory_per_core}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_memory_per_block}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: {self.threads_per_core}
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.device_kind}"
        """


def _target(
    device_kind: str,
    capability: str,
    cores: int,
    clock_ghz: float,
    memory_gib: float,
    **figures: Any,
) -> GpuTarget:
    number, accelerated = capability.rstrip("a"), capability.endswith("a")
    return GpuTarget(
        device_kind=device_kind,
        compute_capability=(int(number[:-1]), int(number[-1])),
        accelerated=accelerated,
        cores=cores,
        clock_ghz=clock_ghz,
        device_memory=int(memory_gib * 2**30),
        **figures,
    )


_MIB = 2**20
_AMPERE = {"shared_memory_per_core": 167_936, "shared_memory_per_block": 166_912}
_ADA = {
    "shared_memory_per_core": 102_400,
    "shared_memory_per_block": 101_376,
    "threads_per_core": 1536,
}
_HOPPER = {"shared_memory_per_core": 233_472, "shared_memory_per_block": 232_448}
TARGETS = {
    "a100": _target(
        "NVIDIA A100-SXM4-80GB",
        "80",
        108,
        1.41,
        79.25,
        memory_bandwidth=2_039_000_000_000,
        l2_cache=40 * _MIB,
        **_AMPERE,
    ),
    "l40s": _target(
        "NVIDIA L40S",
        "89",
        142,
        2.52,
        44.5,
        memory_bandwidth=864_000_000_000,
        l2_cache=96 * _MIB,
        **_ADA,
    ),
    "rtx4090": _target(
        "NVIDIA GeForce RTX 4090",
        "89",
        128,
        2.52,
        23.6,
        memory_bandwidth=1_008_000_000_000,
        l2_cache=72 * _MIB,
        **_ADA,
    ),
    "h100": _target(
        "NVIDIA H100 80GB HBM3",
        "90a",
        132,
        1.98,
        79.1,
        memory_bandwidth=3_350_000_000_000,
        l2_cache=50 * _MIB,
        **_HOPPER,
    ),
    "h200": _target(
        "NVIDIA H200",
        "90a",
        132,
        1.98,
        141.0,
        memory_bandwidth=4_800_000_000_000,
        l2_cache=50 * _MIB,
        **_HOPPER,
    ),
    "b200": _target(
        "NVIDIA B200",
        "100a",
        148,
        1.965,
        178.4,
        memory_bandwidth=8_000_000_000_000,
        l2_cache=126 * _MIB,
        **_HOPPER,
    ),
}


_TENSOR_MEMORY = re.compile(r"tcgen05\.alloc\S* \[[^\]]*\], (\d+);")
"""The columns of tensor memory that a program of a Blackwell kernel takes."""

_TENSOR_MEMORY_COLUMNS = 512
"""Of a multiprocessor (PTX documentation, tensor memory)."""


class KernelReport(NamedTuple):
    """One kernel of a compiled program."""

    grid: tuple[int, int, int]
    threads: int
    shared_memory: int
    """Bytes of one block, including dynamic shared memory."""
    registers: int
    """Per thread."""
    spilled: int
    """Bytes of spill stores and loads per thread."""
    ptx: str
    sass: str
    """Machine code, disassembled."""

    def resident(self, target: GpuTarget) -> int:
        """How many programs of this kernel run on one multiprocessor at the same time."""
        # Registers are allocated in units of 256 per warp, and each program's shared memory takes
        # 1 KiB more than requested.
        registers = -(-self.registers * 32 // 256) * 256 * (self.threads // 32)
        columns = sum(map(int, _TENSOR_MEMORY.findall(self.ptx)))
        return min(
            65_536 // registers,
            _TENSOR_MEMORY_COLUMNS // max(columns, 1),
            target.shared_memory_per_core // (self.shared_memory + 1024),
            target.threads_per_core // self.threads,
        )


def missing_wheels() -> list[str]:
    """The wheels that ahead-of-time compilation for GPUs needs and that are not installed."""
    missing = []
    if not any(_find(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
        missing.append("jax-cuda12-plugin with jax-cuda12-pjrt")
    if _ptxas() is None:
        missing.append("nvidia-cuda-nvcc-cu12")
    if _disassembler() is None:
        missing.append("triton (for its disassembler)")
    return missing


@functools.cache
def target_topology(name: str, devices: int = 1, hosts: int = 1) -> topologies.TopologyDescription:
    """So many GPUs of the kind `TARGETS[name]` in each of one or several processes."""
    return topologies.get_topology_desc(
        name,
        platform="cuda",
        target_config=TARGETS[name].configuration,
        topology=f"{hosts}x1x{devices}",
    )


def target_mesh(name: str, axes: Mapping[str, int], hosts: int = 1) -> Mesh:
    """A mesh of GPUs of the kind `TARGETS[name]`; `jax.shard_map` decides where arrays are.

    Args:
      name: a key of `TARGETS`.
      axes: the devices along each axis.
      hosts: how many processes they belong to, the same number to each.
    """
    devices = target_topology(name, math.prod(axes.values()) // hosts, hosts).devices
    kinds = (AxisType.Auto,) * len(axes)
    return Mesh(np.array(devices).reshape(*axes.values()), tuple(axes), axis_types=kinds)


def compile_for(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    target: str = "h200",
    *,
    compiler_options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
    """Compiles `function`, jitted or not, for GPUs of the kind `target`.

    Args:
      function: the function.
      arguments: its positional arguments, pytrees of arrays or `jax.ShapeDtypeStruct`s. Only shapes
        and dtypes matter, so whole models need no memory. Those whose sharding is given are on the
        devices of a `target_mesh`, all others on one GPU.
      target: a key of `TARGETS`.
      compiler_options: XLA's debug options for this compilation.
    """
    with _abstract_device(TARGETS[target], arguments), _no_compilation_cache():
        # XLA's default, whatever XLA_FLAGS says for the CPU.
        options = {"xla_backend_optimization_level": 3, **(compiler_options or {})}
        return lowered(function, arguments, target).compile(compiler_options=options)


def digest(function: Callable[..., Any], arguments: tuple[Any, ...], target: str = "h200") -> str:
    """SHA-256 of everything that determines what `compile_for` returns, kernels included.

    Takes a fraction of the time of compiling.
    """
    packages = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12")
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    versions = [f"{name} {installed.get(name)}" for name in packages]
    limit = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, limit)
    # Where a line of the source is makes no difference.
    jax.config.update(limit, 0)
    try:
        text = lowered(function, arguments, target).as_text()
    finally:
        jax.config.update(limit, before)
    return hashlib.sha256("\n".join([*versions, target, text]).encode()).hexdigest()


def lowered(
    function: Callable[..., Any], arguments: tuple[Any, ...], target: str
) -> jax.stages.Lowered:
    """What `compile_for` compiles."""
    device = SingleDeviceSharding(target_topology(target).devices[0])

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        given = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=given or device)

    shapes = jax.tree.map(shape, arguments)
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with _abstract_device(TARGETS[target], arguments):
        return jitted.trace(*shapes).lower(lowering_platforms=("cuda",))


def kernel_reports(
    function: Callable[..., Any], arguments: tuple[Any, ...], target: str = "h200"
) -> dict[str, KernelReport]:
    """Compiles `function` and reports on its kernels by name, including XLA's own fusions."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        compile_for(function, arguments, target, compiler_options=options)
        dump = Path(folder)
        launches = _launches(next(dump.glob("*.thunk_sequence.txt")).read_text())
        reports = {}
        for file in sorted(dump.glob("*.ptx")):
            ptx = file.read_text()
            for kernel, figures in assembled(file, TARGETS[target].architecture).items():
                if kernel in launches:
                    registers, spilled, sass = figures
                    reports[kernel] = KernelReport(*launches[kernel], registers, spilled, ptx, sass)
    return reports


def _launches(thunks: str) -> dict[str, tuple[tuple[int, int, int], int, int]]:
    """Grid, threads and shared memory of each kernel, from XLA's listing of launches."""
    line = re.compile(
        r"\] (\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\] +"
        r"shared_memory: (\d+) bytes"
    )
    launches = {}
    for name, *numbers in line.findall(thunks):
        x, y, z, threads_x, threads_y, threads_z, shared_memory = map(int, numbers)
        launches[name] = ((x, y, z), threads_x * threads_y * threads_z, shared_memory)
    return launches


def assembled(file: Path, architecture: str) -> dict[str, tuple[int, int, str]]:
    """Registers, spilled bytes and machine code of each kernel of a PTX file, by name.

    Writes the machine code next to the file.
    """
    ptx = file.read_text()
    if "\n.visible .entry" not in ptx:
        return {}
    ptxas = _ptxas()
    assert ptxas is not None
    file.write_text(_readable_by(ptxas, ptx))
    process = subprocess.run(
        [ptxas, "-v", f"-arch={architecture}", file, "-o", file.with_suffix(".cubin")],
        capture_output=True,
        text=True,
        check=True,
    )
    kernels = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        process.stderr,
        re.DOTALL,
    )
    sass = _disassemble(file.with_suffix(".cubin"))
    return {
        name: (int(registers), int(stores) + int(loads), sass)
        for name, stores, loads, registers in kernels
    }


def _readable_by(ptxas: Path, ptx: str) -> str:
    """The same PTX with a declared version that is not newer than ptxas.

    XLA declares the newest version that any NVIDIA library in the environment supports, such as the
    nvJitLink of a torch built for CUDA 13, and ptxas refuses versions newer than its own. If a
    kernel contains an instruction that ptxas does not know, ptxas still fails.
    """
    newest = _newest_ptx_version(ptxas)
    declared = re.search(r"^\.version (\d+)\.(\d+)$", ptx, re.MULTILINE)
    assert declared is not None
    if tuple(map(int, declared.groups())) <= newest:
        return ptx
    return ptx.replace(declared.group(), ".version {}.{}".format(*newest), 1)


@functools.cache
def _newest_ptx_version(ptxas: Path) -> tuple[int, int]:
    """The newest PTX version that `ptxas` reads, from its error about one that is too new."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "too_new.ptx"
        file.write_text(".version 99.0\n.target sm_80\n.address_size 64\n")
        process = subprocess.run(
            [ptxas, "-arch=sm_80", file, "-o", file.with_suffix(".cubin")],
            capture_output=True,
            text=True,
            check=False,
        )
    version = re.search(r"current version is '(\d+)\.(\d+)'", process.stderr)
    assert version is not None, process.stderr
    return int(version[1]), int(version[2])


def _disassemble(cubin: Path) -> str:
    program = _disassembler()
    assert program is not None
    return subprocess.run([program, "-c", cubin], capture_output=True, text=True, check=True).stdout


@functools.cache
def _disassembler() -> Path | None:
    package = _find("triton")
    for folder in (package and package.submodule_search_locations) or ():
        path = Path(folder) / "backends" / "nvidia" / "bin" / "nvdisasm"
        if path.exists():
            return path
    return None


@functools.cache
def _ptxas() -> Path | None:
    for package in ("nvidia.cuda_nvcc", "nvidia.cu13"):
        specification = _find(package)
        for folder in (specification and specification.submodule_search_locations) or ():
            path = Path(folder) / "bin" / "ptxas"
            if path.exists():
                return path
    return None


def _find(module: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None


def _abstract_device(
    target: GpuTarget, arguments: tuple[Any, ...]
) -> contextlib.AbstractContextManager[Any]:
    """Tells Pallas which GPU it is lowering for, as JAX 0.11 and later require.

    The mesh of sharded arguments says so itself.
    """
    leaves = jax.tree.leaves(arguments)
    if jax.__version_info__ < (0, 11) or any(map(_is_on_a_mesh, leaves)):
        return contextlib.nullcontext()
    sharding: Any = jax.sharding
    device = sharding.AbstractDevice(
        # JAX does not list the L40S, but lists the L40, which has the same compute capability.
        device_kind=target.device_kind.replace("L40S", "L40"),
        num_cores=target.cores,
        platform="gpu",
    )
    return sharding.use_abstract_mesh(
        sharding.AbstractMesh(
            (1,), ("x",), axis_types=(sharding.AxisType.Auto,), abstract_device=device
        )
    )


def _is_on_a_mesh(leaf: Any) -> bool:
    return isinstance(getattr(leaf, "sharding", None), NamedSharding)


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    # A program from the cache is not compiled, so it leaves no dump, and it cannot be loaded
    # without its GPU.
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX looks at the setting once, and keeps to it.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
