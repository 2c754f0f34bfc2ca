"""Long prompts through published models, compiled for an H200: no array has tokens x tokens.

Array sizes are read from the text of the compiled programs, peaks from their memory analysis. No
array has tokens x tokens elements, or the square of a group's patches, and the peaks are far below
the size of such an array.
"""

import math
import re

import pytest

from bsjax.pallas.configurations import compiling_for
from bsjax.runtime.images import image_groups
from bsjax.runtime.sizes import cache_rows
from tests.support.published_memory import measured
from tools.compiled_kernels import target_name
from tools.memory_table import NEW_TOKENS

pytestmark = pytest.mark.slow


def largest_array(compiled) -> int:
    """Elements of the largest array that the optimized program mentions."""
    shapes = re.findall(r"\b(?:pred|[sufb]f?\d+)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def copied_shapes(compiled) -> list[list[int]]:
    """Shapes of all arrays that the optimized program copies."""
    shapes = re.findall(r" = \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    return [list(map(int, shape.split(","))) for shape in shapes]


@pytest.mark.parametrize(
    ("model", "tokens"),
    [("Qwen2-VL-2B", 32_300), ("Qwen2.5-VL-7B", 300_000), ("Gemma-3-4B", 131_000)],
)
def test_no_program_holds_a_square_array(model, tokens):
    found = measured(model, tokens)
    with compiling_for(target_name(found.target)):
        groups = image_groups(found.inputs.architecture, found.inputs.images, "pallas")
    patches = max(len(group.pixel_values()) for group in groups)
    side = {"vision": patches, "prefill": tokens, "decode": tokens, "rows": tokens}
    programs = {stage.program: stage.name for stage in found.stages}
    assert set(programs.values()) == set(side)
    for program, name in programs.items():
        assert largest_array(program.compiled) < side[name] ** 2 / 2, name
        if name in ("vision", "prefill"):
            text = program.compiled.as_text()
            assert "prefill_attention" in text, f"the GPU kernel is not in {name}"
        one_head_of_scores = 2 * side[name] ** 2
        assert program.memory.temporaries < one_head_of_scores, name


def test_no_chunk_copies_the_cache():
    """It copies neither the whole cache nor a layer of it, not even into a short-lived buffer."""
    found = measured("Qwen2.5-VL-7B", 300_000)
    rows = cache_rows(300_000 + NEW_TOKENS)
    of_layer = rows * 4 * 128
    chunks = [stage.program for stage in found.stages if stage.name == "prefill"]
    assert len(chunks) == 2, "two sizes"
    for chunk in chunks:
        assert chunk.memory.results < 2**10, "the cache is updated in place"
        for shape in copied_shapes(chunk.compiled):
            assert math.prod(shape) < of_layer


def test_gemma3s_local_layers_keep_their_window_and_decode_copies_nothing():
    found = measured("Gemma-3-4B", 131_000)
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
