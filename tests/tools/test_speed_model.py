"""The model of speed counts, simulates and adds up as it says, and its page is what it prints."""

import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.workloads import SHAPES, Workload
from bsjax import HeadCategory
from bsjax.gpu.configurations import ConfigurationTable, compiling_for
from bsjax.masks.launch_order import LaunchItem
from bsjax.masks.query_rows import QueryRows
from bsjax.masks.rows import Rows, Span
from bsjax.masks.schedule import Tile, build_schedule, build_span_schedule, category_tables
from bsjax.masks.template import Image, Template, Text
from tools import compiled_kernels
from tools.sass import loops_over_blocks
from tools.speed import comparison, page
from tools.speed.kernels import HEAD_DIMS, PACKAGES, costs_of, kernel, kernels
from tools.speed.launches import Launch, launch_of
from tools.speed.loops import Loop, alone, loop_of, shared, waits
from tools.speed.prediction import predict
from tools.speed.rates import EMPTY_CYCLES, L2_LATENCY, rates_of
from tools.speed.simulation import simulate
from tools.speed.whole import predict_whole

H200 = rates_of("h200")

SASS = """
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   DEPBAR.LE SB0, 0x1 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], RZ, !UPT ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   MUFU.EX2 R5, R6 ;
        /*0060*/                   FFMA R5, R5, R6, R7 ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R187], desc[UR24][R92.64], !P3 ;
        /*0080*/              @!P3 LDGSTS.E [R105], desc[UR24][R100.64], !P4 ;
        /*0090*/                   LDGDEPBAR ;
        /*00a0*/               @P3 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
"""
"""A loop in the form of the disassembler's."""


def test_a_small_loop_is_counted():
    (instructions,) = loops_over_blocks(textwrap.dedent(SASS).replace("/*", " /*", 1))
    assert len(instructions) == 10
    loop = loop_of(instructions, warps=8, block_flops=0)
    assert loop.instructions == 10 and loop.exponentials == 1
    # Two products of 64 x 64 x 16, by both groups of four warps.
    assert loop.flops == 2 * 2 * (2 * 64 * 64 * 16)
    # 16 bytes for each of 256 threads; 4 bytes for each of 64 keys.
    assert loop.copied_bytes == 256 * 16 + 64 * 4
    kinds = [kind for kind, _, amount in loop.events if kind != "issue"]
    assert kinds == ["await copies", "product", "product", "products", "await products", "copies"]
    assert ("await copies", "", 1) in loop.events


def test_small_products_and_blackwell_are_counted():
    def loop(*lines):
        sass = ".L_x_1:\n" + "\n".join(
            f"        /*{16 * number:04x}*/  {line} ;"
            for number, line in enumerate([*lines, "MUFU.EX2 R1, R2", "BRA `(.L_x_1)"])
        )
        return loops_over_blocks(sass)[0]

    ampere = loop_of(loop(*["HMMA.16816.F32.BF16 R4, R8, R2, R4"] * 3), 4, block_flops=0)
    assert ampere.flops == 3 * 4 * (2 * 16 * 8 * 16)
    queries = "UTCHMMA gdesc[UR12], gdesc[UR10], tmem[UR8], tmem[UR18], idesc[UR19], !UPT"
    weights = "UTCHMMA tmem[UR30], gdesc[UR12], tmem[UR28], tmem[UR18], idesc[UR19], UPT"
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR31], R36"
    lines = [queries, queries, "UTCBAR [UR71], URZ", weights, "UTCBAR [UR31], URZ", wait]
    blackwell = loop_of(loop(*lines), 8, block_flops=4096)
    assert blackwell.flops == 4096
    amounts = [amount for kind, _, amount in blackwell.events if kind == "product"]
    assert amounts == [1024, 1024, 2048]
    assert ("await products", "[UR31]", 0) in blackwell.events
    with pytest.raises(ValueError, match="UTMALDG"):
        loop_of(loop("UTMALDG.2D [UR8], [UR4]"), 8, block_flops=0)


def events(*of_iteration):
    return Loop(of_iteration, exponentials=0)


def test_a_copy_costs_its_latency_only_if_it_is_waited_for_at_once():
    copy, work = ("copies", "", 16384), ("issue", "", 400)
    at_once = events(copy, ("await copies", "", 0), work)
    ahead = events(("await copies", "", 1), work, copy)
    arrival = L2_LATENCY + 16384 / H200.l2
    assert waits(at_once, 8, H200) == pytest.approx(arrival)
    assert waits(ahead, 8, H200) == 0
    assert alone(at_once, 8, H200) == pytest.approx(alone(ahead, 8, H200) + arrival)


