"""Calls Triton kernels: through jax-triton, or interpreted on the CPU for tests."""

import contextlib
import functools
import importlib.util
import inspect
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters import partial_eval

from bsjax.errors import BackendError
from bsjax.gpu.configurations import compiles_for_gpus, named_target


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    before = os.environ.get("TRITON_CACHE_DIR")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TRITON_CACHE_DIR", None)
        else:
            os.environ["TRITON_CACHE_DIR"] = before


try:
    # jax-triton turns off Triton's cache on disk, for all users of Triton in this process.
    with _environment_kept():
        import jax_triton
    import triton
    from jax_triton import triton_lib
    from triton.runtime.interpreter import InterpretedFunction
except ImportError as error:
    raise BackendError(
        f"The backend triton needs Triton and jax-triton ({error}): "
        "pip install 'bsjax[cuda12,triton]' or 'bsjax[cuda13,triton]'."
    ) from error


def _accept_rules_of_jax_0_12() -> None:
    """Makes jax-triton 0.4.1 work with JAX 0.12, whose rules for unused code have an argument more.

    Does nothing for versions that fit each other.
    """
    rules: Any = partial_eval.dce_rules
    primitive = triton_lib.triton_kernel_call_p
    rule = rules.get(primitive)
    if (
        rule is not None
        and jax.__version_info__ >= (0, 12)
        and len(inspect.signature(rule).parameters) == 2
    ):
        rules[primitive] = lambda used, live, equation: rule(used, equation)


_accept_rules_of_jax_0_12()
_VERSION: tuple[int, ...] = jax_triton.__version_info__


class Launch(NamedTuple):
    """How one kernel is launched."""

    name: str
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int


def call(
    kernel: Any,
    inputs: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    constants: dict[str, Any],
    launch: Launch,
) -> list[jax.Array]:
    """The outputs of a kernel.

    If Triton was imported with TRITON_INTERPRET=1 in the environment, kernels run in its
    interpreter, on any device: slowly, for tests. This needs torch.

    Args:
      kernel: a function decorated with `triton.jit`. Its parameters are the inputs, the outputs,
        `scratch`, and the constants.
      inputs: arrays and whole numbers, in the order of the kernel's parameters.
      outputs: shapes and dtypes of the outputs. What a kernel does not write is undefined.
        Trailing outputs may be left out if the kernel, with these constants, does not use them.
      constants: the kernel's parameters that are known when it is compiled.
      launch: how it is launched.

    Raises:
      BackendError: there is no GPU, and the kernel is not interpreted.
    """
    given = len(inputs) + len(outputs)
    missing = kernel.arg_names[given : kernel.arg_names.index("scratch") + 1]
    constants = {**constants, **dict.fromkeys(missing, ())}
    if isinstance(kernel, InterpretedFunction):
        run = _interpreted
    elif compiles_for_gpus():
        run = _compiled
    else:
        raise BackendError(
            "The backend triton needs an NVIDIA GPU, and JAX has found none: use backend='xla'. "
            "For tests, TRITON_INTERPRET=1 in the environment runs the kernels on CPUs."
        )
    places = [index for index, value in enumerate(inputs) if not isinstance(value, int)]

    def arguments(arrays: Sequence[Any]) -> list[Any]:
        """The inputs, with `arrays` in the place of theirs."""
        given = list(inputs)
        for place, value in zip(places, arrays, strict=True):
            given[place] = value
        return given

    # jax-triton has no rule for `jax.vmap`: one launch after the other.
    @jax.custom_batching.sequential_vmap
    def of_arrays(*arrays: jax.Array) -> list[jax.Array]:
        return run(kernel, arguments, arrays, outputs, constants, launch)

    return of_arrays(*(inputs[place] for place in places))


def _compiled(
    kernel: Any,
    arguments: Callable[[Sequence[Any]], list[Any]],
    arrays: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    constants: dict[str, Any],
    launch: Launch,
) -> list[jax.Array]:
    check_versions()
    _declare_ptx_of_jax()
    triton_call: Any = jax_triton.triton_call
    results = triton_call(
        *arguments(arrays),
        kernel=kernel,
        grid=launch.grid,
        name=launch.name,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        compute_capability=_compute_capability(),
        **_of_version(outputs),
        **constants,
    )
    return list(results)[: len(outputs)]


