"""The GPU kernel compiles for real GPUs: tensor cores, no spills, within shared memory."""

import subprocess
import sys

import jax
import pytest

from bsjax.errors import BackendError
from bsjax.gpu.configurations import (
    TARGETS,
    WIDTHS,
    KernelConfiguration,
    compiling_for,
    target_in_use,
    target_of,
)
from bsjax.masks.visibility import Visibility
from bsjax.pallas.configurations import configuration, default_blocks
from tests.support.checked_programs import ProgramCheck
from tests.support.gpu_compiler import require_gpu_compiler
from tests.support.paths import ROOT
from tools import compiled_kernels, gpu_targets, kernel_lines
from tools.compiled_kernels import prefill_kernel
from tools.configuration_table import TABLE, read_table, write_table
from tools.gpu_targets import KernelReport
from tools.kernel_lines import PAGE, Case, matrix
from tools.sass import attention_loops, mix, opcodes

# Two kernels are always compiled. Others need not be compiled again if nothing that determines them
# has changed since they were checked.
ALWAYS = {f"{gpu}-128-bfloat16-sparse" for gpu in ("a100", "h200")}


def check_kernel(case: Case, chosen: KernelConfiguration, *, line: str = "", **options) -> None:
    """Compiles a kernel and checks it, unless the same kernel has been checked before.

    Args:
      case: the kernel.
      chosen: its configuration.
      line: what the page should say about it; "" for kernels that are not on the page.
      options: more arguments of `compile_prefill`.
    """
    require_gpu_compiler()
    kernel = prefill_kernel(*case[:3], sparse=case.sparse, **options)
    recorded = ProgramCheck.of(str(case), kernel.digest(), line)
    always = not options and str(case) in ALWAYS
    if recorded.has_passed and not always:
        return
    report = kernel.report()
    check(report, case, chosen)
    # Another JAX compiles differently.
    if line and f"with JAX {jax.__version__}," in PAGE.read_text():
        written = f"| {' | '.join(kernel_lines.row(case, report))} |"
        assert line == written, "run python -m tools.kernel_table"
    recorded.passed()


def check(report: KernelReport, case: Case, chosen: KernelConfiguration) -> None:
    said = f"{case}, {chosen}"
    gpu = gpu_targets.TARGETS[case.gpu]
    limit = gpu.shared_memory_per_block
    assert report.spilled == 0, f"{said}: {report.spilled} bytes spilled"
    assert report.shared_memory <= limit, (
        f"{said}: {report.shared_memory} bytes of shared memory, {limit} are there: "
        f"{report.shared_memory - limit} too many"
    )
    assert report.threads == 32 * chosen.num_warps, said
    assert report.resident(gpu) >= 1, said
    used = set(opcodes(report.sass))
    assert "LDGSTS" in used, f"{said}: keys are not loaded asynchronously"
    products = {
        "a100": {"HMMA"},
        "l40s": {"HMMA"},
        "h200": {"HGMMA"},
        "b200": {"UTCHMMA"},
    }[case.gpu]
    # Products in TF32 or in halves would not be float32.
    expected = set() if case.dtype == "float32" else products
    found = {name for name in used if name.endswith("MMA")}
    assert found == expected, f"{said}: products are {found}, and should be {expected}"


@pytest.mark.slow
@pytest.mark.parametrize("case", matrix(), ids=str)
def test_it_compiles_for_every_architecture_as_the_page_says(case):
    chosen = compiled_kernels.default_prefill(*case[:3], sparse=case.sparse)
    begin = f"| {' | '.join(kernel_lines.name(case))} |"
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(begin)]
    assert len(lines) == 1, "run python -m tools.kernel_table"
    check_kernel(case, chosen, line=lines[0])


@pytest.mark.slow
def test_the_kernel_is_the_same_with_64_bit_jax():
    require_gpu_compiler()
    wanted = prefill_kernel("h200", 128, "bfloat16")
    with jax.enable_x64(True):
        with_x64 = prefill_kernel("h200", 128, "bfloat16")
        recorded = ProgramCheck.of("64-bit-jax", wanted.digest(), with_x64.digest())
        if recorded.has_passed:
            return
        assert with_x64.report().sass == wanted.report().sass
    recorded.passed()


