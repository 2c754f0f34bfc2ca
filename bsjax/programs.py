"""The jitted programs of one loaded model: compiled ahead of their first run, and counted.

A program is compiled once per combination of bucketed shapes and kept with the model. Compiling
ahead of the run tells what a prompt will take in memory before anything is run.
"""

import os
import time
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from bsjax.checkpoint import LoadedModel


class Program:
    """A compiled program of one model.

    Attributes:
      output: shapes and dtypes of what it returns, for programs that take it.
      bytes_wanted: temporaries and results, beyond the arguments, which are there already.
    """

    def __init__(self, parameters: Any, lowered: Any) -> None:
        self._parameters = parameters
        self._compiled = lowered.compile()
        self.output = lowered.out_info
        analysis = self._compiled.memory_analysis()
        self.bytes_wanted = 0
        if analysis is not None:
            self.bytes_wanted = (
                analysis.temp_size_in_bytes
                + analysis.output_size_in_bytes
                - analysis.alias_size_in_bytes
            )

    def __call__(self, *arguments: Any) -> Any:
        """Runs it; arguments must have the shapes and dtypes it was compiled for."""
        return self._compiled(self._parameters, *arguments)


class Programs:
    """All programs compiled for one model so far.

    Attributes:
      graph: the module without its parameters, to be merged inside a program.
      parameters: the module's parameters, arguments of every program.
      compilations: how many programs have been compiled (or read from the persistent cache).
      compile_seconds: how long that took, altogether.
    """

    def __init__(self, model: LoadedModel) -> None:
        use_persistent_cache()
        self.graph, self.parameters = nnx.split(model.module)
        self.compilations = 0
        self.compile_seconds = 0.0
        self._programs: dict[Hashable, Program] = {}

    def get(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        static: tuple[Hashable, ...] = (),
        donate: tuple[int, ...] = (),
    ) -> Program:
        """The program of `function(module, *arguments, *static)` for arguments of these shapes.

        Args:
          function: module-level, so that it names the program.
          arguments: arrays, or `jax.ShapeDtypeStruct`s of them, in pytrees.
          static: hashable arguments that are compiled in.
          donate: which of `arguments` the program may overwrite.
        """
        shapes = jax.tree.map(_shape, (self.parameters, *arguments))
        leaves, structure = jax.tree.flatten(shapes[1:])
        key = (function, static, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._programs:
            graph = self.graph

            def run(parameters: Any, *arguments: Any) -> Any:
                return function(nnx.merge(graph, parameters), *arguments, *static)

            run.__name__ = function.__name__.lstrip("_")
            start = time.perf_counter()
            jitted = jax.jit(run, donate_argnums=tuple(index + 1 for index in donate))
            self._programs[key] = Program(self.parameters, jitted.lower(*shapes))
            self.compile_seconds += time.perf_counter() - start
            self.compilations += 1
        return self._programs[key]


_programs: "weakref.WeakKeyDictionary[LoadedModel, Programs]" = weakref.WeakKeyDictionary()


def programs_of(model: LoadedModel) -> Programs:
    """The programs of a model, kept for as long as the model is."""
    if model not in _programs:
        _programs[model] = Programs(model)
    return _programs[model]


def use_persistent_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told of another."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "bsjax" / "compiled"))


def bytes_available() -> int | None:
    """Free memory of the default device, in bytes; None where it cannot be told."""
    device = jax.devices()[0]
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    try:
        meminfo = Path("/proc/meminfo").read_text()
        return 1024 * int(meminfo.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return None


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
