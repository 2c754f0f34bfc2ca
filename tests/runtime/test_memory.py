"""Memory is bounded and known before anything runs; bounding it does not change results."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import bsjax
from bsjax import CapacityError
from bsjax.models import layers
from bsjax.runtime.answering import Answering, AnswerSettings
from bsjax.runtime.embedding import Embedding
from bsjax.runtime.inputs import group_borders, prepare_inputs
from bsjax.runtime.memory import Stage, check_memory
from bsjax.runtime.programs import Memory, programs_of, size_in_bytes
from bsjax.runtime.scoring import LOGIT_ROWS, Scoring
from tests.support.gpu_compiler import require_gpu_compiler
from tests.support.published_memory import measured
from tools import memory_table

SIZES = ((56, 84), (140, 56), (28, 28), (84, 112), (61, 93))


def conversation(order=(0, 1, 2, 3, 4), question="Which picture is brighter?"):
    parts = []
    for number in order:
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZES[number], 3), dtype=np.uint8)
        parts.append({"type": "image", "image": Image.fromarray(pixels)})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def inputs_of(model, messages, new_tokens=8):
    return prepare_inputs(
        model.architecture, model.prompt(messages), None, backend="xla", new_tokens=new_tokens
    )


def answering_of(model, messages, new_tokens=8):
    inputs = inputs_of(model, messages, new_tokens)
    return Answering(programs_of(model), inputs, AnswerSettings(new_tokens, "xla"))


@pytest.fixture(scope="module")
def logits(tiny_model):
    """Logits of a prompt with one group of images, which fits into one chunk of rows."""
    inputs = inputs_of(tiny_model, conversation())
    assert len(inputs.image_groups) == 1
    assert inputs.rows < min(layers.CHUNK_ROWS, LOGIT_ROWS)
    return bsjax.forward(tiny_model, conversation())


@pytest.fixture(scope="module")
def answering(tiny_model):
    """The stages of answering the same prompt."""
    return answering_of(tiny_model, conversation())


def assert_float32_close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128, 200])
def test_rows_in_chunks_equal_rows_at_once(monkeypatch, rows):
    monkeypatch.setattr(layers, "CHUNK_ROWS", 64)
    random = np.random.default_rng(rows)
    x, kernel = (random.standard_normal(shape, np.float32) for shape in ((rows, 5), (5, 7)))

    def function(chunk):
        inner = jnp.tanh(chunk) @ kernel
        return inner * inner

    expected = (np.tanh(x.astype(np.float64)) @ kernel.astype(np.float64)) ** 2
    np.testing.assert_allclose(
        layers.by_rows(function, jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5
    )
    # All whole chunks are one loop; the remaining rows are computed once.
    products = str(jax.make_jaxpr(lambda x: layers.by_rows(function, x))(x)).count("dot_general")
    assert products == (2 if rows > 64 and rows % 64 else 1)


@pytest.mark.slow
def test_rows_and_logits_in_chunks_change_no_logits(tiny_model, monkeypatch):
    messages = conversation([], "Which one of the words of this question is the longest one? " * 3)
    expected = bsjax.forward(tiny_model, messages)
    monkeypatch.setattr(layers, "CHUNK_ROWS", 24)
    monkeypatch.setattr("bsjax.runtime.scoring.LOGIT_ROWS", 30)
    # The same model, but without compiled programs.
    model = dataclasses.replace(tiny_model)
    scoring = Scoring(programs_of(model), inputs_of(model, messages, 0), "xla")
    program = scoring.stages[-1].program
    assert program.output.shape == (30, expected.shape[1])
    assert program.memory.results == 4 * 30 * expected.shape[1]
    assert len(expected) % 24 and len(expected) % 30 and len(expected) > 60
    assert_float32_close(scoring.run(), expected)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 60))
def test_groups_are_runs_of_images_within_the_limit(patches, limit):
    borders = group_borders(patches, limit)
    assert [first for first, _ in borders] == [0, *(end for _, end in borders[:-1])]
    assert borders[-1][1] == len(patches)
    for first, end in borders:
        assert first < end
        assert sum(patches[first:end]) <= limit or end == first + 1
        if end < len(patches):
            assert sum(patches[first : end + 1]) > limit, "one more image would fit"


@pytest.mark.parametrize(("limit", "groups"), [(1, 5), (64, 3), (100, 2)])
def test_groups_of_images_change_no_logits(tiny_model, logits, monkeypatch, limit, groups):
    monkeypatch.setattr("bsjax.runtime.inputs.GROUP_PATCHES", limit)
    assert len(inputs_of(tiny_model, conversation()).image_groups) == groups
    compilations = programs_of(tiny_model).compilations
    assert_float32_close(bsjax.forward(tiny_model, conversation()), logits)
    # Groups of the same padded size share a program, here that of all images together.
    assert programs_of(tiny_model).compilations == compilations


@pytest.mark.slow
def test_vision_memory_does_not_grow_with_images(tiny_model, monkeypatch):
    monkeypatch.setattr("bsjax.runtime.inputs.GROUP_PATCHES", 64)
    few, many = (
        Embedding(programs_of(tiny_model), inputs_of(tiny_model, conversation(order)), "xla")
        for order in ([0, 1, 3, 4, 0], [0, 1, 3, 4, 0] * 4)
    )
    assert len(many.stages) > 3 * len(few.stages)

    def beyond_embeddings(embedding):
        most = max(stage.peak for stage in embedding.stages[1:])
        return most - size_in_bytes(embedding.output)

    assert beyond_embeddings(many) == pytest.approx(beyond_embeddings(few), rel=0.01)


def test_stages_count_everything_on_the_device(answering):
    stages = {stage.name: stage for stage in answering.stages}
    assert list(stages) == ["embed", "vision", "prefill", "decode"]
    embeddings, cache = size_in_bytes(answering.embedding.output), size_in_bytes(answering.cache)
    (group,) = answering.embedding.inputs.image_groups
    memory = {name: stage.program.memory for name, stage in stages.items()}
    assert memory["embed"].results == embeddings
    # Embeddings are updated in place, so they count only as an argument; so does decode's cache.
    assert memory["vision"].arguments >= embeddings + group.pixel_values().nbytes
    assert memory["vision"].results < 2**10
    assert memory["prefill"].arguments >= embeddings
    assert cache <= memory["prefill"].results < cache + 2**10
    assert memory["decode"].arguments >= cache
    assert memory["decode"].results < 2**10
    for name, stage in stages.items():
        assert stage.peak == sum(memory[name]), name


def test_the_next_groups_pixels_are_counted(tiny_model, monkeypatch):
    monkeypatch.setattr("bsjax.runtime.inputs.GROUP_PATCHES", 64)
    run = answering_of(tiny_model, conversation())
    vision = [stage for stage in run.stages if stage.name == "vision"]
    pixels = [group.pixel_values().nbytes for group in run.embedding.inputs.image_groups]
    assert [stage.other_bytes for stage in vision] == [*pixels[1:], 0]


def test_a_prompt_is_refused_exactly_when_it_does_not_fit(tiny_model, answering, monkeypatch):
    messages = conversation()
    peak = max(stage.peak for stage in answering.stages)
    monkeypatch.setattr("bsjax.runtime.generation.bytes_available", lambda: peak)
    assert len(bsjax.generate(tiny_model, messages, max_new_tokens=8).token_ids) == 8
    monkeypatch.setattr("bsjax.runtime.generation.bytes_available", lambda: peak - 1)
    with pytest.raises(CapacityError, match="5 images of 6, 10, 4, 12, 6 tokens"):
        bsjax.generate(tiny_model, messages, max_new_tokens=8)
    monkeypatch.setattr("bsjax.runtime.generation.bytes_available", lambda: None)
    bsjax.generate(tiny_model, messages, max_new_tokens=8)


def test_a_refusal_says_how_much_is_needed_and_in_which_stage(tiny_model):
    gib = 2**30
    stages = [
        Stage("vision", SimpleNamespace(memory=Memory(gib, gib, gib)), other_bytes=gib // 4),
        Stage("prefill", SimpleNamespace(memory=Memory(gib, 2 * gib, gib // 2))),
        Stage("decode", SimpleNamespace(memory=Memory(3 * gib, 0, 0))),
    ]
    inputs = inputs_of(tiny_model, conversation([0, 1]))
    check_memory(inputs, stages, stages[1].peak)
    with pytest.raises(CapacityError, match=r"2 images of 6, 10 tokens.*max_pixels") as refusal:
        check_memory(inputs, stages, stages[1].peak - gib // 2)
    message = str(refusal.value)
    assert "3.50 GiB" in message and "3.00 GiB" in message and "in prefill" in message


def test_logits_that_the_host_cannot_hold_are_refused(tiny_model, logits, monkeypatch):
    messages = conversation()
    scoring = Scoring(programs_of(tiny_model), inputs_of(tiny_model, messages, 0), "xla")
    assert scoring.result_bytes == logits.nbytes
    # On a CPU, programs use the host's memory as well.
    wanted = logits.nbytes + max(stage.peak for stage in scoring.stages)
    monkeypatch.setattr("bsjax.runtime.generation.host_bytes_available", lambda: wanted)
    bsjax.forward(tiny_model, messages)
    monkeypatch.setattr("bsjax.runtime.generation.host_bytes_available", lambda: wanted - 1)
    with pytest.raises(CapacityError, match=r"host's memory.*max_pixels"):
        bsjax.forward(tiny_model, messages)


@pytest.mark.slow
def test_300k_tokens_of_the_7b_reach_the_goal():
    found = measured("Qwen2.5-VL-7B", 300_000)
    assert found.inputs.tokens == 300_000 and found.inputs.template.num_images == 297
    assert (found.model, found.inputs.tokens) in memory_table.GOALS
    assert found.missed_goal is None
    assert found.peak == found.weights + max(stage.peak for stage in found.stages)
    assert found.cache > 28 * 2 * 300_064 * 4 * 128 * 2
    assert found.weights == pytest.approx(8.29e9 * 2, rel=0.01), "the published model has 8.29 B"


@pytest.mark.slow
def test_131k_tokens_of_gemma3_4b_reach_the_goal():
    found = measured("Gemma-3-4B", 131_000)
    assert (found.model, found.inputs.tokens) in memory_table.GOALS
    assert found.missed_goal is None


@pytest.mark.slow
def test_profiling_32k_tokens_of_the_7b_takes_little_more_than_the_weights():
    """Any GPU that can answer such a prompt can profile on it: no stage keeps a square array."""
    require_gpu_compiler()
    stages = memory_table.measure_profiling("Qwen2.5-VL-7B", 32_768)
    assert [stage.name for stage in stages] == ["heads", "sinks", "comparing"]
    one_head_of_scores = 2 * 32_768**2
    for stage in stages:
        assert "attention" in stage.program.compiled.as_text(), "the GPU kernel is missing"
        assert stage.peak < 3 * 2**30, stage.name
    assert stages[-1].program.memory.temporaries < one_head_of_scores
    page = memory_table.markdown(
        [measured("Qwen2.5-VL-7B", 300_000)], {("h200", "Qwen2.5-VL-7B"): stages}
    )
    assert "| NVIDIA H200 | Qwen2.5-VL-7B | 32,768 |" in page


@pytest.mark.slow
def test_a_missed_goal_is_named_with_its_figure(monkeypatch):
    found = measured("Qwen2.5-VL-7B", 300_000)
    most = found.temporaries()
    key = ("Qwen2.5-VL-7B", 300_000)
    monkeypatch.setitem(memory_table.GOALS, key, most)
    assert found.missed_goal is None
    monkeypatch.setitem(memory_table.GOALS, key, most - 1)
    assert f"{most / 2**30:.2f} GiB" in (found.missed_goal or "")
    assert "| Qwen2.5-VL-7B | 300,000 | 297 |" in memory_table.markdown([found])
