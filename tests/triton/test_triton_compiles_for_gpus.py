"""The Triton kernels compile for real GPUs: tensor cores, no spills, within shared memory."""

import importlib.metadata
import math

import jax
import jax.numpy as jnp
import pytest

import bsjax
from bsjax import BlockMask, Image, Template, Text
from bsjax.gpu.configurations import TARGETS as TARGET_NAMES
from bsjax.gpu.configurations import WIDTHS, compiling_for
from bsjax.masks.visibility import CAUSAL, Visibility
from tests.support.checked_programs import ProgramCheck, Uncompiled
from tests.support.gpu_compiler import require_gpu_compiler
from tests.support.triton_interpreter import require_triton_compiler

require_triton_compiler()

from tools import kernel_table, memory_table  # noqa: E402
from tools.configuration_table import read_table, table_of  # noqa: E402
from tools.gpu_targets import TARGETS, KernelReport, compile_for, lowered  # noqa: E402
from tools.kernel_lines import (  # noqa: E402
    DECODE_MATRIX,
    GRADIENT_MATRIX,
    PAGE,
    Case,
    matrix,
)
from tools.sass import loops_over_blocks, opcodes  # noqa: E402
from tools.triton_kernels import (  # noqa: E402
    TritonLaunch,
    default_prefill,
    gradient_configurations,
    kernel_constants,
    kernel_names,
    triton_decode,
    triton_digest,
    triton_gradients,
    triton_launches,
    triton_prefill,
)

PRODUCTS = {"a100": "HMMA", "l40s": "HMMA", "h200": "HGMMA", "b200": "UTCHMMA"}


def check(
    report: KernelReport,
    gpu: str,
    dtype: str,
    said: str,
    product: str | None = None,
    stages: int = 2,
) -> None:
    """A kernel with matrix products is compiled as it should be.

    With three stages, copies start two blocks ahead: its first loop may wait for none of the last
    copies that have started.
    """
    target = TARGETS[gpu]
    assert report.spilled == 0, f"{said}: {report.spilled} bytes spilled"
    assert report.shared_memory <= target.shared_memory_per_block, said
    assert report.resident(target) >= 1, said
    used = set(opcodes(report.sass))
    assert "LDGSTS" in used, f"{said}: keys are not loaded asynchronously"
    pending = [
        int(each.operands.split(",")[1].strip(" ;"), 16)
        for each in loops_over_blocks(report.sass)[0]
        if each.name == "DEPBAR" and each.operands.startswith("SB0")
    ]
    assert stages < 3 or (pending and min(pending) > 0), f"{said}: copies are waited for at once"
    # Products in TF32 or in halves would not be float32.
    expected = set() if dtype == "float32" else {product or PRODUCTS[gpu]}
    assert {name for name in used if name.endswith("MMA")} == expected, said


def check_parameters(launch: TritonLaunch) -> None:
    """The launcher passes as many parameters as the kernel has: the driver reads all of them."""
    appended = 1 if jax.__version_info__ < (0, 11, 1) else 2
    assert launch.parameters <= launch.pointers + appended


def is_of_these_versions(page: str) -> bool:
    """Whether the page was made with the installed versions: others compile differently."""
    triton = f"Triton {importlib.metadata.version('triton')} and jax-triton"
    return f"with JAX {jax.__version__}," in page and triton in page


def check_prefill(case: Case, *, line: str = "", **options) -> None:
    """Compiles a prefill kernel and checks it, unless the same kernel has been checked before.

    Args:
      case: the kernel.
      line: what the page should say about it; "" for kernels that are not on the page.
      options: more arguments of `triton_prefill`.
    """
    require_gpu_compiler()
    kernel = triton_prefill(*case[:3], sparse=case.sparse, **options)
    digest = triton_digest(kernel.function, kernel.arguments, case.gpu)
    recorded = ProgramCheck.of(f"triton-{case}", digest, line)
    if recorded.has_passed:
        return
    (launch,) = triton_launches(kernel.function, kernel.arguments, case.gpu)
    assert launch.grid == kernel.grid, "heads must run fastest"
    check_parameters(launch)
    report = launch.report(case.gpu)
    stages = 0 if "blocks" in options else default_prefill(*case[:3], sparse=case.sparse).num_stages
    check(report, case.gpu, case.dtype, str(case), stages=stages)
    if line and is_of_these_versions(PAGE.read_text()):
        written = f"| {' | '.join(kernel_table.triton_row(case, report))} |"
        assert line == written, "run python -m tools.kernel_table"
    recorded.passed()


