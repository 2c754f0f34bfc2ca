"""torch, or None if it is not installed; conftest.py then skips the tests marked `parity`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
else:
    try:
        import torch
    except ModuleNotFoundError:
        torch = None

__all__ = ["torch"]
