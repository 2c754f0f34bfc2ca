"""Says in one line that attention cannot be differentiated twice."""

from typing import Any, NoReturn, TypeVar

import jax

from bsjax.errors import BackendError

_Arrays = TypeVar("_Arrays")


def first_order_only(arrays: _Arrays) -> _Arrays:
    """The arrays, a pytree, that gradients are computed from.

    Raises:
      BackendError: they are differentiated, for gradients of gradients.
    """
    return _identity(arrays)


@jax.custom_vjp
def _identity(arrays: Any) -> Any:
    return arrays


def _forward(arrays: Any) -> NoReturn:
    del arrays
    raise BackendError(
        "Attention has first-order gradients only: for gradients of gradients, use "
        "backend='reference'."
    )


def _backward(residuals: Any, gradients: Any) -> NoReturn:
    raise AssertionError("There is no forward pass for it.")


_identity.defvjp(_forward, _backward)
