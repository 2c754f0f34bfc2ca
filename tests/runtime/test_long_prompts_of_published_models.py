"""Long prompts through published models, compiled for an H200: memory stays within its goals.

Array sizes are read from the text of the compiled programs, peaks from their memory analysis. Each
model has one test, which compiles nothing if its programs are the same as when they were checked.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from benchmarks.published_models import PUBLISHED_MODELS
from bsjax.checkpoint.loading import abstract_module
from bsjax.gpu.configurations import compiling_for
from bsjax.models import FAMILIES, Architecture
from bsjax.runtime.images import ImageEncoder, ImageGroup, image_groups
from bsjax.runtime.programs import Memory, Programs, Stage
from bsjax.runtime.sizes import cache_rows, sizes_in_use
from tests.support.checked_programs import ProgramCheck, check_of_published_model
from tests.support.gpu_compiler import require_gpu_compiler
from tools import memory_table
from tools.compiled_kernels import target_name
from tools.gpu_targets import compile_for
from tools.memory_table import NEW_TOKENS, Measurement

pytestmark = pytest.mark.slow


@pytest.fixture
def check_of(monkeypatch) -> Callable[[Callable[[], Any]], ProgramCheck]:
    """The check of all programs that a call compiles with `tools.memory_table`."""
    require_gpu_compiler()
    return partial(check_of_published_model, monkeypatch)


def largest_array(compiled) -> int:
    """Elements of the largest array that the optimized program mentions."""
    shapes = re.findall(r"\b(?:pred|[sufb]f?\d+)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def copied_shapes(compiled) -> list[list[int]]:
    """Shapes of all arrays that the optimized program copies."""
    shapes = re.findall(r" = \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    return [list(map(int, shape.split(","))) for shape in shapes]


def largest_group(groups: Sequence[ImageGroup]) -> int:
    """The most patches of a group."""
    return max(group.arguments()[0].values.shape[0] for group in groups)


def check_that_none_holds_a_square_array(
    stages: Sequence[Stage], patches: int, tokens: int = 0
) -> None:
    """No array has tokens x tokens elements, or the square of a group's patches."""
    side = {"vision": patches, "prefill": tokens, "decode": tokens, "rows": tokens}
    for program, name in {stage.program: stage.name for stage in stages}.items():
        assert largest_array(program.compiled) < side[name] ** 2 / 2, name
        if name in ("vision", "prefill"):
            text = program.compiled.as_text()
            assert "prefill_attention" in text, f"the GPU kernel is not in {name}"
        one_head_of_scores = 2 * side[name] ** 2
        assert program.memory.temporaries < one_head_of_scores, name


def check_all_stages(found: Measurement) -> None:
    assert {stage.name for stage in found.stages} == {"vision", "prefill", "decode", "rows"}
    with compiling_for(target_name(found.target)):
        groups = image_groups(found.inputs.architecture, found.inputs.images, "pallas")
    check_that_none_holds_a_square_array(found.stages, largest_group(groups), found.inputs.tokens)


def test_the_tower_of_qwen2_vl():
    """It has no windows. The rest of the model is that of the 7B below."""
    require_gpu_compiler()
    config = PUBLISHED_MODELS["Qwen2-VL-2B"]()
    architecture = Architecture(FAMILIES["qwen2_vl"], config, memory_table.DTYPE)
    programs = Programs(abstract_module(architecture), lambda *jitted: compile_for(*jitted, "h200"))
    features = jax.ShapeDtypeStruct((8192, 1536), memory_table.DTYPE)
    with compiling_for(target_name("h200")):
        prompt = memory_table.image_prompt(config, 32_300)
        groups = image_groups(architecture, prompt.images, "pallas")
    encoder = ImageEncoder(programs, groups, features, lambda tokens: tokens, "pallas")
    check_that_none_holds_a_square_array(encoder.stages, largest_group(groups))


@pytest.fixture
def largest_chunks(monkeypatch):
    """Only chunks of the largest size, which take the most memory. Compiling takes long."""

    def sizes():
        sizes = sizes_in_use()
        return sizes._replace(chunks=sizes.chunks[-1:])

    monkeypatch.setattr("bsjax.runtime.prefill.sizes_in_use", sizes)


