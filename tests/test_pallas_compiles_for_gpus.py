"""The GPU kernel compiles for real GPUs: tensor cores, no spills, within shared memory."""

import jax
import jax.numpy as jnp
import pytest

from bsjax.pallas.configurations import configuration, default_blocks
from bsjax.pallas.prefill import prefill_attention
from bsjax.schedule import Schedule
from tests.gpu_compiler import require_gpu_compiler
from tools.gpu_targets import TARGETS, KernelReport, kernel_reports

DTYPES = ["bfloat16", "float16", "float32"]


def compiled_kernel(
    target: str,
    head_dim: int,
    dtype: str,
    *,
    tokens: int = 36_000,
    q_heads: int = 28,
    kv_heads: int = 4,
    blocks: tuple[int, int] | None = None,
    return_lse: bool = False,
    bidirectional_images: bool = False,
    window: int | None = None,
) -> KernelReport:
    """The report on the prefill kernel, in the default blocks unless others are given."""
    block_q, block_kv = blocks or default_blocks(head_dim, dtype)
    programs_per_tile = block_q // configuration(head_dim, dtype, block_q, block_kv).block_q
    tiles = 2 * tokens // block_q
    schedule = Schedule(
        position=jax.ShapeDtypeStruct((tokens,), jnp.int32),
        image=jax.ShapeDtypeStruct((tokens,), jnp.int32),
        sink=jax.ShapeDtypeStruct((tokens,), jnp.bool_),
        groups=jax.ShapeDtypeStruct((4,), jnp.int32),
        tiles=jax.ShapeDtypeStruct((4, tiles, 5), jnp.int32),
        ranges=jax.ShapeDtypeStruct((4, 4 * tiles, 2), jnp.int32),
        block_q=block_q,
        block_kv=block_kv,
        bidirectional_images=bidirectional_images,
        window=window,
    )

    def attend(q, k, v, schedule, head_category):
        return prefill_attention(
            q, k, v, schedule, head_category, scale=head_dim**-0.5, return_lse=return_lse
        )

    q = jax.ShapeDtypeStruct((tokens, q_heads, head_dim), dtype)
    k = jax.ShapeDtypeStruct((tokens, kv_heads, head_dim), dtype)
    head_category = jax.ShapeDtypeStruct((q_heads,), jnp.int32)
    reports = kernel_reports(attend, (q, k, k, schedule, head_category), target)
    report = reports["prefill_attention"]
    assert report.grid == (q_heads, tiles * programs_per_tile, 1), "heads must run fastest"
    return report


def check(report: KernelReport, target: str, head_dim: int, dtype: str) -> None:
    expected = configuration(head_dim, dtype, *default_blocks(head_dim, dtype))
    case = f"{target}, head dim {head_dim}, {dtype}, {expected}"
    assert report.spilled == 0, f"{case}: {report.spilled} bytes spilled"
    limit = TARGETS[target].shared_memory_per_block
    assert report.shared_memory <= limit, f"{case}: {report.shared_memory} of {limit} bytes"
    assert report.threads == 32 * expected.num_warps, case
    assert "cp.async.cg.shared.global" in report.ptx, f"{case}: keys are not loaded asynchronously"
    if dtype != "float32":
        assert "wgmma.mma_async" in report.ptx, f"{case}: no wgmma"
        assert "mma.sync" not in report.ptx, f"{case}: tensor cores of an older kind"
    else:
        # Products in TF32 or in halves would not be float32.
        assert "mma" not in report.ptx, f"{case}: tensor cores round float32"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128, 256])
@pytest.mark.parametrize("target", ["h200"])
def test_default_configurations(target, head_dim, dtype):
    require_gpu_compiler()
    check(compiled_kernel(target, head_dim, dtype), target, head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_windows_bidirectional_images_and_lse_cost_no_spills(head_dim, dtype):
    require_gpu_compiler()
    report = compiled_kernel(
        "h200", head_dim, dtype, return_lse=True, bidirectional_images=True, window=1024
    )
    check(report, "h200", head_dim, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_schedules_of_other_block_sizes_fit(head_dim, dtype):
    # What a mask has that was built without asking the kernel.
    require_gpu_compiler()
    report = compiled_kernel("h200", head_dim, dtype, blocks=(128, 64))
    assert report.shared_memory <= TARGETS["h200"].shared_memory_per_block
    if dtype != "float32":
        assert report.spilled == 0


def test_arrays_beyond_32_bit_offsets():
    # 300K tokens x 64 heads x 128: an index of q does not fit 32 bits.
    require_gpu_compiler()
    report = compiled_kernel("h200", 128, "bfloat16", tokens=300_000, q_heads=64, kv_heads=8)
    check(report, "h200", 128, "bfloat16")
    small = compiled_kernel("h200", 128, "bfloat16")
    # A 32-bit offset is widened at the end, to be added to a pointer.
    widened = [
        kernel.ptx.count("mul.wide.s32") + kernel.ptx.count("cvt.s64.s32")
        for kernel in (report, small)
    ]
    assert widened[0] < widened[1], f"q and out have 32-bit offsets: {widened}"
