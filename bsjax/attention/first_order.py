"""Says in one line that attention cannot be differentiated twice."""

from typing import Any, NoReturn

import jax

from bsjax.errors import BackendError


@jax.custom_vjp
def first_order_only(arrays: Any) -> Any:
    """The arrays, a pytree, that gradients are computed from.

    Raises:
      BackendError: they are differentiated, for gradients of gradients.
    """
    return arrays


def _forward(arrays: Any) -> NoReturn:
    del arrays
    raise BackendError(
        "Attention has first-order gradients only: for gradients of gradients, use "
        "backend='reference'."
    )


def _backward(residuals: Any, gradients: Any) -> NoReturn:
    raise AssertionError("There is no forward pass for it.")


first_order_only.defvjp(_forward, _backward)