@pytest.mark.parametrize(("same", "gpu"), [("rtx4090", "l40s"), ("h100", "h200")])
def test_gpus_of_one_architecture_run_the_same_kernels(same, gpu):
    """So the tests compile for one GPU per architecture; nothing else about a GPU matters."""
    one, other = gpu_targets.TARGETS[same], gpu_targets.TARGETS[gpu]
    assert one.architecture == other.architecture
    assert one.shared_memory_per_block == other.shared_memory_per_block
    assert one.shared_memory_per_core == other.shared_memory_per_core
    assert one.threads_per_core == other.threads_per_core
    assert compiled_kernels.target_name(same) == compiled_kernels.target_name(gpu)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "head_dim", "dtype"),
    [("h200", 64, "bfloat16"), ("h200", 128, "float32")]
    + [(gpu, 256, "bfloat16") for gpu in ("a100", "h200")]
    + [(gpu, 128, "bfloat16") for gpu in ("a100", "l40s", "h200", "b200")],
)
def test_windows_bidirectional_images_and_lse_cost_no_spills(gpu, head_dim, dtype):
    chosen = compiled_kernels.default_prefill(gpu, head_dim, dtype)
    visibility = Visibility(True, window=1024)
    check_kernel(Case(gpu, head_dim, dtype), chosen, return_lse=True, visibility=visibility)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "head_dim", "dtype"),
    [
        ("a100", 128, "bfloat16"),
        ("l40s", 256, "bfloat16"),
        ("l40s", 256, "float32"),
        ("h200", 64, "bfloat16"),
        ("h200", 256, "bfloat16"),
        ("h200", 256, "float32"),
        ("b200", 256, "float32"),
    ],
)
def test_it_compiles_for_masks_with_other_blocks_than_its_own(gpu, head_dim, dtype):
    # 128 x 64 is what `BlockMask` takes by default.
    with compiling_for(compiled_kernels.target_name(gpu)):
        chosen = configuration(head_dim, dtype, 128, 64)
    check_kernel(Case(gpu, head_dim, dtype), chosen, blocks=(128, 64), whole=True)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [(128, 128), (64, 128)])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_larger_blocks_are_walked_in_steps(head_dim, blocks):
    with compiling_for("sm_90"):
        chosen = configuration(head_dim, "bfloat16", *blocks)
    assert chosen.block_kv < 128
    check_kernel(Case("h200", head_dim, "bfloat16"), chosen, blocks=blocks, whole=True)


