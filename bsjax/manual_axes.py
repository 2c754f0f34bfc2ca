"""Mesh axes over which arrays differ from device to device, inside of `jax.shard_map`.

With `check_vma`, which is its default, `jax.shard_map` keeps account of these axes in the types of
arrays. Loops and kernels need arrays that agree in them. Elsewhere there are none.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def varying_axes(*trees: Any) -> frozenset[str]:
    """The axes over which any of the arrays differs."""
    leaves = jax.tree.leaves(trees)
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))


def varying_over(axes: frozenset[str], tree: Tree) -> Tree:
    """The arrays, with types that say that they differ over these axes, too."""
    if not axes:
        return tree

    def cast(leaf: Any) -> Any:
        missing = axes - jax.typeof(leaf).manual_axis_type.varying
        return jax.lax.pcast(jnp.asarray(leaf), tuple(sorted(missing)), to="varying")

    return jax.tree.map(cast, tree)


def result_shape(shape: tuple[int, ...], dtype: Any, *, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape of a kernel's result, which differs over the same axes as `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
