"""Pixels in bytes become what transformers' image processors compute, whatever their settings."""

import copy
import dataclasses
import io
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.Image import Resampling
from PIL.PngImagePlugin import PngInfo
from transformers import Gemma3ImageProcessorPil, Qwen2VLImageProcessorPil

import bsjax
from bsjax.errors import CapacityError, CheckpointError, MessageError
from bsjax.models import FAMILIES
from bsjax.models.gemma3.vision_plan import to_images
from bsjax.models.pixels import Pixels, embedded, image_size, pixel_scale, pixel_values_of
from bsjax.prompts import downloads
from bsjax.prompts.image_reader import ImageReader
from bsjax.prompts.images import read_image, size_before_reading
from bsjax.prompts.sources import ImageSources
from tests.support.small_models import Shape, small_config

QWEN = small_config(Shape("qwen2_vl"))
GEMMA = small_config(Shape("gemma3", image_side=8))
LIMITS = ImageSources()

values = st.floats(0.0625, 2, width=32)
channels = st.lists(values, min_size=3, max_size=3)
value_settings = st.fixed_dictionaries(
    {
        "do_rescale": st.booleans(),
        "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5, 1.0, 0.01]),
        "do_normalize": st.booleans(),
        "image_mean": channels | values,
        "image_std": channels | values,
        "resample": st.sampled_from(Resampling),
    }
)
MODES = ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I"]


@st.composite
def pictures(draw):
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    seed = draw(st.integers(0, 99))
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    mode = draw(st.sampled_from(MODES))
    image = (
        Image.fromarray(pixels, "RGBA")
        if mode in ("RGBA", "LA")
        else Image.fromarray(pixels[..., :3])
    )
    return image.convert("L").convert("I") if mode == "I" else image.convert(mode)


def close(ours, theirs):
    largest = np.abs(theirs).max(initial=1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * largest)


@settings(max_examples=60)
@given(
    pictures(),
    value_settings,
    st.sampled_from([(4, 1), (4, 2), (14, 2)]),
    st.integers(1, 3000),
    st.integers(1, 9000),
)
def test_qwens_images_of_any_mode_size_and_settings(image, value_settings, patches, least, more):
    patch_size, merge = patches
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": least, "longest_edge": least + more},
        patch_size=patch_size, merge_size=merge, temporal_patch_size=2, **value_settings,
    )  # fmt: skip
    family = FAMILIES["qwen2_vl"]
    shapes = family.image_shapes(image.height, image.width, {}, processor, QWEN)
    (cut,) = family.image_patches(image, {}, processor, QWEN, {})
    pixels = Pixels(cut, pixel_scale(processor, 3))
    expected = processor(images=[image], return_tensors="np")
    np.testing.assert_array_equal(shapes.grid_thw, expected["image_grid_thw"])
    assert shapes.image_tokens == (len(cut) // merge**2,)
    assert shapes.pixels == cut.size // 3
    close(pixel_values_of(pixels, frames=2), expected["pixel_values"])


@settings(max_examples=40)
@given(pictures(), value_settings, st.booleans())
def test_gemmas_images_and_crops(image, value_settings, crops):
    processor = Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, **value_settings)
    family = FAMILIES["gemma3"]
    options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8} if crops else {}
    shapes = family.image_shapes(image.height, image.width, options, processor, GEMMA)
    cut = family.image_patches(image, options, processor, GEMMA, {})
    assert shapes.grid_thw.tolist() == [[1, 8, 8]] * len(cut)
    pixels = Pixels(np.concatenate(cut), pixel_scale(processor, 3))
    theirs = {
        "do_pan_and_scan": crops,
        "pan_and_scan_min_crop_size": 8,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    expected = processor(images=[image], return_tensors="np", **theirs)["pixel_values"]
    close(to_images(pixel_values_of(pixels), GEMMA), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("frames", [1, 2])
def test_one_product_with_the_summed_kernel_is_that_of_all_frames(frames, dtype):
    random = np.random.default_rng(0)
    processor = Qwen2VLImageProcessorPil()
    pixels = Pixels(random.integers(0, 256, (37, 14 * 14 * 3), np.uint8), pixel_scale(processor, 3))
    kernel = random.standard_normal((frames * 588, 24)).astype(dtype)
    # What torch computes: products of rounded values, summed in float32 or better.
    exact = pixel_values_of(pixels, frames=frames).astype(dtype).astype(np.float64)
    expected = exact @ kernel.astype(np.float64)
    ours = jax.jit(lambda *answer: embedded(*answer, frames=frames))(pixels, jnp.asarray(kernel))
    assert ours.dtype == dtype
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(ours, np.float64), expected, rtol=rounding, atol=4e-6 * np.abs(expected).max()
    )
    floats = embedded(jnp.asarray(exact, dtype), jnp.asarray(kernel))
    np.testing.assert_allclose(
        np.asarray(floats, np.float64), expected, rtol=rounding, atol=4e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"do_resize": False}, "multiples of 28"),
        ({"size": {"height": 56, "width": 56}}, "with bounds"),
        ({"resample": None}, "how to scale"),
    ],
)
def test_settings_of_qwens_that_are_not_computed_are_refused(changes, words):
    processor = Qwen2VLImageProcessorPil(**changes)
    processor.size = changes.get("size", processor.size)
    with pytest.raises(MessageError, match=words):
        FAMILIES["qwen2_vl"].image_patches(Image.new("RGB", (56, 30)), {}, processor, QWEN, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": [0.5, 0.5]},
        {"image_std": None},
        {"image_std": [0, 1, 1]},
        {"rescale_factor": None},
        {"rescale_factor": float("nan")},
    ],
)
def test_settings_that_make_no_values_are_refused(changes):
    processor = Qwen2VLImageProcessorPil()
    for name, value in changes.items():
        setattr(processor, name, value)
    with np.errstate(divide="ignore"), pytest.raises(CheckpointError, match="image settings"):
        pixel_scale(processor, 3)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sizes_in_headers_are_those_of_the_pixels(kind, turn, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded(Image.new("RGB", (60, 40)), kind, exif=orientation(turn)))
    expected = image_size(read_image("path", path, LIMITS))
    assert expected == ((60, 40) if turn > 4 else (40, 60))
    found = size_before_reading("path", str(path), LIMITS)
    assert found == (None if kind == "TIFF" else expected)


