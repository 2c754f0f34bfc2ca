"""What tests that compile for GPUs need from the environment."""

import os

import pytest

from tools.gpu_targets import missing_wheels


def require_gpu_compiler() -> None:
    """Skips the calling test where the compiler for GPUs is missing; fails it where CI is set."""
    missing = missing_wheels()
    if missing:
        message = f"Compiling for GPUs needs {' and '.join(missing)}: pip install '.[test]'."
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