def test_a_product_overlaps_with_what_comes_before_the_wait_for_it():
    product, work = ("product", "go on", 4096 * 500), ("issue", "", 100)
    group, wait = ("products", "wgmma", 0), ("await products", "wgmma", 0)
    issue = alone(events(work), 8, H200)
    assert alone(events(product, group, wait, work), 8, H200) > 500 + issue
    assert alone(events(product, group, work, wait), 8, H200) < 500 + issue
    # Tensor cores limit several programs together, however well they overlap.
    assert shared(events(product, group), 8, H200, 1) == 500


programs = st.lists(st.floats(1, 1e4), min_size=1, max_size=60)


@given(cycles=programs, multiprocessors=st.integers(1, 8))
def test_one_program_at_a_time_is_greedy(cycles, multiprocessors):
    end, busy = simulate(cycles, multiprocessors)
    assert busy.sum() == pytest.approx(sum(cycles))
    assert busy.max() == pytest.approx(end)
    mean, longest = sum(cycles) / multiprocessors, max(cycles)
    assert end >= max(mean, longest) - 1e-6
    # No slot is idle while a program has not started.
    assert end <= mean + longest * (1 - 1 / multiprocessors) + 1e-6


@settings(max_examples=60)
@given(
    cycles=programs,
    multiprocessors=st.integers(1, 5),
    resident=st.integers(2, 3),
    crowding=st.floats(0.1, 1.0),
)
def test_programs_on_one_multiprocessor_share_it(cycles, multiprocessors, resident, crowding):
    end, busy = simulate(cycles, multiprocessors, resident, crowding)
    assert busy.sum() == pytest.approx(sum(cycles))
    speed = min(resident, 1 / crowding)
    assert end >= max(sum(cycles) / (multiprocessors * speed), max(cycles)) * (1 - 1e-9)
    one_at_a_time, _ = simulate(cycles, multiprocessors)
    assert end <= one_at_a_time * 2 + 1e-6
    # If each needs all of the multiprocessor, having two at a time gains nothing.
    alike = [100.0] * (multiprocessors * resident)
    assert simulate(alike, multiprocessors, resident, 1.0).end == pytest.approx(100.0 * resident)
    assert simulate(alike, multiprocessors, resident, 0.0).end == pytest.approx(100.0)


TEMPLATE = Template.from_segments([Text(8), Image(200)] * 6 + [Text(30)])


