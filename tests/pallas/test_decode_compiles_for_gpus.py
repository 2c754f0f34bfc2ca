"""Decoding compiles for real GPUs: the kernel as it should be, and no copies around it."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.published_models import PUBLISHED_MODELS
from bsjax.gpu.decode_configurations import decode_configuration
from bsjax.models import FAMILIES
from bsjax.models.cache import Cache
from bsjax.runtime import decoding
from bsjax.runtime.sizes import cache_rows
from tests.support.checked_programs import ProgramCheck
from tests.support.gpu_compiler import require_gpu_compiler
from tools.compiled_kernels import DecodeKernel, decode_kernel
from tools.gpu_targets import TARGETS, KernelReport, compile_for
from tools.sass import opcodes

pytestmark = pytest.mark.slow

LAYERS, ROWS = 28, 40_960


def compiled_kernels(kernel: DecodeKernel) -> tuple[KernelReport, KernelReport]:
    """The reports on the kernel that attends and on the one that combines."""
    reports = kernel.reports()
    assert set(reports) == {"decode_attention", "combine_splits"}, (
        "there are other kernels than our own"
    )
    q_heads = kernel.arguments[0].shape[1]
    assert reports["combine_splits"].grid == (q_heads, 1, 1)
    return reports["decode_attention"], reports["combine_splits"]


def check(
    target: str,
    head_dim: int,
    dtype: str,
    *,
    rows: int = ROWS,
    always: bool = False,
    fills_gpu: bool = True,
    **options,
) -> None:
    """Compiles the kernels and checks them.

    Does nothing if the same kernels have been checked before, unless `always` is set.
    """
    kernel = decode_kernel(target, head_dim, dtype, layers=LAYERS, rows=rows, **options)
    name = f"decode-{target}-{head_dim}-{dtype}-{rows}"
    recorded = ProgramCheck.of("-".join([name, *map(str, options.values())]), kernel.digest())
    if recorded.has_passed and not always:
        return
    expected = decode_configuration(head_dim, dtype)
    reports = compiled_kernels(kernel)
    limit = TARGETS[target].shared_memory_per_block
    for report, name in zip(reports, ("attending", "combining"), strict=True):
        case = f"{target}, head dim {head_dim}, {dtype}, {expected}, {name}"
        assert report.spilled == 0, f"{case}: {report.spilled} bytes spilled"
        assert report.shared_memory <= limit, (
            f"{case}: {report.shared_memory} bytes of shared memory, "
            f"{report.shared_memory - limit} more than there are"
        )
    report, case = reports[0], f"{target}, head dim {head_dim}, {dtype}, {expected}"
    assert report.threads == 32 * expected.num_warps, case
    programs = math.prod(report.grid)
    if fills_gpu:
        assert programs >= TARGETS[target].cores, f"{case}: {programs} programs leave cores idle"
    assert "cp.async.cg.shared.global" in report.ptx, f"{case}: the cache is not read ahead"
    if dtype == "float32":
        # Products in TF32 or in halves would not be float32.
        assert "mma" not in report.ptx, f"{case}: tensor cores round float32"
    elif TARGETS[target].architecture == "sm_90a":
        products = {name for name in opcodes(report.sass) if name.endswith("MMA")}
        assert products == {"HGMMA"}, f"{case}: products are {products}"
    else:
        assert "mma" in report.ptx, f"{case}: no tensor cores"
    recorded.passed()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", ["a100", "l40s", "h200", "b200"])
def test_it_compiles_for_every_architecture(target, dtype):
    require_gpu_compiler()
    check(target, 128, dtype, always=dtype == "bfloat16")


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (64, "bfloat16"),
        (64, "float32"),
        (72, "bfloat16"),
        (80, "float16"),
        (256, "bfloat16"),
        (256, "float32"),
    ],
)
def test_it_compiles_for_every_head_dim(head_dim, dtype):
    require_gpu_compiler()
    check("h200", head_dim, dtype, q_heads=8)


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bfloat16"), (256, "bfloat16")])
def test_it_compiles_for_the_gpu_with_least_shared_memory(head_dim, dtype):
    require_gpu_compiler()
    check("l40s", head_dim, dtype, q_heads=8)


@pytest.mark.parametrize("target", ["a100", "h200"])
@pytest.mark.parametrize(("head_dim", "heads"), [(256, (8, 4)), (128, (32, 16))])
def test_it_compiles_for_the_ring_caches_of_gemma3(target, head_dim, heads):
    require_gpu_compiler()
    # As many programs as there are blocks of 64 rows, which for 4 key heads is fewer than cores.
    check(
        target,
        head_dim,
        "bfloat16",
        rows=1023,
        q_heads=heads[0],
        kv_heads=heads[1],
        fills_gpu=False,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_caches_may_be_larger_than_32_bit_offsets(dtype):
    require_gpu_compiler()
    check("h200", 128, dtype, rows=300_000)


@pytest.fixture(scope="module")
def decode_of_32k_tokens():
    """The decode program of Qwen2-VL-2B for an H200."""
    require_gpu_compiler()
    config = PUBLISHED_MODELS["Qwen2-VL-2B"]()
    build = FAMILIES["qwen2_vl"].build
    graph, parameters = nnx.split(nnx.eval_shape(lambda: build(config, jnp.bfloat16)))
    cache = jax.ShapeDtypeStruct((LAYERS, cache_rows(32768 + 64), 2, 128), jnp.bfloat16)
    assert cache.shape[1] == ROWS

    def decode(parameters, *arguments):
        return decoding.decode(nnx.merge(graph, parameters), *arguments, "pallas")

    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    occurred = jax.ShapeDtypeStruct((1, config.get_text_config().vocab_size), jnp.bool_)
    settings = decoding.AnswerSettings(1, "pallas")
    return compile_for(
        jax.jit(decode, donate_argnums=1),
        (
            parameters,
            decoding.DecodeState(number, number, occurred, (Cache(cache, cache),)),
            decoding.Answers.of([None], [settings]),
            np.int32(64),
            np.int32(1),
        ),
    )


def test_no_copy_of_cache_or_weights(decode_of_32k_tokens):
    text = decode_of_32k_tokens.as_text()
    assert "decode_attention" in text and "combine_splits" in text
    # What a kernel or a copy writes: an instruction outside of the fusions' own computations.
    made = re.compile(
        r"^ +(?:ROOT )?%(\S+) = \(?((?:\w+\[[\d,]*\]\S* ?)+)\)? (?:fusion|copy|custom-call)\(", re.M
    )
    computations = re.findall(r"^(?:ENTRY )?%(\S+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    fused = set(re.findall(r"calls=%(\S+?)[,\s]", text))
    sizes = {}
    for name, body in computations:
        if name in fused:
            continue
        for instruction, result in made.findall(body):
            for shape in re.findall(r"\w+\[([\d,]+)\]", result):
                if "dynamic_update_slice" not in instruction:
                    sizes[instruction, shape] = math.prod(map(int, shape.split(",")))
    assert sizes, "the program's text is not what this test reads"
    a_layers_keys, smallest_matrix = ROWS * 2 * 128, 1536 * 256
    largest = max(sizes, key=sizes.__getitem__)
    assert sizes[largest] < min(a_layers_keys, smallest_matrix), f"%{largest[0]} [{largest[1]}]"


def test_a_decode_step_updates_the_cache_in_place(decode_of_32k_tokens):
    memory = decode_of_32k_tokens.memory_analysis()
    cache = 2 * 2 * LAYERS * ROWS * 2 * 128
    assert memory.alias_size_in_bytes >= cache, "the cache is updated in place"
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 2**14
    assert memory.temp_size_in_bytes < 2**23
