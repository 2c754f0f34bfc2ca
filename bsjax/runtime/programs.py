"""The jitted programs of one loaded model: compiled ahead of their first run, counted and bounded.

A program is compiled once per combination of bucketed shapes and kept as long as the model. Because
programs are compiled before they run, the memory that a prompt needs is known before it runs.
"""

import contextlib
import os
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from bsjax.checkpoint.loading import MAX_PROGRAMS, DescribedModel, LoadedModel
from bsjax.checks import argument, check_not_forked, not_a_model
from bsjax.errors import BsjaxError
from bsjax.models.collectives import TENSOR
from bsjax.models.head_order import HeadOrder, imbalance
from bsjax.models.sharding import (
    bytes_on_a_device,
    mesh_of,
    on_every_device,
    sharded_shapes,
    size_along,
)
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.processes import placed, spans_processes

Compile = Callable[[Any, tuple[Any, ...]], Any]
"""Compiles a jitted function for arguments of given shapes, for this machine's device or for
another one (`tools.gpu_targets`)."""


class Program:
    """A compiled program of one model.

    Attributes:
      compiled: JAX's compiled program.
      output: shapes and dtypes of its results.
      memory: device memory that the program needs.
    """

    def __init__(
        self,
        parameters: Any,
        compiled: Any,
        arguments: tuple[Any, ...],
        mesh: Mesh | None = None,
    ) -> None:
        self._parameters = parameters
        self._shapes = arguments if spans_processes(mesh) else None
        self.compiled = compiled
        self.output = compiled.out_info
        self.memory = Memory.of(compiled, arguments)

    def __call__(self, *arguments: Any) -> Any:
        """Runs the program. Arguments must have the shapes and dtypes that it was compiled for."""
        if self._shapes is not None:
            arguments = placed(arguments, self._shapes)
        return self.compiled(self._parameters, *arguments)


