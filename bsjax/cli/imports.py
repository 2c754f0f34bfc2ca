"""The imports of the console script: JAX without CUDA's messages, transformers without torch.

The library leaves these messages to its user, whose process and whose logging it is.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import logging
import os
import sys
import tempfile

from bsjax.cli.distributed import is_distributed, join

_PLUGIN_ERROR = "Jax plugin configuration error"
_NOISE = (b"cudart_stub.cc", b"All log messages before absl::InitializeLog() is called")


def import_libraries(options: argparse.Namespace, *, devices: bool = True) -> None:
    """Imports what commands need that read checkpoints.

    transformers imports torch wherever it is installed, which costs seconds and hundreds of
    megabytes, although tokenizers and image processors do not use it. In a process of its own, a
    command hides torch while transformers is imported, which remembers that there is none.

    Args:
      options: the options of a command.
      devices: as for `import_jax`.
    """
    count = getattr(options, "tensor", 1) * getattr(options, "context", 1)
    count //= getattr(options, "processes", None) or 1
    if count > 1 and "jax" not in sys.modules:
        # A CPU has as many devices as this says when JAX starts.
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(count))
    several = is_distributed(options)
    import_jax(devices=devices and not several)
    if several:
        join(options)
    hide_torch = options.own_process and "torch" not in sys.modules
    if hide_torch:
        # A module that is None in sys.modules cannot be imported.
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        import bsjax.checkpoint.loading  # noqa: F401
    finally:
        if hide_torch:
            del sys.modules["torch"]


def import_jax(*, devices: bool = False) -> None:
    """Imports JAX. If there is no CUDA driver, drops what JAX and the CUDA stub write about it.

    The stub reports the missing driver several times, at any log level. Stderr is therefore
    captured during the import, and all other lines are written afterwards. With a driver, or
    without JAX's CUDA plugin, nothing is captured. With a driver, or if `JAX_PLATFORMS` asks for a
    GPU, a CUDA plugin that cannot be used is reported in one line, where JAX writes a traceback.

    Args:
      devices: whether to look for devices as well, which makes the stub report again.
    """
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if "jax" in sys.modules or not any(map(importlib.util.find_spec, plugins)):
        import jax  # noqa: F401

        return
    has_driver = _has_driver()
    # Whoever asks for a GPU is told why there is none.
    wants_gpu = {"cuda", "gpu"} & set(os.environ.get("JAX_PLATFORMS", "").split(","))
    errors = _PluginErrors(shown=has_driver or bool(wants_gpu))
    logging.getLogger("jax._src.xla_bridge").addFilter(errors)
    if has_driver:
        import jax  # noqa: F401

        return
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            import jax

            if devices:
                with contextlib.suppress(RuntimeError):  # Raised again when a device is used.
                    jax.devices()
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            for line in captured:
                if not any(noise in line for noise in _NOISE):
                    os.write(2, line)


class _PluginErrors(logging.Filter):
    """Shortens what JAX logs about a CUDA plugin that cannot be used.

    Args:
      shown: whether a line of it remains.
    """

    def __init__(self, *, shown: bool) -> None:
        super().__init__()
        self._shown = shown

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        if not record.exc_info or not record.getMessage().startswith(_PLUGIN_ERROR):
            return True
        reason = " ".join(str(record.exc_info[1]).split())
        record.msg, record.args = f"warning: JAX does not use this machine's GPU: {reason}", ()
        record.exc_info = record.exc_text = None
        return self._shown


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