@pytest.mark.usefixtures("largest_chunks")
def test_300k_tokens_of_the_7b(check_of, monkeypatch):
    measure = partial(memory_table.measure, "Qwen2.5-VL-7B", 300_000)
    recorded = check_of(measure)
    if recorded.has_passed:
        return
    found = measure()
    check_all_stages(found)
    assert found.inputs.tokens == 300_000 and found.inputs.template.num_images == 297
    assert found.peak == found.weights + max(stage.peak for stage in found.stages)
    assert found.cache > 28 * 2 * 300_064 * 4 * 128 * 2
    assert found.weights == pytest.approx(8.29e9 * 2, rel=0.01), "the published model has 8.29 B"

    # A chunk copies neither the whole cache nor a layer of it, not even into a short-lived buffer.
    of_layer = cache_rows(300_000 + NEW_TOKENS) * 4 * 128
    (chunk,) = (stage.program for stage in found.stages if stage.name == "prefill")
    assert chunk.memory.results < 2**10, "the cache is updated in place"
    for shape in copied_shapes(chunk.compiled):
        assert math.prod(shape) < of_layer

    assert (found.model, found.inputs.tokens) in memory_table.GOALS
    assert found.missed_goal is None
    most = found.temporaries()
    for goal in (most, most - 1):
        monkeypatch.setitem(memory_table.GOALS, (found.model, 300_000), goal)
        assert (found.missed_goal is None) == (goal == most)
    assert f"{most / 2**30:.2f} GiB" in (found.missed_goal or ""), "named with its figure"

    profiling = (Stage("heads", SimpleNamespace(memory=Memory(2**30, 0, 0))),)
    page = memory_table.markdown([found], {("h200", found.model): profiling})
    assert "| Qwen2.5-VL-7B | 300,000 | 297 |" in page
    assert "| NVIDIA H200 | Qwen2.5-VL-7B | 32,768 | 1.00 |" in page
    recorded.passed()


@pytest.mark.usefixtures("largest_chunks")
def test_131k_tokens_of_gemma3_4b(check_of):
    measure = partial(memory_table.measure, "Gemma-3-4B", 131_000)
    recorded = check_of(measure)
    if recorded.has_passed:
        return
    found = measure()
    check_all_stages(found)
    assert (found.model, found.inputs.tokens) in memory_table.GOALS
    assert found.missed_goal is None

    # Local layers keep their window, and nothing is copied.
    rows = cache_rows(131_000 + NEW_TOKENS)
    row = 2 * 4 * 256 * 2
    assert found.cache == (29 * 1023 + 5 * rows) * row
    assert found.full_cache == 34 * rows * row
    of_rings = 29 * 1023 * 4 * 256
    for stage in found.stages:
        if stage.name == "prefill":
            for shape in copied_shapes(stage.program.compiled):
                assert math.prod(shape) < of_rings, "the rings are read before they are written"
    (decode,) = (stage for stage in found.stages if stage.name == "decode")
    assert decode.program.memory.temporaries < 2**23, "a copy of a ring would be 31 MB"
    assert decode.program.memory.results < 2**14, "the caches are updated in place"
    recorded.passed()


def test_profiling_32k_tokens_of_the_7b_takes_little_more_than_the_weights(check_of):
    """Any GPU that can answer such a prompt can profile on it: no stage keeps a square array."""
    measure = partial(memory_table.measure_profiling, "Qwen2.5-VL-7B", 32_768)
    recorded = check_of(measure)
    if recorded.has_passed:
        return
    stages = measure()
    assert [stage.name for stage in stages] == ["heads", "sinks", "comparing"]
    one_head_of_scores = 2 * 32_768**2
    for stage in stages:
        assert "attention" in stage.program.compiled.as_text(), "the GPU kernel is missing"
        assert stage.peak < 3 * 2**30, stage.name
    assert stages[-1].program.memory.temporaries < one_head_of_scores
    recorded.passed()