def test_metadata_behind_the_pixels_of_a_png_is_not_overlooked(tmp_path):
    whole = encoded(Image.new("RGB", (60, 40)), "PNG", exif=orientation(6))
    at = whole.index(b"eXIf") - 4
    length = 12 + int.from_bytes(whole[at : at + 4], "big")
    chunk, rest = whole[at : at + length], whole[:at] + whole[at + length :]
    end = rest.index(b"IEND") - 4
    path = tmp_path / "image.png"
    path.write_bytes(rest[:end] + chunk + rest[end:])
    assert image_size(read_image("path", path, LIMITS)) == (60, 40)
    assert size_before_reading("path", str(path), LIMITS) is None
    text = PngInfo()
    text.add_text("comment", "before the pixels")
    path.write_bytes(encoded(Image.new("RGB", (60, 40)), "PNG", pnginfo=text))
    assert size_before_reading("path", str(path), LIMITS) == (40, 60)


def picture_file(folder, number, size=(40, 56)):
    path = folder / f"{number}.png"
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return {"type": "image", "path": str(path)}


def user(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "Which?"}]}]


def image_threads():
    return [thread for thread in threading.enumerate() if "bsjax-images" in thread.name]


def test_a_prompt_that_cannot_fit_is_refused_before_an_image_is_decoded(
    tiny_model, tmp_path, monkeypatch
):
    messages = user(*(picture_file(tmp_path, number) for number in range(4)))
    decoded = []
    monkeypatch.setattr("bsjax.prompts.prompt.read_image", lambda *_: decoded.append(1))
    with pytest.raises(CapacityError, match="4 images"):
        bsjax.generate(tiny_model, messages, max_new_tokens=10**9)
    assert not decoded and not image_threads()


@pytest.mark.slow
def test_images_that_are_damaged_behind_their_headers_are_named(tiny_model, tmp_path):
    parts = [picture_file(tmp_path, number) for number in range(3)]
    path = tmp_path / "1.png"
    path.write_bytes(path.read_bytes()[:300])
    calls = (
        lambda: tiny_model.prompt(user(*parts)),
        lambda: bsjax.generate(tiny_model, user(*parts), max_new_tokens=1),
        lambda: bsjax.stream(tiny_model, user(*parts), max_new_tokens=1),
        lambda: bsjax.forward(tiny_model, user(*parts)),
        lambda: bsjax.Session(tiny_model, max_tokens=512).generate(user(*parts)),
    )
    for call in calls:
        with pytest.raises(MessageError, match=r"Image 2 of 3 .*1\.png.* cannot be read"):
            call()
        assert not image_threads()
    good, bad = user(parts[0]), user(parts[1])
    results = bsjax.generate(tiny_model, [good, bad, good], max_new_tokens=2, return_errors=True)
    assert isinstance(results[1], MessageError) and "conversations[1]: Image 1" in str(results[1])
    assert results[0].token_ids == results[2].token_ids