def test_a_launch_is_the_grid_of_the_kernel():
    heads = [HeadCategory.SINK, HeadCategory.DENSE, HeadCategory.SINK, HeadCategory.INTRA_IMAGE]
    rows = Rows([TEMPLATE], [Span(0, TEMPLATE.tokens)], packed=True)
    schedule = build_span_schedule(
        rows,
        rows,
        category_tables(heads),
        block_q=64,
        block_kv=32,
        stacked_heads=2,
        most_parts=8,
    )
    launch = launch_of(schedule, heads, kv_heads=2)
    items = list(map(LaunchItem._make, schedule.launch_columns.tolist()))
    assert launch.empty.size == 2 * len(items)
    assert any(item.head < 0 for item in items) and any(item.head > 0 for item in items)
    for place in range(launch.empty.size):
        item, kv_head = items[place // 2], place % 2
        table = -1 if item.head < 0 else heads[2 * kv_head + item.head]
        tile = Tile(*schedule.tile_columns[table, item.tile].tolist())
        assert launch.empty[place] == (tile.rows * item.heads == 0)
        if item.heads:
            assert launch.full[place] == tile.full_blocks
            assert launch.partial[place] == tile.partial_blocks
        else:
            assert launch.full[place] == launch.partial[place] == 0
    # Every block of each query head and, stacked, of each key head.
    blocks = schedule.tiles.blocks.sum(axis=1)
    assert launch.blocks == sum(blocks[table] for table in [*heads, -1, -1])
    costs = costs_of(kernel("pallas", "h200", 128, sparse=True), "h200", 2)
    cycles = launch.cycles(costs)
    assert (cycles[launch.empty] == EMPTY_CYCLES).all()
    assert (cycles[~launch.empty] >= costs.program).all()


@pytest.mark.parametrize("gpu", ["h200", "a100"])
def test_losses_and_useful_time_add_up_to_the_end_of_the_simulation(gpu):
    mask = [HeadCategory.INTRA_IMAGE_SINK] * 4
    chosen = kernel("pallas", gpu, 128, sparse=True)
    schedule = build_schedule(
        TEMPLATE, category_tables(mask), block_q=chosen.chosen.block_q, block_kv=32
    )
    launch = launch_of(schedule, mask, kv_heads=2)
    rows = Rows([TEMPLATE], [Span(0, TEMPLATE.tokens)], packed=True)
    groups = HeadCategory.INTRA_IMAGE_SINK.groups
    queries = QueryRows(rows, 0, rows, schedule.visibility)
    every_row = np.arange(TEMPLATE.tokens)
    ranges = [queries.ranges(segment, groups, every_row) for segment in queries.segments]
    pairs = 4 * sum(int((high - low).sum()) for low, high in ranges)
    found = predict(launch, pairs, chosen, gpu, group=2)
    costs, own = costs_of(chosen, gpu, 2), rates_of(gpu)
    end, _ = simulate(launch.cycles(costs), own.multiprocessors, costs.resident, costs.crowding)
    assert found.seconds * own.clock == pytest.approx(end)
    assert min(found[:5]) >= 0 and found.tails >= 0
    # Some loss must be found where blocks are cut.
    assert found.unseen > 0 and found.predicate > 0 and found.tiles > 0


def test_a_launch_of_equal_programs_has_only_the_last_wave_to_lose():
    chosen = kernel("pallas", "h200", 128, sparse=False)
    equal = np.full(133, 50)
    launch = Launch(equal, 0 * equal, np.zeros(133, bool))
    found = predict(launch, 133 * 50 * 128 * 64, chosen, "h200", 7)
    assert found.unseen == found.predicate == found.empty == found.tails == found.order == 0
    # Two waves, the second for a single program.
    assert found.seconds / (found.useful + found.tiles) == pytest.approx(2 / (133 / 132))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_long_dense_prompt_approaches_the_rate_of_the_loop(package):
    workload = Workload(SHAPES["qwen2.5-vl-7b"], 150 * 1024, 1000)
    (mask,) = workload.masks(["DENSE"])
    found = predict_whole(workload, mask, package, "h200")
    chosen = kernel(package, "h200", 128, sparse=False)
    costs = costs_of(chosen, "h200", 7)
    flops = 4 * chosen.chosen.block_q * chosen.chosen.block_kv * 128
    loop = flops / costs.full * costs.speed * H200.multiprocessors
    rate = workload.dense_flops / found.seconds / H200.clock
    assert 0.98 * loop < rate < loop


def test_the_fitted_constants_fit():
    """Blocks of both kernels on an H100 take about the cycles of the published measurement.

    They do what a block of the kernel that was measured does, in a few more or less instructions.
    """
    for package in PACKAGES:
        costs = costs_of(kernel(package, "h100", 128, sparse=True), "h100", 7)
        assert costs.full == pytest.approx(2030, rel=0.06)


def test_kernels_multiply_what_a_block_needs_or_more():
    known = list(kernels()[1].values())
    assert {(each.package, each.head_dim) for each in known} >= {
        (package, head_dim) for package in PACKAGES for head_dim in HEAD_DIMS
    }
    for each in known:
        needed = 4 * each.chosen.block_q * each.chosen.block_kv * each.head_dim
        for loop in (each.full, each.partial):
            assert loop.flops >= needed
            # Keys and values of a block, in 16 bits.
            assert loop.copied_bytes >= 2 * each.chosen.block_kv * each.head_dim * 2
        if each.gpu in ("h200", "b200"):
            assert each.full.flops == needed, "no product is computed twice"


def test_the_figures_are_those_of_the_table_of_configurations():
    """If not: python -m tools.speed_model --compile --page."""
    for each in kernels()[1].values():
        table = ConfigurationTable(f"bsjax.{each.package}")
        with compiling_for(compiled_kernels.target_name(each.gpu)):
            blocks = table.default_blocks(each.head_dim, "bfloat16", sparse=each.sparse)
            assert each.chosen == table.configuration(each.head_dim, "bfloat16", *blocks)


def test_the_page_has_the_tables_that_the_tool_prints():
    """If not: python -m tools.speed_model --page."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.inputs_table() in text and page.loops_table() in text
    assert f"\n{comparison.falsifiers()}\n" in text
    table = page.predictions_table(predict_whole, 400, thousands=(36,))
    lines, of_page = (set(each.replace(" ", "").splitlines()[2:]) for each in (table, text))
    assert len(lines) == len(PACKAGES) * len(page.MASKS) and lines <= of_page
    other = page.with_table(text, "inputs", "| a table |")
    assert page.inputs_table() not in other and page.loops_table() in other
    with pytest.raises(ValueError, match="no markers"):
        page.with_table(text, "nothing", "")
