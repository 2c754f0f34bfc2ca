"""Memory is bounded and known before anything runs; bounding it does not change results."""

import itertools
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import bsjax
from bsjax import CapacityError, Template, Text
from bsjax import Image as ImageTokens
from bsjax.models import layers
from bsjax.prompts.image_reader import ImageReader
from bsjax.prompts.prompt import PromptOptions
from bsjax.runtime.chunks import CacheLayout, PlacedPrompt, chunk_borders
from bsjax.runtime.images import group_borders, image_groups
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.memory import check_memory, mesh_that_fits
from bsjax.runtime.programs import Memory, Stage, programs_of, size_in_bytes
from bsjax.runtime.scoring import Scoring
from bsjax.runtime.sizes import Sizes, cache_rows, most_images, sizes_in_use
from tests.support.chunks import decoding_of, inputs_of_template, prefill_of

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


def groups_of(inputs):
    return image_groups(inputs.architecture, inputs.images, "xla")


def stages_of(model, messages, new_tokens=8):
    """The stages of answering, and the `Prefill` among them."""
    inputs, programs = inputs_of(model, messages, new_tokens), programs_of(model)
    prefill = prefill_of(programs, inputs, new_tokens=new_tokens)
    decoding = decoding_of(programs, prefill)
    return [*prefill.stages, *decoding.stages], prefill


@pytest.fixture(scope="module")
def logits(tiny_model):
    """Logits of a prompt that is a single chunk, with a single group of images."""
    inputs = inputs_of(tiny_model, conversation())
    assert len(groups_of(inputs)) == 1 and inputs.tokens <= sizes_in_use().chunks[0]
    return bsjax.forward(tiny_model, conversation())


def assert_float32_close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128, 200])
def test_rows_in_chunks_equal_rows_at_once(monkeypatch, rows):
    monkeypatch.setattr(layers, "MLP_ROWS", 64)
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


@pytest.fixture
def small_sizes(monkeypatch):
    """Chunks and groups of images so small that short prompts have many of them."""

    def use(chunks=(16, 32), patches=(64, 128)):
        sizes = Sizes(chunks, patches)
        for module in ("prefill", "scoring", "images"):
            monkeypatch.setattr(f"bsjax.runtime.{module}.sizes_in_use", lambda: sizes)

    return use


@pytest.mark.slow
@pytest.mark.parametrize("category", [None, "INTRA_IMAGE_SINK"])
def test_chunks_and_groups_change_no_logits(tiny_model, small_sizes, category):
    messages = conversation([0, 1, 2, 3, 4, 0, 1], "Which one of these is the brightest? " * 3)
    profile = category and bsjax.Profile.uniform(category, tiny_model)
    expected = bsjax.forward(tiny_model, messages, profile=profile)
    answer = bsjax.generate(tiny_model, messages, profile=profile, max_new_tokens=6)
    small_sizes()
    inputs = inputs_of(tiny_model, messages)
    assert len(groups_of(inputs)) > 2 and inputs.tokens > 3 * 32
    assert_float32_close(bsjax.forward(tiny_model, messages, profile=profile), expected)
    again = bsjax.generate(tiny_model, messages, profile=profile, max_new_tokens=6)
    assert again.token_ids == answer.token_ids


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.lists(st.integers(1, 60), min_size=1, max_size=3, unique=True).map(sorted),
)
def test_groups_are_runs_of_images_within_their_size(patches, sizes):
    borders = group_borders(patches, sizes)
    assert [first for first, _, _ in borders] == [0, *(end for _, end, _ in borders[:-1])]
    assert borders[-1][1] == len(patches)
    for first, end, size in borders:
        assert first < end and sum(patches[first:end]) <= size
        if patches[first] <= sizes[-1]:
            assert size in sizes
        if end < len(patches):
            assert sum(patches[first : end + 1]) > size, "one more image would fit"


def test_no_image_is_in_memory_twice(tiny_model, small_sizes):
    small_sizes()
    expected = [image.patches for image in tiny_model.prompt(conversation()).images]
    with ImageReader() as reader:
        prompt = tiny_model.prompt_of(conversation(), PromptOptions(), reader)
        # Before they are read, and twice afterwards, as for a prompt that runs again.
        for _ in range(3):
            groups = image_groups(tiny_model.architecture, prompt.images, "xla")
            assert len(groups) > 1
            for group in groups:
                values = group.pixels().values
                assert all(np.shares_memory(image.patches, values) for image in group.images)
            for image, wanted in zip(prompt.images, expected, strict=True):
                np.testing.assert_array_equal(image.patches, wanted)


def test_an_image_may_be_in_several_groups(tiny_model, small_sizes):
    small_sizes()
    expected = tiny_model.prompt(conversation()).pixels.values
    with ImageReader() as reader:
        prompt = tiny_model.prompt_of(conversation(), PromptOptions(), reader)
        groups = image_groups(tiny_model.architecture, prompt.images * 2, "xla")
        values = []
        for group in groups:
            size = sum(image.size for image in group.images)
            padded = group.pixels().values
            values.append(padded[:size])
            assert not padded[size:].any()
    np.testing.assert_array_equal(np.concatenate(values), np.concatenate([expected] * 2))


