"""Imports JAX without the messages that CUDA's stub prints on a machine without a driver."""

import contextlib
import ctypes
import importlib.util
import os
import sys
import tempfile

_NOISE = (b"cudart_stub.cc", b"All log messages before absl::InitializeLog() is called")


def import_jax(*, devices: bool = False) -> None:
    """Imports JAX and, if there is no CUDA driver, drops what the CUDA stub writes to stderr.

    The stub reports the missing driver several times, at any log level. Stderr is therefore
    captured during the import, and all other lines are written afterwards. With a driver, or
    without JAX's CUDA plugin, nothing is captured.

    Args:
      devices: whether to look for devices as well, which makes the stub report again.
    """
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if "jax" in sys.modules or not any(map(importlib.util.find_spec, plugins)) or _has_driver():
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


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