@pytest.mark.slow
@pytest.mark.parametrize("case", matrix(default_prefill), ids=str)
def test_prefill_compiles_for_every_architecture_as_the_page_says(case):
    begin = f"| {' | '.join(kernel_table.triton_name(case))} |"
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(begin)]
    assert len(lines) == 1, "run python -m tools.kernel_table"
    check_prefill(case, line=lines[0])


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100", "h200", "b200"])
def test_windows_and_bidirectional_images_cost_no_spills(gpu):
    check_prefill(Case(gpu, 128, "bfloat16"), visibility=Visibility(True, window=1024))


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100", "h200"])
@pytest.mark.parametrize(("head_dim", "heads"), [(256, (8, 4)), (128, (32, 16))])
def test_prefill_compiles_for_the_layers_of_gemma3(gpu, head_dim, heads):
    check_prefill(
        Case(gpu, head_dim, "bfloat16"),
        q_heads=heads[0],
        kv_heads=heads[1],
        visibility=Visibility(True, 1024),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "head_dim"), [("h200", 128), ("h200", 256), ("l40s", 256)])
def test_it_compiles_for_masks_with_other_blocks_than_its_own(gpu, head_dim):
    # 128 x 64 is what `BlockMask` takes by default.
    check_prefill(Case(gpu, head_dim, "bfloat16"), blocks=(128, 64), whole=True)


@pytest.mark.slow
def test_arrays_may_be_larger_than_32_bit_offsets():
    # 1.2M tokens x 16 key heads x 128: an index of k does not fit 32 bits, nor does one of q.
    large = {"tokens": 1_200_000, "q_heads": 64, "kv_heads": 16}
    check_prefill(Case("h200", 128, "bfloat16"), **large)
    for kernel_of in (triton_prefill, triton_gradients):
        for options in (large, {}):
            kernel = kernel_of("h200", 128, "bfloat16", **options)
            with compiling_for("sm_90"):
                calls = kernel_constants(kernel.function, kernel.arguments)
            wide = [value for each in calls for name, value in each.items() if "WIDE" in name]
            assert wide and set(wide) == {bool(options)}


@pytest.mark.slow
@pytest.mark.parametrize("case", DECODE_MATRIX, ids=str)
def test_decode_compiles_for_every_architecture(case):
    require_gpu_compiler()
    gpu, _, dtype = case
    kernel = triton_decode(*case)
    digest = triton_digest(kernel.function, kernel.arguments, gpu)
    recorded = ProgramCheck.of(f"triton-decode-{case}", digest)
    if recorded.has_passed:
        return
    attending, combining = triton_launches(kernel.function, kernel.arguments, gpu)
    assert (attending.name, combining.name) == ("decode_attention", "combine_splits")
    for launch in (attending, combining):
        check_parameters(launch)
    check(attending.report(gpu), gpu, dtype, str(case))
    assert math.prod(attending.grid) >= TARGETS[gpu].cores, "programs leave cores idle"
    assert combining.report(gpu).spilled == 0
    recorded.passed()


def check_gradients(gpu, head_dim, dtype, *, lines=(), **options) -> None:
    """Compiles the kernels of the gradients, unless the same kernels have been checked before."""
    require_gpu_compiler()
    kernel = triton_gradients(gpu, head_dim, dtype, **options)
    windowed = options.get("visibility", CAUSAL).window is not None
    chosen = gradient_configurations(gpu, head_dim, dtype, windowed=windowed)
    digest = triton_digest(kernel.function, kernel.arguments, gpu)
    recorded = ProgramCheck.of(f"triton-gradients-{gpu}-{head_dim}-{dtype}", digest, *lines)
    if recorded.has_passed:
        return
    launches = triton_launches(kernel.function, kernel.arguments, gpu)
    reports = {launch.name: launch.report(gpu) for launch in launches}
    assert list(reports) == ["query_gradients", "key_gradients"]
    for launch in launches:
        check_parameters(launch)
        said = f"{launch.name} {gpu} {head_dim} {dtype}"
        # There, tiles of 64 keys do not fit into registers.
        of_warps = launch.name == "key_gradients" and gpu in ("h200", "b200") and head_dim == 256
        product = "HMMA" if of_warps else None
        stages = chosen[launch.name].num_stages
        check(reports[launch.name], gpu, dtype, said, product, stages)
    if lines and is_of_these_versions(PAGE.read_text()):
        rows = kernel_table.gradient_rows(gpu, head_dim, dtype, reports)
        written = [f"| {' | '.join(row)} |" for row in rows]
        assert list(lines) == written, "run python -m tools.kernel_table"
    recorded.passed()


@pytest.mark.slow
@pytest.mark.parametrize("case", GRADIENT_MATRIX, ids=str)
def test_gradients_compile_for_every_architecture_as_the_page_says(case):
    lines = []
    for name, chosen in gradient_configurations(*case).items():
        begin = f"| {' | '.join(kernel_table.gradient_name(*case, name, chosen))} |"
        lines += [line for line in PAGE.read_text().splitlines() if line.startswith(begin)]
    assert len(lines) == 2, "run python -m tools.kernel_table"
    check_gradients(*case, lines=lines)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100", "h200", "b200"])
@pytest.mark.parametrize(("head_dim", "heads"), [(256, (8, 4)), (128, (32, 16))])
def test_gradients_compile_for_the_layers_of_gemma3(gpu, head_dim, heads):
    check_gradients(
        gpu,
        head_dim,
        "bfloat16",
        q_heads=heads[0],
        kv_heads=heads[1],
        visibility=Visibility(True, 1024),
    )