def test_groups_of_the_same_sizes_share_their_plan(tiny_model, small_sizes):
    small_sizes()
    groups = groups_of(inputs_of(tiny_model, conversation([1, 1, 1, 1, 4, 4])))
    grids = [[image.grid_thw.tolist() for image in group.images] for group in groups]
    for one, other in itertools.combinations(range(len(groups)), 2):
        same = grids[one] == grids[other]
        same &= groups[one].padded_tokens == groups[other].padded_tokens
        assert (groups[one].plan is groups[other].plan) == same
    assert len({id(group.plan) for group in groups}) in range(2, len(groups))


@pytest.mark.slow
def test_memory_does_not_grow_with_images(tiny_model, small_sizes):
    small_sizes()
    few, many = (
        stages_of(tiny_model, conversation(order))
        for order in ([0, 1, 3, 4, 0], [0, 1, 3, 4, 0] * 4)
    )
    assert len(many[1].chunks.borders) > 2 * len(few[1].chunks.borders)
    peaks = [max(stage.peak for stage in stages) for stages, _ in (few, many)]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_stages_count_everything_on_the_device(tiny_model):
    stages, prefill = stages_of(tiny_model, conversation())
    assert [stage.name for stage in stages] == ["vision", "prefill", "decode"]
    by_name = {stage.name: stage for stage in stages}
    memory = {name: stage.program.memory for name, stage in by_name.items()}
    cache = size_in_bytes(prefill.carried.cache)
    (group,) = prefill.groups
    features = size_in_bytes(by_name["vision"].program.output)
    # Features and the cache are updated in place, so they count only as arguments.
    assert memory["vision"].arguments >= features + group.pixels().values.nbytes
    assert by_name["vision"].other_bytes == size_in_bytes(prefill.carried) >= cache
    assert memory["prefill"].arguments >= features + cache
    assert memory["decode"].arguments >= cache
    for name, stage in by_name.items():
        assert memory[name].results < 2**14, name
        assert stage.peak == sum(memory[name]) + stage.other_bytes, name


def test_no_program_copies_the_cache_on_a_cpu(tiny_model):
    stages, prefill = stages_of(tiny_model, conversation([0, 1]), new_tokens=12_000)
    cache = size_in_bytes(prefill.carried.cache)
    assert prefill.chunks.layout.rows > 12_000
    for stage in stages[1:]:
        assert stage.program.memory.temporaries < cache / 4, stage.name
        assert stage.program.memory.results < cache / 4, stage.name


@pytest.mark.slow
def test_the_next_groups_pixels_are_counted(tiny_model, small_sizes):
    small_sizes()
    stages, prefill = stages_of(tiny_model, conversation())
    pixels = [size_in_bytes(group.pixels()) for group in prefill.groups]
    for stage in stages:
        if stage.name == "vision":
            assert stage.other_bytes == size_in_bytes(prefill.carried) + max(pixels[1:])


_segments = st.lists(st.integers(0, 40).map(Text) | st.integers(1, 90).map(ImageTokens))


@given(
    templates=st.lists(_segments.map(Template.from_segments), min_size=1, max_size=6),
    whole_images=st.booleans(),
    most_prompts=st.integers(1, 3),
)
def test_chunks_cover_all_prompts_and_may_keep_images_whole(templates, whole_images, most_prompts):
    prompts = [PlacedPrompt(inputs_of_template(each)) for each in templates if each.tokens]
    borders = chunk_borders(prompts, (16, 64), whole_images=whole_images, most_prompts=most_prompts)
    parts = [part for parts, _ in borders for part in parts]
    for prompt in prompts:
        own = [(part.start, part.end) for part in parts if part.prompt is prompt]
        assert [0, *(end for _, end in own)] == [*(start for start, _ in own), prompt.end]
    order = [prompts.index(part.prompt) for part in parts]
    assert order == sorted(order), "one prompt after the other"
    for parts, rows in borders:
        assert 0 < sum(part.end - part.start for part in parts) <= rows and rows % 16 == 0
        assert len(parts) <= most_prompts
        images = 0
        for part in parts:
            image = part.prompt.inputs.template.image
            inside = 0 < part.end < image.size and image[part.end - 1] == image[part.end] >= 0
            assert not (whole_images and inside)
            images += int((np.unique(image[part.start : part.end]) >= 0).sum())
        assert images <= most_images(rows)
    few_images = sum(each.num_images for each in templates) <= most_images(16)
    if not whole_images and few_images and len(prompts) <= most_prompts:
        padded = sum(rows for _, rows in borders)
        tokens = sum(prompt.end for prompt in prompts)
        assert padded < tokens + 16, "less padding than the smallest chunk"


