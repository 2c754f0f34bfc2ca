"""Measures the time of a call on the device, without the time that the host takes to launch it.

JAX has no events. The host clock around n enqueued calls measures the device time of all n calls
plus one round trip. (time of 2n calls - time of n calls) / n leaves the round trip out. n is chosen
so that n calls keep the device busy much longer than the host needs to enqueue them. Shorter calls
are repeated inside one program, in a loop whose iterations depend on each other (`repeated`). If n
calls take longer than a fifth of a second, the round trip is less than a thousandth of that and is
not subtracted. On a CPU it is never subtracted.

PyTorch has events, which the device records before and after n calls. Matrix products enqueued
before the first event keep the device busy while the host enqueues the calls.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Sampler = Callable[[], float]
"""Each call returns the seconds of one more sample."""

# The least time that n calls should take.
_BATCH_SECONDS = 0.03
# If n calls take longer than this, the round trip is not subtracted.
_LONG_SECONDS = 0.2
# A call that takes less is repeated inside one program: the host may need 0.1 ms to launch it.
_SHORT_SECONDS = 2e-3
_REPEATS = 16


def repeats_for(flops: float) -> int:
    """How often a call that computes `flops` should be repeated inside a program; 1 on a CPU.

    Assumes 400 TFLOP/s, which need not be accurate.
    """
    if jax.default_backend() == "cpu":
        return 1
    return _REPEATS if flops / 400e12 < _SHORT_SECONDS else 1


def repeated(function: Callable[..., jax.Array], times: int) -> Callable[..., jax.Array]:
    """A function that computes `function(first, *rest)` several times in sequence.

    The barrier makes the first argument of an iteration depend on the result of the previous one,
    without changing or copying it, and keeps the compiler from moving the work out of the loop.
    """
    if times == 1:
        return function

    def loop(first: jax.Array, *rest: Any) -> jax.Array:
        def turn(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            first, _ = jax.lax.optimization_barrier(carry)
            return first, function(first, *rest)

        # The first iteration runs before the loop: starting from zeros would cost another pass.
        return jax.lax.fori_loop(1, times, turn, (first, function(first, *rest)))[1]

    return loop


def jax_sampler(call: Callable[[], Any], repeats: int = 1) -> Sampler:
    """Warms up a JAX call that does its work `repeats` times; returns a sampler of its time."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return time.perf_counter() - start

    seconds(1)
    once = seconds(1)
    if jax.default_backend() == "cpu":
        return lambda: seconds(1) / repeats
    calls = max(1, math.ceil(_BATCH_SECONDS / once))
    if calls * once > _LONG_SECONDS:
        return lambda: seconds(calls) / (calls * repeats)
    return lambda: (seconds(2 * calls) - seconds(calls)) / (calls * repeats)


def torch_sampler(call: Callable[[], Any]) -> Sampler:
    """Warms up a PyTorch call; returns a sampler of its time."""
    import torch

    def wall_seconds() -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    wall_seconds()
    once = wall_seconds()
    if not torch.cuda.is_available():
        return wall_seconds
    calls = max(1, math.ceil(_BATCH_SECONDS / once))
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        _keep_torch_busy()
        before.record()
        for _ in range(calls):
            call()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1e3 / calls

    return sample


@functools.cache
def _torch_matrix() -> Any:
    import torch

    return torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)


def _keep_torch_busy() -> None:
    """Enqueues several milliseconds of work for the device."""
    matrix = _torch_matrix()
    for _ in range(4):
        matrix.matmul(matrix)


def matrix_rate_call(side: int) -> tuple[Callable[[], jax.Array], int, int]:
    """A bfloat16 matrix product: the call, the number of repeats in it, the FLOPs of one repeat."""
    a, b = (
        jax.random.normal(jax.random.key(seed), (side, side), jnp.bfloat16) for seed in range(2)
    )
    flops = 2 * side**3
    repeats = repeats_for(flops)
    product = jax.jit(repeated(jnp.matmul, repeats))
    return lambda: product(a, b), repeats, flops


def copy_call(megabytes: int) -> tuple[Callable[[], jax.Array], int, int]:
    """A pass over memory: the call, the number of repeats in it, the bytes that one repeat reads
    and writes.
    """
    values = jax.random.bits(jax.random.key(0), (megabytes * 2**18,), jnp.uint32)
    repeats = repeats_for(0)
    # An elementwise inversion reads and writes every byte, and cannot be elided as a copy can.
    inverted = jax.jit(repeated(jnp.bitwise_not, repeats))
    return lambda: inverted(values), repeats, 2 * values.nbytes