class Memory(NamedTuple):
    """Bytes on the device while a program runs, without the model's parameters."""

    arguments: int
    temporaries: int
    """Buffers that exist only while the program runs."""
    results: int
    """What the program returns, except for results in the buffers of donated arguments."""

    @classmethod
    def of(cls, compiled: Any, arguments: tuple[Any, ...]) -> "Memory":
        """The memory of a compiled program.

        Args:
          compiled: JAX's compiled program.
          arguments: shapes of the arguments after the parameters.
        """
        analysis = compiled.memory_analysis()
        if analysis is None:  # Some backends do not support it.
            return cls(size_in_bytes(arguments), 0, size_in_bytes(compiled.out_info))
        return cls(
            arguments=size_in_bytes(arguments),
            temporaries=analysis.temp_size_in_bytes,
            results=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """The most bytes that the program needs at a time, arguments included."""
        return sum(self)


class Stage(NamedTuple):
    """A program as one step of a run."""

    name: str
    program: Program
    other_bytes: int = 0
    """Bytes on the device while the program runs, other than weights and its own memory."""

    @property
    def peak(self) -> int:
        """The most bytes on the device during this stage, weights excluded."""
        return self.program.memory.total + self.other_bytes


class Programs:
    """The compiled programs of one model; the least recently used is dropped first.

    A program that is dropped while a run still uses it is freed when the run ends.

    Attributes:
      module: the model.
      graph: the module without its parameters.
      parameters: the module's parameters, the first argument of every program.
      mesh: the devices that they are on; None for one device.
      compilations: how many programs have been compiled, or read from the persistent cache.
    """

    def __init__(
        self,
        module: Any,
        compile: Compile | None = None,
        *,
        max_programs: int = MAX_PROGRAMS,
        head_order: HeadOrder | None = None,
    ) -> None:
        """Prepares a model, without compiling any program yet.

        Args:
          module: the model; may be abstract (shapes in place of weights) if no program will run.
          compile: compiles the programs; by default for this machine's device, with JAX's
            persistent cache.
          max_programs: how many programs are kept.
          head_order: the order of the module's heads; None for that of the checkpoint.
        """
        self._head_order = head_order
        if compile is None:
            use_persistent_cache()
        self._compile = compile or _compile_here
        self.module = module
        self.graph, self.parameters = nnx.split(module)
        self.mesh = mesh_of(self.parameters)
        self.compilations = 0
        self._of_thread = threading.local()
        self._max_programs = max_programs
        # In the order of their last use.
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many programs are kept now."""
        return len(self._programs)

    @property
    def of_this_thread(self) -> tuple[float, int]:
        """Seconds that this thread has compiled for, and how many programs."""
        return getattr(self._of_thread, "value", (0.0, 0))

    def in_head_order(
        self, of_heads: Int[np.ndarray, "layers q_heads"]
    ) -> Int[np.ndarray, "layers q_heads"]:
        """Something of each of the checkpoint's heads, in the order that the module has them in."""
        if self._head_order is None:
            return of_heads
        return np.take_along_axis(of_heads, self._head_order.q_heads, axis=1)

    def imbalance_of_heads(self, inputs: ModelInputs) -> float:
        """Greatest over mean of the FLOPs of the heads of each device along `TENSOR`."""
        devices = size_along(self.mesh, TENSOR)
        if devices == 1:
            return 1.0
        return imbalance(self.in_head_order(inputs.flops_per_head), devices)

    def put(self, tree: Any) -> Any:
        """Copies arguments of programs to where the programs need them."""
        if self.mesh is None:
            return jax.device_put(tree)
        shapes = sharded_shapes(tree, self.mesh)
        if spans_processes(self.mesh):
            return placed(tree, shapes)
        return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, shapes))

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
          function: a function at module level, which identifies the program.
          arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s.
          static: hashable arguments, compiled into the program.
          donate: indices of the arguments whose buffers the program may overwrite.
        """
        leaves, structure = jax.tree.flatten(arguments)
        key = (function, static, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        with self._lock:
            if key in self._programs:
                self._programs.move_to_end(key)
                return self._programs[key]
        graph, mesh = self.graph, self.mesh
        shapes = (_where_they_are(self.parameters), *sharded_shapes(arguments, mesh))

        def run(parameters: Any, *arguments: Any) -> Any:
            return function(nnx.merge(graph, parameters), *arguments, *static)

        if mesh is not None:
            run = on_every_device(run, mesh, shapes)
        run.__name__ = function.__name__.lstrip("_")
        start = time.perf_counter()
        jitted = jax.jit(run, donate_argnums=tuple(index + 1 for index in donate))
        # The model's mesh, or none, whatever mesh the caller has set.
        with jax.set_mesh(mesh), _said_on_a_terminal(f"bsjax: compiling {run.__name__} ..."):
            compiled = self._compile(jitted, shapes)
            program = Program(self.parameters, compiled, shapes[1:], mesh)
        seconds = time.perf_counter() - start
        with self._lock:
            of_thread = self.of_this_thread
            self._of_thread.value = (of_thread[0] + seconds, of_thread[1] + 1)
            self.compilations += 1
            self._programs[key] = program
            self._programs.move_to_end(key)
            while len(self._programs) > self._max_programs:
                self._programs.popitem(last=False)
        return program


@contextlib.contextmanager
def _said_on_a_terminal(line: str) -> Iterator[None]:
    """Shows a line while something takes long, if stderr is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    print(line, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        # To the start of the line, and clears it.
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _compile_here(jitted: Any, shapes: tuple[Any, ...]) -> Any:
    return jitted.lower(*shapes).compile()


_programs: "weakref.WeakKeyDictionary[LoadedModel, Programs]" = weakref.WeakKeyDictionary()


def check_model(model: Any, error: type[BsjaxError]) -> None:
    """Refuses what is not a loaded model, and a model loaded before this process was forked.

    Args:
      model: the argument of a public function.
      error: raised if it cannot be run.
    """
    if not isinstance(model, LoadedModel):
        raise error(not_a_model(model))
    check_not_forked(error)


def check_one_device(model: DescribedModel, error: type[BsjaxError]) -> None:
    """Refuses a model that is divided among the devices of a mesh.

    Args:
      model: a model, with or without weights.
      error: raised if it is.
    """
    if model.mesh is not None and model.mesh.size > 1:
        axes = [axis for axis in model.mesh.axis_names if model.mesh.shape[axis] > 1]
        options = " and ".join(map(argument, axes))
        raise error(f"Profiling runs on one device: leave out the mesh ({options}).")


def programs_of(model: LoadedModel) -> Programs:
    """The programs of a model, kept as long as the model exists."""
    if model not in _programs:
        _programs[model] = Programs(
            model.module, max_programs=model.max_programs, head_order=model.head_order
        )
    return _programs[model]


def use_persistent_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX is configured with another."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "bsjax" / "compiled"))


def size_in_bytes(tree: Any) -> int:
    """The bytes of all arrays, or of `jax.ShapeDtypeStruct`s, in a pytree, on each device."""
    return sum(map(bytes_on_a_device, jax.tree.leaves(tree)))


def _where_they_are(parameters: Any) -> Any:
    """The shapes of parameters, with their shardings if they are on several devices."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        on_mesh = sharding if isinstance(sharding, NamedSharding) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_mesh)

    return jax.tree.map(shape, parameters)