@pytest.mark.parametrize(
    ("segments", "rows"),
    [
        ([Text(13), ImageTokens(256), Text(14)], [512]),
        ([Text(7), ImageTokens(256)] * 2, [512, 512]),
        ([Text(7), ImageTokens(256)] * 28, [2048] * 4),
        ([Text(30), ImageTokens(3000)], [128, 4096]),
        ([Text(1990)], [2048]),
        ([Text(1900)], [512, 512, 512, 128, 128, 128]),
    ],
)
def test_whole_images_have_chunks_that_they_fill(segments, rows):
    prompt = PlacedPrompt(inputs_of_template(Template.from_segments(segments)))
    assert Sizes((128, 512, 2048), ()).chunks_for(8192, 256) == (128, 512, 2048)
    assert Sizes((128, 512, 2048), ()).chunks_for(8192) == (128, 2048)
    borders = chunk_borders([prompt], (128, 512, 2048), whole_images=True)
    assert [size for _, size in borders] == rows


def test_a_prompt_is_refused_exactly_when_it_does_not_fit(tiny_model, monkeypatch):
    messages = conversation()
    peak = max(stage.peak for stage in stages_of(tiny_model, messages)[0])
    monkeypatch.setattr("bsjax.runtime.kept_cache.bytes_available", lambda *_: peak)
    assert len(bsjax.generate(tiny_model, messages, max_new_tokens=8).token_ids) == 8
    monkeypatch.setattr("bsjax.runtime.kept_cache.bytes_available", lambda *_: peak - 1)
    with pytest.raises(CapacityError, match="5 images of 6, 10, 4, 12, 6 tokens"):
        bsjax.generate(tiny_model, messages, max_new_tokens=8)
    monkeypatch.setattr("bsjax.runtime.kept_cache.bytes_available", lambda *_: None)
    bsjax.generate(tiny_model, messages, max_new_tokens=8)


@pytest.mark.parametrize("call", ["generate", "batch", "stream", "forward", "score", "session"])
def test_a_prompt_whose_cache_does_not_fit_is_refused_before_an_image_is_decoded(
    tiny_model, monkeypatch, tmp_path, call
):
    def refuse(*_):
        raise AssertionError("an image is decoded")

    files = [tmp_path / f"{number}.jpg" for number in range(2)]
    for file in files:
        Image.new("RGB", (140, 84)).save(file)
    parts = [{"type": "image", "path": str(file)} for file in files]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "Which?"}]}]
    answer = [*messages, {"role": "assistant", "content": "None"}]
    session = bsjax.Session(tiny_model, max_tokens=512)
    calls = {
        "generate": lambda: bsjax.generate(tiny_model, messages),
        "batch": lambda: bsjax.generate(tiny_model, [messages, messages]),
        "stream": lambda: bsjax.stream(tiny_model, messages),
        "forward": lambda: bsjax.forward(tiny_model, messages),
        "score": lambda: bsjax.score(tiny_model, answer),
        "session": lambda: session.generate(messages),
    }
    monkeypatch.setattr("bsjax.prompts.prompt.read_image", refuse)
    for module in ("kept_cache", "batch"):
        monkeypatch.setattr(f"bsjax.runtime.{module}.bytes_available", lambda *_: 2**16)
    with pytest.raises(
        CapacityError, match=r"2 images of 15, 15 tokens.*for its cache.*max_pixels"
    ):
        calls[call]()


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


def test_a_refusal_names_a_mesh_that_would_do(tiny_model, monkeypatch):
    programs, layout = programs_of(tiny_model), CacheLayout(2048)
    cache = 2 * 4 * 2048 * 2 * 64 * 4  # Keys and values of 4 layers, in float32.
    weights = size_in_bytes(programs.parameters)
    fits = partial(mesh_that_fits, programs, cache)
    # Rows of the cache are divided first: then no hidden states have to be added up.
    assert fits(cache + 1000, available=cache + 999) == (2, 1)
    # What is needed besides the cache finds room only where there are fewer weights.
    assert fits(cache + weights // 4, available=cache // 2) == (1, 2)
    assert fits(cache + 100 * weights, available=cache) is None
    stages = [Stage("prefill", SimpleNamespace(memory=Memory(cache, 1000, 0)))]
    inputs = inputs_of(tiny_model, conversation([0, 1]))
    gpu = SimpleNamespace(platform="gpu")
    monkeypatch.setattr("bsjax.runtime.memory.jax.devices", lambda: [gpu])
    with pytest.raises(CapacityError, match="Or use 2 such devices.*context 2, tensor 1"):
        check_memory(inputs, stages, cache, programs, layout)


def test_logits_that_the_host_cannot_hold_are_refused(tiny_model, logits, monkeypatch):
    messages = conversation()
    prompt = PlacedPrompt(inputs_of(tiny_model, messages, 0))
    scoring = Scoring(programs_of(tiny_model), prompt, CacheLayout(cache_rows(prompt.end)), "xla")
    assert scoring.result_bytes == logits.nbytes
    # On a CPU, programs use the host's memory as well.
    wanted = logits.nbytes + max(stage.peak for stage in scoring.stages)
    monkeypatch.setattr("bsjax.runtime.generation.host_bytes_available", lambda: wanted)
    bsjax.forward(tiny_model, messages)
    monkeypatch.setattr("bsjax.runtime.generation.host_bytes_available", lambda: wanted - 1)
    with pytest.raises(CapacityError, match=r"host's memory.*max_pixels"):
        bsjax.forward(tiny_model, messages)
