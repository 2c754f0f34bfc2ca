"""Models on several devices answer as on one."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh
from PIL import Image

import bsjax
from bsjax import CapacityError, CheckpointError, HeadCategory, Profile, ProfileError
from bsjax.checkpoint.loading import LoadedModel, check_weights_fit, placed_module
from bsjax.cli import main
from bsjax.models.collectives import TENSOR
from bsjax.models.head_order import costs_of, dealt_heads, imbalance
from bsjax.models.layers import MLP_ROWS
from bsjax.prompts.image_reader import ImageReader
from bsjax.prompts.known_images import ImageContent
from bsjax.prompts.prompt import PromptImage, PromptOptions
from bsjax.runtime import images
from bsjax.runtime.images import rounds
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.programs import programs_of, size_in_bytes
from bsjax.runtime.sizes import Sizes, cache_rows
from convert.conversion import convert_checkpoint
from tests.support import convert_sources
from tests.support.checked_programs import check_of_published_model
from tests.support.chunks import logits_of
from tests.support.gpu_compiler import require_gpu_compiler
from tests.support.messages import asked
from tools import memory_table
from tools.device_memory import travelling

WORDS = " Which of these pictures is brighter, and why?"


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def qwen2_vl(tmp_path_factory):
    """A random Qwen2-VL. Its output is a matrix of its own; four devices have one key head."""
    folder = tmp_path_factory.mktemp("qwen2_vl")
    source = convert_sources.write_source(folder / "hf", "qwen2_vl", q_heads=8)
    convert_checkpoint(source, folder / "ours", dtype="float32")
    return bsjax.load(folder / "ours", "float32")


@pytest.fixture(
    params=[
        pytest.param(("qwen2_vl", 1, 8), id="qwen2_vl, 1x8", marks=pytest.mark.parity),
        pytest.param(("tiny_model", 4, 2), id="qwen2_5_vl, 4x2"),
        pytest.param(("gemma3", 2, 2), id="gemma3, 2x2", marks=pytest.mark.parity),
    ]
)
def models(request):
    """A model on one device, and on several."""
    name, context, tensor = request.param
    one = request.getfixturevalue(name)
    mesh = bsjax.mesh(context=context, tensor=tensor)
    return one, bsjax.load(one.path, one.dtype, mesh=mesh)


@pytest.mark.slow
def test_answers_are_those_of_one_device(models, tmp_path):
    one, several = models
    sparse = Profile.uniform("INTRA_IMAGE_SINK", one)
    question = asked(WORDS * 3, picture(0), WORDS, picture(1), "Why?")
    if one.family.name != "gemma3":  # Its programs compile longest; its tokens are compared below.
        wanted, found = (bsjax.forward(model, question) for model in models)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())

    # A batch, and sessions that answer its prompts alone, with the programs that are used below.
    batch = [question, asked("Why?"), asked(picture(2), WORDS)]
    options = {"temperature": 1.0, "seed": 3, "max_new_tokens": 6}
    alone = [
        bsjax.Session(one, max_tokens=512, profile=sparse).generate(prompt, **options)
        for prompt in batch
    ]
    together = bsjax.generate(several, batch, profile=sparse, **options)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]

    if one.family.name == "qwen2_5_vl":
        return  # Another test goes on with sessions of this model that several devices saved.
    # A session, saved by one and loaded by the other.
    answers = []
    for model, other in (models, models[::-1]):
        session = bsjax.Session(model, max_tokens=512, profile=sparse)
        first = session.generate(question, max_new_tokens=4)
        session.save(tmp_path / "session")
        session = bsjax.Session.load(tmp_path / "session", other, profile=sparse)
        more = [*question, {"role": "assistant", "content": first.text}, *asked("And?")]
        second = session.generate(more, max_new_tokens=4)
        # The rings of Gemma 3 have moved on.
        assert (second.stats.reused_tokens > 60) == (one.family.name != "gemma3")
        answers.append((first.token_ids, second.token_ids))
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("category", "context", "tensor"), [(None, 8, 1), ("INTRA_IMAGE_SINK", 2, 4)]
)
def test_many_chunks_and_rounds_change_nothing(
    tiny_checkpoint, tiny_model, monkeypatch, category, context, tensor
):
    """Prompts of several chunks; images in several rounds, the last of which is not full."""
    several = bsjax.load(tiny_checkpoint, mesh=bsjax.mesh(tensor, context))
    sizes = Sizes((16, 32), (24, 48))
    for module in ("prefill", "scoring", "images"):
        monkeypatch.setattr(f"bsjax.runtime.{module}.sizes_in_use", lambda: sizes)
    profile = None if category is None else Profile.uniform(category, tiny_model)
    # 18 images, each of which is a group.
    question = asked(WORDS * 2, *(part for seed in range(18) for part in (picture(seed), "?")))
    logits = []
    for model in (tiny_model, several):
        inputs = prepare_inputs(model.architecture, model.prompt(question), profile, backend="xla")
        logits.append(logits_of(programs_of(model), inputs))
    groups = images.image_groups(
        several.architecture, several.prompt(question).images, "xla", mesh=several.mesh
    )
    assert [len(each) for each in rounds(groups, 8)] == [8, 8, 2]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5 * np.abs(logits[0]).max())


def test_each_device_has_its_part(tiny_checkpoint, tiny_model):
    model = bsjax.load(tiny_checkpoint, mesh=bsjax.mesh(tensor=4))
    parameters = jax.tree.leaves(nnx.state(model.module.language_model))
    divided = [leaf for leaf in parameters if TENSOR in leaf.sharding.spec]
    # The embeddings, four matrices of attention, three biases, three matrices of MLPs.
    assert len(divided) == 11
    for leaf in divided:
        assert {4 * part.data.size for part in leaf.addressable_shards} == {leaf.size}
    ours, whole = (each.module.language_model.layers for each in (model, tiny_model))
    for part, name in (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp", "down_proj")):
        kernels = [getattr(getattr(layers, part), name).kernel[...] for layers in (ours, whole)]
        np.testing.assert_array_equal(*kernels)
    # Two key heads of 64 channels, for four devices.
    ours, whole = (np.asarray(layers.self_attn.k_proj.kernel[...]) for layers in (ours, whole))
    expected = np.repeat(whole.reshape(*whole.shape[:2], 2, -1), 2, axis=2)
    np.testing.assert_array_equal(ours, expected.reshape(ours.shape))
    (cache,) = model.module.language_model.empty_cache(100)
    assert 4 * size_in_bytes(cache) == cache.k.nbytes + cache.v.nbytes
    assert cache.k.sharding.shard_shape(cache.k.shape) == (4, 100, 1, 64)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [2, 4])
def test_heads_are_dealt_by_a_profile(tiny_checkpoint, tiny_model, tmp_path, tensor):
    """Which heads are together changes no answer, and balances what the devices have to do.

    Two devices have a key head each, with its query heads; four have a query head each.
    """
    shape = (tiny_model.config.text_config.num_hidden_layers, 4)
    categories = np.zeros(shape, np.int8)
    categories[:, 1] = HeadCategory.INTRA_IMAGE  # With head 0, it shares a key head.
    profile = Profile(family=tiny_model.family.name, categories=categories)
    several = bsjax.load(
        tiny_checkpoint, mesh=bsjax.mesh(tensor=tensor), head_categories=categories
    )
    question = asked(WORDS, picture(0), WORDS, picture(1), "Why?")
    wanted, found = (
        bsjax.forward(model, question, profile=profile) for model in (tiny_model, several)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert several.head_order is not None
    assert bsjax.generate(several, question, profile=profile, max_new_tokens=1).stats.imbalance > 1
    # A session has the checkpoint's heads.
    session = bsjax.Session(several, max_tokens=512, profile=profile)
    more = [*question, {"role": "assistant", "content": "That."}, *asked("And?")]
    session.forward(question)
    session.save(tmp_path / "session")
    loaded = bsjax.Session.load(tmp_path / "session", tiny_model, profile=profile)
    found, first = loaded.forward(more)
    assert first > wanted.shape[0] - 12
    wanted = bsjax.forward(tiny_model, more, profile=profile)[first:]
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("kv_heads", "devices", "before", "after"), [(8, 4, 1.8, 1.0), (2, 4, 1.8, 1.0)]
)
def test_expensive_heads_do_not_sit_together(kv_heads, devices, before, after):
    categories = np.full((3, 16), HeadCategory.INTRA_IMAGE, np.int32)
    if kv_heads == 8:
        categories[:, [0, 1, 2, 3, 4, 5, 6, 7]] = HeadCategory.DENSE
    else:
        categories[:, [0, 1, 2, 3, 8, 9, 10, 11]] = HeadCategory.DENSE
    order = dealt_heads(categories, kv_heads, devices)
    np.testing.assert_array_equal(np.sort(order.q_heads), np.tile(np.arange(16), (3, 1)))
    # Query heads stay with the key head that they share.
    group = 16 // kv_heads
    np.testing.assert_array_equal(order.q_heads[:, ::group] // group, order.kv_heads)
    assert imbalance(costs_of(categories), devices) == pytest.approx(before, abs=0.05)
    dealt = np.take_along_axis(categories, order.q_heads, axis=1)
    assert imbalance(costs_of(dealt), devices) == pytest.approx(after, abs=0.01)


def test_what_cannot_be_divided_is_refused(tiny_checkpoint, tiny_model, annotations_unchecked):
    for tensor, message in (
        (3, "4 query heads, which cannot be divided among 3 devices: use 1 or 2 devices."),
        (8, "4 query heads, which cannot be divided among 8 devices: use 1, 2 or 4 devices."),
    ):
        with pytest.raises(CheckpointError, match=message):
            bsjax.load(tiny_checkpoint, mesh=bsjax.mesh(tensor=tensor))
    with pytest.raises(CheckpointError, match="9 devices was asked for: there are 8"):
        bsjax.mesh(tensor=9)
    with pytest.raises(CheckpointError, match="tensor must be"):
        bsjax.mesh(tensor=0)
    for mesh in ("tensor", Mesh(np.array(jax.devices()[:2]), ("x",))):
        with pytest.raises(CheckpointError, match="mesh must be a jax.sharding.Mesh"):
            bsjax.load(tiny_checkpoint, mesh=mesh)
    with pytest.raises(CheckpointError, match="context must be a power of two up to 64"):
        bsjax.mesh(context=3)
    for wrong in (np.zeros((4, 3), np.int8), np.full((4, 4), 7), "DENSE"):
        with pytest.raises(CheckpointError, match="head_categories must be the `categories` of"):
            bsjax.load(tiny_checkpoint, mesh=bsjax.mesh(tensor=2), head_categories=wrong)
    model = bsjax.load(tiny_checkpoint, mesh=bsjax.mesh(tensor=2))
    assert set(model.mesh.axis_types) == {AxisType.Auto}
    with pytest.raises(ProfileError, match="runs on one device: leave out the mesh"):
        bsjax.profile(model, [asked("Why?")], threshold=0.1)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tiny_checkpoint, tiny_model):
    module, _ = placed_module(tiny_model.architecture, bsjax.mesh(tensor=2))
    needed = size_in_bytes(nnx.state(module))
    statistics = {"bytes_limit": needed + 5, "bytes_in_use": 5}
    gpu = SimpleNamespace(id=1, device_kind="GPU", memory_stats=lambda: statistics)
    check_weights_fit(module, [gpu], lambda times: True)
    statistics["bytes_in_use"] = 6
    with pytest.raises(CapacityError, match=r"on device 1 \(GPU\).*among 3 times as many"):
        check_weights_fit(module, [gpu], lambda times: times == 3)


@pytest.mark.slow
def test_the_command_line_divides_a_model(tiny_checkpoint, capsys):
    arguments = ["generate", str(tiny_checkpoint), "Why?", "--max-new-tokens", "4"]
    assert main(arguments) == 0
    alone = capsys.readouterr().out
    assert main([*arguments, "--tensor", "2"]) == 0
    assert capsys.readouterr().out == alone
    assert main([*arguments, "--tensor", "3"]) == 2
    assert "cannot be divided among 3 devices" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("context", "tensor", "hosts", "weights", "peak"), [(1, 8, 1, 18.23, 21), (2, 8, 2, 18.23, 22)]
)
def test_the_72b_on_gpus(monkeypatch, context, tensor, hosts, weights, peak):
    """It fits, and nothing travels in a layer but hidden states, keys and values."""
    require_gpu_compiler()
    mesh = {"context": context, "tensor": tensor, "hosts": hosts}
    measure = partial(memory_table.measure, "Qwen2.5-VL-72B", 36_000, **mesh)
    recorded = check_of_published_model(monkeypatch, measure)
    if recorded.has_passed:
        return
    found = measure()
    assert found.peak < peak * 2**30, "of 131 GiB"
    # 72.7 billion parameters are divided; the vision tower is on every device.
    assert found.weights == pytest.approx(weights * 2**30, rel=0.01)
    rows = cache_rows(36_000 + memory_table.NEW_TOKENS)
    of_cache = rows * 8 // tensor * 128 * 2
    assert found.cache * context == 2 * 80 * of_cache
    chunk = next(stage.program for stage in found.stages if stage.name == "prefill")
    reduced, gathered = (
        [size for kind, size in travelling(chunk.compiled.as_text()) if kind == wanted]
        for wanted in ("all-reduce", "all-gather")
    )
    # The output of attention, and of the MLP in parts, for the rows of a device.
    of_rows = found.chunk_rows // context
    parts = max(1, of_rows // MLP_ROWS)
    wanted = [of_rows // parts * 8192 * 2] * parts + [of_rows * 8192 * 2]
    assert sorted(reduced) == wanted
    # Keys and values of the chunk's rows, and of all rows of the cache.
    of_chunk = found.chunk_rows * 8 // tensor * 128 * 2
    wanted = [] if context == 1 else [of_chunk] * 2 + [of_cache] * 2
    assert sorted(gathered) == wanted
    decode = next(stage.program for stage in found.stages if stage.name == "decode")
    reduced = [size for kind, size in travelling(decode.compiled.as_text()) if kind == "all-reduce"]
    assert set(reduced) == {8192 * 2}
    recorded.passed()


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_reads_the_images_of_its_own_devices(tiny_model, monkeypatch, process):
    """Five images, each a group, for four devices of two processes."""
    mesh = bsjax.mesh(context=4)
    of_processes = [False, False, True, True] if process else [True, True, False, False]
    monkeypatch.setattr(images, "own_devices", lambda mesh: of_processes)
    begun: list[int] = []
    grid, scale = np.asarray([1, 24, 24], np.int32), tiny_model.pixel_scale
    of_prompt = [
        PromptImage(grid, 144, scale, read=pytest.fail, begin=partial(begun.append, number))
        for number in range(5)
    ]
    groups = images.image_groups(tiny_model.architecture, of_prompt, "xla", mesh=mesh)
    assert [len(group.images) for group in groups] == [1] * 5
    # The fifth is in a second round.
    assert begun == ([2, 3] if process else [0, 1, 4])


def test_processes_tell_images_apart_without_reading_them(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setattr(LoadedModel, "shares_images", True)
    monkeypatch.setattr(ImageContent, "pixels", pytest.fail)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        Image.fromarray(picture(number % 2)).save(file)
    with ImageReader() as reader:
        prompt = tiny_model.prompt_of(asked(*files, picture(0)), PromptOptions(), reader)
        reader.start()
        first, second, third, of_array = (image.digest for image in prompt.images)
    assert first == third and len({first, second, of_array}) == 3