@pytest.mark.slow
def test_windows_of_a_vision_tower_take_tiles_of_their_size():
    with compiling_for("sm_90"):
        chosen = configuration(80, "bfloat16", 64, 64)
    assert chosen.block_q == 64, "a window's 64 rows should be one program's"
    check_kernel(Case("h200", 80, "bfloat16"), chosen, blocks=(64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100", "h200"])
@pytest.mark.parametrize(
    ("head_dim", "heads", "tokens"), [(256, (8, 4), 131_000), (128, (32, 16), 65_536)]
)
def test_it_compiles_for_the_layers_of_gemma3(gpu, head_dim, heads, tokens):
    """Local and global layers of the 4B and the 27B, at prompt lengths that are used."""
    chosen = compiled_kernels.default_prefill(gpu, head_dim, "bfloat16")
    for window in (1024, None):
        check_kernel(
            Case(gpu, head_dim, "bfloat16"),
            chosen,
            tokens=tokens,
            q_heads=heads[0],
            kv_heads=heads[1],
            visibility=Visibility(True, window),
        )


@pytest.mark.slow
def test_it_compiles_for_siglip_on_an_a100():
    check_kernel(
        Case("a100", 72, "bfloat16"),
        compiled_kernels.default_prefill("a100", 72, "bfloat16"),
        tokens=65_536,
        q_heads=16,
        kv_heads=16,
        visibility=Visibility(bidirectional_images=True),
    )


@pytest.mark.slow
def test_arrays_may_be_larger_than_32_bit_offsets():
    require_gpu_compiler()
    case = Case("h200", 128, "bfloat16")
    # 300K tokens x 64 heads x 128: an index of q does not fit 32 bits.
    large = prefill_kernel(*case[:3], tokens=300_000, q_heads=64, kv_heads=8, whole=True)
    small = prefill_kernel(*case[:3], whole=True)
    recorded = ProgramCheck.of("64-bit-offsets", large.digest(), small.digest())
    if recorded.has_passed:
        return
    reports = [large.report(), small.report()]
    check(reports[0], case, compiled_kernels.default_prefill(*case[:3]))
    # A 32-bit offset is widened at the end, before it is added to a pointer.
    widened = [
        report.ptx.count("mul.wide.s32") + report.ptx.count("cvt.s64.s32") for report in reports
    ]
    assert widened[0] < widened[1], f"q and out have 32-bit offsets: {widened}"
    recorded.passed()


@pytest.mark.slow
def test_full_blocks_evaluate_no_mask():
    require_gpu_compiler()
    kernel = prefill_kernel("h200", 128, "bfloat16")
    recorded = ProgramCheck.of("full-blocks", kernel.digest(), "full blocks")
    if recorded.has_passed:
        return
    full, partial = (mix(loop) for loop in attention_loops(kernel.report().sass))
    chosen = compiled_kernels.default_prefill("h200", 128, "bfloat16")
    scores = chosen.block_q * chosen.block_kv // (32 * chosen.num_warps)
    assert full["tensor"] == partial["tensor"]
    # One comparison per score at the very least.
    assert full["other"] + scores <= partial["other"]
    recorded.passed()


@pytest.mark.slow
def test_heads_of_80_channels_do_not_pay_for_128():
    require_gpu_compiler()
    kernels = {dim: prefill_kernel("h200", dim, "bfloat16") for dim in (64, 80, 128)}
    recorded = ProgramCheck.of("80-channels", *(kernel.digest() for kernel in kernels.values()))
    if recorded.has_passed:
        return
    memory = {dim: kernel.report().shared_memory for dim, kernel in kernels.items()}
    assert memory[80] < (memory[64] + memory[128]) / 2
    recorded.passed()


def test_the_table_has_every_entry_once():
    entries = read_table()
    keys = [(entry["target"], entry["width"], entry["bytes"], entry["heads"]) for entry in entries]
    wanted = [
        (target, width, itemsize, heads)
        for target in TARGETS
        for width in WIDTHS
        for itemsize in (2, 4)
        for heads in ("dense", "sparse")
    ]
    assert sorted(keys) == sorted(wanted)
    assert {entry["basis"] for entry in entries} <= {"compiled", "measured"}
    assert min(entry["num_stages"] for entry in entries) >= 2, "copies must overlap with products"


def test_measured_entries_are_replaced_only_by_measured_ones(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(TABLE.read_text())
    entry = read_table(path)[5] | {"block_kv": 128, "basis": "measured"}
    write_table([entry], path)
    assert entry in read_table(path) and len(read_table(path)) == len(read_table())
    write_table([entry | {"basis": "compiled", "block_kv": 16}], path)
    assert entry in read_table(path)
    write_table([entry | {"block_kv": 64}], path)
    assert entry not in read_table(path)


@pytest.mark.parametrize(
    ("capability", "target"),
    [("8.0", "sm_80"), ("8.6", "sm_89"), ("8.9", "sm_89"), ("9.0", "sm_90")]
    + [("10.0", "sm_100"), ("10.3", "sm_100"), ("12.0", "sm_89")],
)
def test_every_gpu_has_the_target_of_its_generation(capability, target):
    assert target_of(capability) == target


@pytest.mark.parametrize("capability", ["7.5", "gfx942", ""])
def test_gpus_without_a_kernel_are_refused(capability):
    with pytest.raises(BackendError, match="8.0 or later"):
        target_of(capability)


def test_compiling_for_a_target_ends_with_its_block():
    before = target_in_use()
    with compiling_for("sm_80"):
        assert target_in_use() == "sm_80"
        small = default_blocks(256, "bfloat16", sparse=True)
    assert target_in_use() == before
    with pytest.raises(BackendError, match="Unknown target 'sm_75'"), compiling_for("sm_75"):
        pass
    assert small == compiled_kernels.default_prefill("a100", 256, "bfloat16")[:2]


@pytest.mark.slow
def test_no_deprecation_warning_reaches_users():
    """A kernel is lowered where this warning is an error, unless bsjax ignores it."""
    require_gpu_compiler()
    code = """if True:
        import jax.numpy as jnp
        import bsjax
        from tools.gpu_targets import compile_for
        template = bsjax.Template.from_segments([bsjax.Text(50), bsjax.Image(200)])
        mask = bsjax.BlockMask(template, ["dense", "sink"])
        q = jnp.zeros((template.tokens, 2, 64), jnp.bfloat16)
        attend = lambda q, mask: bsjax.sparse_attention(q, q, q, mask, backend="pallas")
        assert "attention" in compile_for(attend, (q, mask)).as_text()
    """
    warning = "error:The Pallas Triton backend is deprecated:DeprecationWarning"
    process = subprocess.run(
        [sys.executable, "-W", warning, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