def test_images_are_read_side_by_side(monkeypatch):
    """Whoever waits for one of them lets the others be read, too."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    both_run = threading.Barrier(2)
    with ImageReader() as reader:
        requested = [reader.request(lambda: both_run.wait(timeout=20)) for _ in range(2)]
        assert sorted(each.result() for each in requested) == [0, 1]


@pytest.mark.slow
def test_a_damaged_image_leaves_a_session_as_it_was(tiny_model, tmp_path):
    session = bsjax.Session(tiny_model, max_tokens=512, image_cache_bytes=0)
    messages = [{"role": "user", "content": "Hi"}]
    answer = session.generate(messages, max_new_tokens=4)
    tokens = session.tokens
    damaged = picture_file(tmp_path, 0)
    path = tmp_path / "0.png"
    path.write_bytes(path.read_bytes()[:300])
    messages = [*messages, {"role": "assistant", "content": answer.text}, *user(damaged)]
    for call in (session.generate, session.forward):
        with pytest.raises(MessageError, match="cannot be read"):
            call(messages)
        assert session.tokens == tokens > 0


@pytest.mark.slow
def test_a_generator_of_conversations_may_use_its_buffer_again(tiny_model, tmp_path):
    frames = [np.full((84, 84, 3), value, np.uint8) for value in (0, 120, 255)]
    options = {"max_new_tokens": 2, "log_probabilities": 0}

    def conversations():
        buffer = np.empty_like(frames[0])
        for frame in frames:
            buffer[:] = frame
            yield user({"type": "image", "image": buffer})

    expected = bsjax.generate(
        tiny_model, [user({"type": "image", "image": frame}) for frame in frames], **options
    )
    given = dict(bsjax.generate_iter(tiny_model, conversations(), **options))
    for number, wanted in enumerate(expected):
        ours, theirs = (
            [each.log_probability for each in answer.log_probabilities or ()]
            for answer in (given[number], wanted)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_settings_of_another_tower_are_refused(tiny_model):
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        processor = copy.deepcopy(tiny_model.image_processor)
        setattr(processor, name, 1)
        other = dataclasses.replace(tiny_model, image_processor=processor)
        with pytest.raises(CheckpointError, match=f"{name} 1"):
            other.prompt(user({"type": "image", "image": Image.new("RGB", (56, 56))}))


def test_leaving_a_reader_ends_its_downloads(monkeypatch):
    begun = threading.Event()

    class Slow:
        def __init__(self, *_):
            self.closed = threading.Event()

        def run(self):
            begun.set()
            self.closed.wait(20)
            return b""

        def close(self):
            self.closed.set()

    monkeypatch.setattr(downloads, "Download", Slow)
    with ImageReader() as reader:
        requested = reader.request(lambda: downloads.download("http://a/b", LIMITS))
        reader.start()
        begun.wait(10)
    with pytest.raises(ValueError, match="the call has ended"):
        requested.result()


def test_one_image_object_may_occur_many_times(tiny_model, tmp_path):
    picture_file(tmp_path, 0, (300, 300))
    alone = tiny_model.prompt(user({"type": "image", "path": str(tmp_path / "0.png")}))
    for _ in range(5):
        with Image.open(tmp_path / "0.png") as lazy:
            prompt = tiny_model.prompt(user(*[{"type": "image", "image": lazy}] * 6))
        for image in prompt.images:
            np.testing.assert_array_equal(image.patches, alone.images[0].patches)


def test_leaving_a_reader_cancels_what_has_not_begun():
    begun, release = threading.Semaphore(0), threading.Event()
    read = []

    def slow(number):
        begun.release()
        release.wait(10)
        read.append(number)

    with pytest.raises(KeyboardInterrupt), ImageReader() as reader:
        for number in range(100):
            reader.request(lambda number=number: slow(number))
        reader.start()
        begun.acquire()
        release.set()
        raise KeyboardInterrupt
    assert len(read) < 100 and not image_threads()