@pytest.mark.slow
def test_a_program_for_an_absent_gpu_contains_the_kernels_and_no_copy_of_the_cache():
    """A layer's prefill and decode in one jitted program, with PTX that JAX's assembler reads."""
    require_gpu_compiler()
    prefill = triton_prefill("h200", 128, "bfloat16")
    decode = triton_decode("h200", 128, "bfloat16", layers=2, rows=36_000)

    @jax.jit
    def layer(arguments, query):
        q, k, v, schedule, head_category, index = arguments
        out, _ = prefill.function(q, k, v, schedule, head_category, index)
        lengths = jnp.full((1,), 36_000, jnp.int32)
        next_out, _ = decode.function(query, k[:, None], v[:, None], index, lengths)
        return out, next_out

    arguments = (prefill.arguments, decode.arguments[0])
    launches = triton_launches(layer, arguments, "h200")
    names = [launch.name for launch in launches]
    assert names == ["prefill_attention", "decode_attention", "combine_splits"]
    for launch in launches:
        version = launch.ptx.split(".version ")[1].split()[0]
        assert tuple(map(int, version.split("."))) <= (8, 8), "CUDA 12.9 must read it"
    compiled = compile_for(layer, arguments, "h200")
    assert compiled.as_text().count("triton_kernel_call") >= 3
    _, k, *_ = prefill.arguments
    cache = 2 * math.prod(k.shape)
    parts = prefill.arguments[3].parts.count * 4 * prefill.arguments[3].block_q * 129 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * parts + cache // 4


@pytest.mark.slow
def test_all_programs_of_a_published_model_contain_the_kernels(monkeypatch):
    """Lowered for an absent GPU: the kernels themselves are tested one by one."""
    require_gpu_compiler()
    programs = []

    def only_lowered(function, arguments, gpu):
        programs.append(lowered(function, arguments, gpu).as_text())
        return Uncompiled(jax.eval_shape(function, *arguments))

    monkeypatch.setattr(memory_table, "compile_for", only_lowered)
    with compiling_for("sm_90"):
        memory_table.measure("Qwen2-VL-2B", 36_000, backend="triton")
    # Towers, chunks of a prompt and decoding; the last program only moves rows of the cache.
    *attending, moving = programs
    assert len(attending) > 3 and all("triton_kernel_call" in text for text in attending)
    assert "kernel_call" not in moving
    assert not any("xla.gpu.triton" in text for text in programs), "a kernel is written in Pallas"


def loss_of(backend, remember=lambda function: function):
    """The gradients of a sum over `sparse_attention`, as a function of q, k, v and a mask."""

    def loss(q, k, v, mask):
        attend = remember(lambda *arrays: bsjax.sparse_attention(*arrays, backend=backend))
        return attend(q, k, v, mask).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))


def training_arguments(tokens, *, gradients=True):
    """Queries, keys and values of a 7B, and a mask with images of 500 tokens."""
    template = Template.from_segments([Text(12), Image(500)] * (tokens // 512))
    mask = BlockMask(template, ["INTRA_IMAGE_SINK"] * 28, gradients=gradients)
    q = jax.ShapeDtypeStruct((tokens, 28, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((tokens, 4, 128), jnp.bfloat16)
    return q, k, k, mask


@pytest.mark.parametrize("backend", ["pallas", "triton"])
def test_gradients_are_kernels_if_the_mask_has_what_they_need(backend):
    def kernels(function, **options):
        with compiling_for("sm_90"):
            return kernel_names(function, training_arguments(1024, **options))

    forward = ["prefill_attention"] if backend == "triton" else []
    gradients = ["query_gradients", "key_gradients"]
    assert kernels(loss_of(backend)) == forward + gradients
    # What is not kept is computed again.
    assert kernels(loss_of(backend, jax.checkpoint)) == 2 * forward + gradients
    assert kernels(loss_of(backend), gradients=False) == forward


@pytest.mark.slow
def test_the_memory_of_gradients_is_linear_in_tokens():
    require_gpu_compiler()
    for tokens in (9_216, 36_864):
        with compiling_for("sm_90"):
            program = compile_for(jax.jit(loss_of("triton")), training_arguments(tokens), "h200")
        # Such as queries, outputs and their gradients in packed order, and gradients of keys in
        # float32. The scores of one head alone would take three times as much at 36K tokens.
        queries = 2 * tokens * 28 * 128
        assert program.memory_analysis().temp_size_in_bytes < 4 * queries


def test_the_table_has_every_entry_once():
    entries = read_table(table_of("triton"))
    keys = [(entry["target"], entry["width"], entry["bytes"], entry["heads"]) for entry in entries]
    wanted = [
        (target, width, itemsize, heads)
        for target in TARGET_NAMES
        for width in WIDTHS
        for itemsize in (2, 4)
        for heads in ("dense", "sparse")
    ]
    assert sorted(keys) == sorted(wanted)
    assert {entry["basis"] for entry in entries} <= {"compiled", "measured"}
