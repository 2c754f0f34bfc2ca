"""torch where it is installed: conftest.py skips tests marked `parity` where it is not."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
else:
    try:
        import torch
    except ModuleNotFoundError:
        torch = None

__all__ = ["torch"]
