"""The jitted programs of one loaded model: compiled ahead of their first run, and counted.

A program is compiled once per combination of bucketed shapes and kept with the model. Compiling
ahead of the run tells what a prompt will take in memory before anything is run.
"""

import math
import os
import time
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from bsjax.checkpoint.loading import LoadedModel

Compile = Callable[[Any, tuple[Any, ...]], Any]
"""Compiles a jitted function for arguments of given shapes: for this machine's device, or another's
(`tools.gpu_targets`)."""


class Program:
    """A compiled program of one model.

    Attributes:
      compiled: what JAX compiled.
      output: shapes and dtypes of what it returns, for programs that take it.
      memory: what it takes of the device.
    """

    def __init__(self, parameters: Any, compiled: Any, arguments: tuple[Any, ...]) -> None:
        self._parameters = parameters
        self.compiled = compiled
        self.output = compiled.out_info
        self.memory = Memory.of(compiled, arguments)

    def __call__(self, *arguments: Any) -> Any:
        """Runs it; arguments must have the shapes and dtypes it was compiled for."""
        return self.compiled(self._parameters, *arguments)


class Memory(NamedTuple):
    """Bytes that a program takes of the device while it runs, the model's parameters left out."""

    arguments: int
    temporaries: int
    """What exists only while it runs."""
    results: int
    """What it returns, except where that overwrites a donated argument."""

    @classmethod
    def of(cls, compiled: Any, arguments: tuple[Any, ...]) -> "Memory":
        """The memory of a compiled program with these arguments beside the parameters."""
        analysis = compiled.memory_analysis()
        if analysis is None:  # Some backends do not tell.
            return cls(size_in_bytes(arguments), 0, size_in_bytes(compiled.out_info))
        return cls(
            arguments=size_in_bytes(arguments),
            temporaries=analysis.temp_size_in_bytes,
            results=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """All of it: the most that this program and what it is given take at a time."""
        return sum(self)


class Programs:
    """All programs compiled for one model so far.

    Attributes:
      graph: the module without its parameters, to be merged inside a program.
      parameters: the module's parameters, arguments of every program.
      compilations: how many programs have been compiled (or read from the persistent cache).
      compile_seconds: how long that took, altogether.
    """

    def __init__(self, module: nnx.Module, compile: Compile | None = None) -> None:
        """The programs of `module`, which may be an abstract one if none of them is to run.

        Args:
          module: the model.
          compile: what compiles; by default for this machine's device, with JAX's persistent cache.
        """
        if compile is None:
            use_persistent_cache()
        self._compile = compile or _compile_here
        self.graph, self.parameters = nnx.split(module)
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
            compiled = self._compile(jitted, shapes)
            self._programs[key] = Program(self.parameters, compiled, shapes[1:])
            self.compile_seconds += time.perf_counter() - start
            self.compilations += 1
        return self._programs[key]


def _compile_here(jitted: Any, shapes: tuple[Any, ...]) -> Any:
    return jitted.lower(*shapes).compile()


_programs: "weakref.WeakKeyDictionary[LoadedModel, Programs]" = weakref.WeakKeyDictionary()


def programs_of(model: LoadedModel) -> Programs:
    """The programs of a model, kept for as long as the model is."""
    if model not in _programs:
        _programs[model] = Programs(model.module)
    return _programs[model]


def use_persistent_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX was told of another."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "bsjax" / "compiled"))


def size_in_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes of arrays, of a pytree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
