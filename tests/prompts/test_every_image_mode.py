"""Every mode, dtype and layout gives the pixels of transformers, or is refused with a reason."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from transformers import Gemma3ImageProcessorPil
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bsjax.errors import MessageError
from bsjax.prompts.images import read_image
from bsjax.prompts.sources import ImageSources
from tests.support.paths import ROOT

PROCESSORS = (
    Qwen2VLImageProcessorPil.from_pretrained(ROOT / "examples" / "tiny-qwen2.5-vl"),
    Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
)
RANDOM = np.random.default_rng(0)
COLORS = RANDOM.integers(0, 256, (48, 64, 4), np.uint8)
OPAQUE = COLORS.copy()
OPAQUE[..., 3] = 255
RGBA = Image.fromarray(COLORS, "RGBA")
RGB = Image.fromarray(COLORS[..., :3])


def palette(transparency: int | None = None) -> Image.Image:
    image = RGB.quantize(16)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


IMAGES = {
    "1": RGB.convert("1"),
    "L": RGB.convert("L"),
    "LA": RGBA.convert("LA"),
    "P": palette(),
    "P transparent": palette(3),
    "PA": palette().convert("PA"),
    "RGB": RGB,
    "RGBA": RGBA,
    "RGBA opaque": Image.fromarray(OPAQUE, "RGBA"),
    "RGBX": RGB.convert("RGBX"),
    "RGBa": RGBA.convert("RGBa"),
    "CMYK": RGB.convert("CMYK"),
    "YCbCr": RGB.convert("YCbCr"),
    "HSV": RGB.convert("HSV"),
    "LAB": Image.new("LAB", (64, 48), (128, 100, 90)),
    "I": Image.fromarray(COLORS[..., 0].astype(np.int32)),
    "I dark": Image.fromarray((COLORS[..., 0] % 2).astype(np.int32)),
    "I large": Image.fromarray(COLORS[..., 0].astype(np.int32) * 257),
    "I negative": Image.fromarray(-COLORS[..., 0].astype(np.int32)),
    "I;16": Image.fromarray(COLORS[..., 0].astype(np.uint16) * 257),
    "I;16B": Image.frombytes("I;16B", (64, 48), COLORS[..., :2].tobytes()),
    "F": Image.fromarray(COLORS[..., 0].astype(np.float32)),
    "F in 0..1": Image.fromarray(COLORS[..., 0].astype(np.float32) / 255),
    "F with fractions": Image.fromarray(COLORS[..., 0].astype(np.float32) * 0.7),
    "F not finite": Image.fromarray(np.full((48, 64), np.nan, np.float32)),
    "F large": Image.fromarray(COLORS[..., 0].astype(np.float32) * 257),
    "one row": RGB.crop((0, 0, 64, 1)),
    "three rows": RGB.crop((0, 0, 64, 3)),
    "three columns": RGB.crop((0, 0, 3, 48)),
}
REFUSED = {
    "I large": "between 0 and 65535",
    "I negative": "between -255 and 0",
    "I;16": "16 bits",
    "I;16B": "16 bits",
    "F in 0..1": "multiply by 255",
    "F with fractions": "not whole",
    "F not finite": "between nan",
    "F large": "between 0 and 65535",
}
FILES = {
    "1": "PNG",
    "L": "PNG",
    "LA": "PNG",
    "P": "PNG",
    "P transparent": "PNG",
    "RGB": "JPEG",
    "RGBA": "PNG",
    "RGBA opaque": "PNG",
    "CMYK": "JPEG",
    "YCbCr": "JPEG",
    "I;16": "PNG",
    "F": "TIFF",
    "F in 0..1": "TIFF",
    "three rows": "PNG",
    "three columns": "PNG",
}
REFUSED_FILES = {**REFUSED} | dict.fromkeys(("LA", "RGBA"), "transparent pixels")
LIMITS = ImageSources()


def equal(ours, theirs) -> None:
    for process in PROCESSORS:
        expected = process(images=[theirs], return_tensors="np")["pixel_values"]
        got = process(images=[ours], return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", IMAGES)
def test_a_pil_image(name):
    image = IMAGES[name]
    if name in REFUSED:
        with pytest.raises((MessageError, ValueError), match=REFUSED[name]):
            equal(read_image("image", image, LIMITS), image)
    else:
        equal(read_image("image", image, LIMITS), image)


@pytest.mark.parametrize("name", FILES)
def test_a_file(name, tmp_path):
    path = tmp_path / f"image.{FILES[name]}"
    IMAGES[name].save(path, FILES[name])
    if name in REFUSED_FILES:
        with pytest.raises(MessageError, match=REFUSED_FILES[name]):
            read_image("path", str(path), LIMITS)
    else:
        ours = read_image("path", str(path), LIMITS)
        equal(ours, load_image(str(path)))
        with Image.open(path) as opened:
            # A file and a PIL image give the same pixels.
            equal(ours, opened)


def test_an_unused_transparent_color_is_accepted(tmp_path):
    path = tmp_path / "image.gif"
    palette().save(path, transparency=200)
    with Image.open(path) as opened:
        equal(read_image("path", str(path), LIMITS), opened)


DTYPES = ["uint8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64"]
SHAPES = {
    "height x width": (48, 64),
    "one channel last": (48, 64, 1),
    "three channels last": (48, 64, 3),
    "four channels last": (48, 64, 4),
    "one channel first": (1, 48, 64),
    "three channels first": (3, 48, 64),
    "four channels first": (4, 48, 64),
    "two rows": (2, 64, 3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SHAPES)
def test_an_array(dtype, layout):
    shape = SHAPES[layout]
    array = RANDOM.integers(0, 256, shape).astype(dtype)
    theirs = array[..., None] if array.ndim == 2 else array
    if layout.startswith("four") and dtype.startswith("float"):
        with pytest.raises(ValueError, match=r"outside the range \[0, 1\]"):
            equal(read_image("image", array, LIMITS), theirs)
    else:
        equal(read_image("image", array, LIMITS), theirs)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_few_rows_without_channels_are_rows(rows):
    array = COLORS[:rows, :, 0]
    equal(read_image("image", array, LIMITS), Image.fromarray(array))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (COLORS[:1, :, :3], "first or last"),
        (COLORS[:3, :, :3], "first or last"),
        (COLORS[:4, :, :4], "first or last"),
        (COLORS[:, :3, :3].transpose(2, 0, 1), "first or last"),
        (COLORS[..., :2], "channels first or last|is not an image"),
        (COLORS[None], "is not an image"),
        (COLORS[..., :3] > 99, "type bool"),
        (COLORS.astype(np.complex64), "type complex64"),
        (COLORS[..., :3].astype("S3"), "type"),
        (COLORS[..., :3] / np.float32(255), "multiply by 255"),
        (COLORS[..., :3] / np.float64(255), "multiply by 255"),
        ((COLORS[..., :3] / 255).astype(np.float16), "multiply by 255"),
        (COLORS[..., :3] * 0.7, "not whole"),
        (COLORS[..., :3].astype(np.int16) - 128, "between -128 and 127"),
        (COLORS[..., :3].astype(np.uint16) * 257, "between 0 and 65535"),
        (np.full((48, 64, 3), np.inf), "between inf"),
    ],
)
def test_an_array_that_is_ambiguous_or_would_lose_values(array, reason):
    with pytest.raises(MessageError, match=reason):
        read_image("image", array, LIMITS)


def test_an_encoded_image_needs_no_file():
    buffer = io.BytesIO()
    RGB.save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    equal(read_image("base64", text, LIMITS), RGB)
