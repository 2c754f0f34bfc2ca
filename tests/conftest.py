"""Tests run on the CPU, whatever else the machine has."""

import ast
import atexit
import gc
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import beartype  # noqa: F401
import pytest
from hypothesis import settings
from jaxtyping import _import_hook

from tests.support.pallas import needs_pallas
from tests.support.paths import ROOT

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs that several tests compile, in this process or another, are compiled once a session.
# Tests must not fill the user's cache, and what a test finds out about compilation must not depend
# on earlier sessions.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="bsjax-tests-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    # pytest-xdist's workers, which start later, inherit it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Nearly two thirds of the suite's time would be XLA compiling for the CPU. Without LLVM's
# optimisations, which do not reorder floating-point operations, compiling takes a third less, and
# without the emitters that lower fusions through MLIR another third: the older ones, which JAX 0.10
# still has, write the same operations as LLVM's at once. A fifth of the rest would be cutting each
# program into 32 parts, for threads that find no core. Set
# XLA_FLAGS=--xla_backend_optimization_level=3 to test programs that are compiled as for users.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # XLA ends the process at a flag that it does not know.
        flags.append("--xla_cpu_use_fusion_emitters=false")
        flags.append("--xla_cpu_parallel_codegen_split_count=1")
    os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))
# Eight devices, for tests that shard arrays. Everything else runs on the first one.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
# Each pytest-xdist worker has a core of its own; more threads would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Python searches for cycles of garbage less often: most of what it would search, modules, tests and
# traced programs, stays to the end.
gc.set_threshold(20_000, 20, 20)

# Shells start background jobs with interrupts ignored, and children inherit this, but some tests
# send interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Compilation and other load occasionally make an example slow, which is not a failure.
settings.register_profile("bsjax", deadline=None, print_blob=True)
settings.load_profile("bsjax")


class CheckedFunctions(_import_hook.JaxtypingTransformer):
    """Functions inside of functions are not checked.

    They are defined, and would be compiled with their checks, each time the outer one runs.
    """

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:  # noqa: N802
        if any(isinstance(parent, ast.FunctionDef) for parent in self._parents):
            return node
        return super().visit_FunctionDef(node)


_import_hook.JaxtypingTransformer = CheckedFunctions

HAS_TORCH = importlib.util.find_spec("torch") is not None
NO_TORCH = "torch is not installed"


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI") and sys.version_info[:2] == (3, 11) and not HAS_TORCH:
        raise pytest.UsageError(f"{NO_TORCH}: CI runs the parity tests on Python 3.11")
    if config.getoption("numprocesses") and "PYTEST_XDIST_WORKER" not in os.environ:
        return  # Only pytest-xdist's workers, which it starts next, run tests.
    config.add_cleanup(gc.unfreeze)  # nanobind reports what is left when the process ends.
    # Imported before bsjax: jaxtyping's import hook recompiles the source of all modules that bsjax
    # is the first to import.
    import flax.nnx  # noqa: F401
    import orbax.checkpoint  # noqa: F401

    if HAS_TORCH:
        import torch  # noqa: F401
        import transformers.modeling_utils
        import transformers.processing_utils  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_TORCH and item.get_closest_marker("parity"):
            item.add_marker(pytest.mark.skip(reason=NO_TORCH))
        if getattr(item, "callspec", None) and item.callspec.params.get("backend") == "pallas":
            item.add_marker(needs_pallas)


def pytest_collection_finish() -> None:
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escapes lone surrogates, which fuzzers put into logs: pytest-xdist would end the session."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [
        report
        for report in terminalreporter.getreports("skipped")
        if NO_TORCH in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} parity tests skipped: {NO_TORCH} (pip install '.[parity]')"
        )


@pytest.fixture
def annotations_unchecked(monkeypatch):
    """As in a user's program: the test suite checks annotations before bsjax sees a value."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def tiny_source() -> Path:
    """A small checkpoint with random weights, as transformers reads it."""
    return ROOT / "examples" / "tiny-qwen2.5-vl"


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_source, tmp_path_factory) -> Path:
    """That checkpoint, converted."""
    import convert.__main__

    folder = tmp_path_factory.mktemp("converted") / "tiny"
    assert convert.__main__.main([str(tiny_source), str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint):
    """That checkpoint, loaded in float32."""
    import bsjax

    return bsjax.load(tiny_checkpoint)


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory):
    """A random Gemma 3 with layers of both kinds and a window of 12 tokens."""
    import bsjax
    from convert.conversion import convert_checkpoint
    from tests.support import convert_sources

    folder = tmp_path_factory.mktemp("gemma3")
    source = convert_sources.write_source(folder / "hf", "gemma3", tied=True, layers=4)
    convert_checkpoint(source, folder / "ours", dtype="float32")
    return bsjax.load(folder / "ours", "float32")