def check_versions() -> None:
    """Does nothing if kernels can be compiled with the installed versions: see `_of_version`.

    Raises:
      BackendError: they cannot.
    """
    if jax.__version_info__ == (0, 11, 0):
        raise BackendError(
            "JAX 0.11.0 passes too few parameters to Triton's kernels: the backend triton needs "
            "JAX 0.11.1 or newer, or on Python 3.11 JAX 0.10.2."
        )
    found = tuple(map(int, triton.__version__.split(".")[:2]))
    if _VERSION < (0, 4) and found < (3, 9):
        raise BackendError(
            f"With jax-triton {jax_triton.__version__} the backend triton needs Triton 3.9 or "
            f"newer, but found {triton.__version__}, which PyTorch's wheels for CUDA pin: install "
            "bsjax in an environment without them, or use backend='pallas' or 'xla'."
        )


def _of_version(outputs: Sequence[jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arguments of `triton_call` that differ between the versions of jax-triton."""
    if _VERSION >= (0, 4):
        return {"out_type": tuple(outputs), "backend_options": {"enable_fp_fusion": True}}
    # A compiled kernel takes two hidden pointers to scratch memory, which ours do not use. Up to
    # version 0.11.0, JAX passes only one, and the driver would read beyond the end of the
    # arguments. One more output, in the place of the kernel's constant `scratch`, is passed for the
    # other. The constant is an empty tuple, because Triton would give any other one an attribute of
    # its pointer.
    scratch = jax.ShapeDtypeStruct((1,), np.int32)
    return {"out_shape": (*outputs, scratch)}


def _compute_capability() -> int | None:
    """What jax-triton compiles for; None for the GPU in this machine."""
    target = named_target()
    return None if target is None else int(target.removeprefix("sm_"))


@functools.cache
def _declare_ptx_of_jax() -> None:
    """Makes Triton declare a PTX version that JAX's assembler reads, unless the user has chosen.

    By default it is that of Triton's own assembler: of CUDA 13.4 in Triton 3.9, which no CUDA 12
    reads.
    """
    compiler: Any = triton
    tools = compiler.knobs.nvidia
    ptxas = _ptxas_of_jax()
    for name in ("ptxas", "ptxas_blackwell"):
        if ptxas and f"TRITON_{name.upper()}_PATH" not in os.environ:
            setattr(tools, name, str(ptxas))


def _ptxas_of_jax() -> Path | None:
    """The assembler of the wheels that JAX installs; else one on the path; else None."""
    for package in ("nvidia.cuda_nvcc", "nvidia.cu13"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in (found and found.submodule_search_locations) or ():
            path = Path(folder) / "bin" / "ptxas"
            if path.exists():
                return path
    path = shutil.which("ptxas")
    return Path(path) if path else None


# Devices run at the same time, and the interpreter keeps what it is doing in global variables.
_INTERPRETER = threading.Lock()


def _interpreted(
    kernel: Any,
    arguments: Callable[[Sequence[Any]], list[Any]],
    arrays: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    constants: dict[str, Any],
    launch: Launch,
) -> list[jax.Array]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise BackendError(
            "Triton's interpreter (TRITON_INTERPRET=1) needs PyTorch: pip install torch."
        ) from error

    def tensor(array: np.ndarray) -> Any:
        array = np.array(array)
        if array.dtype == np.dtype(jax.numpy.bfloat16):
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def array(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(jax.numpy.bfloat16)
        return tensor.numpy()

    def run(*arrays: Any) -> tuple[np.ndarray, ...]:
        # As on a GPU, nobody may rely on what was there before.
        results = [tensor(np.full(each.shape, np.nan, each.dtype)) for each in outputs]
        with _INTERPRETER:
            kernel[launch.grid](*arguments(tuple(map(tensor, arrays))), *results, **constants)
        return tuple(map(array, results))

    return list(jax.pure_callback(run, tuple(outputs), *arrays))
