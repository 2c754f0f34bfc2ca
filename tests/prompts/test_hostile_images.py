"""Small inputs that would need a lot of memory, and sources that are not images, are refused."""

import base64
import io
import os
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import bsjax
from bsjax.errors import MessageError
from bsjax.models import FAMILIES
from bsjax.prompts.prompt import Processor
from bsjax.prompts.sources import ImageSources
from tests.support.paths import ROOT
from tests.support.small_models import Shape, small_config

FOLDER = ROOT / "examples" / "tiny-qwen2.5-vl"


@pytest.fixture(scope="module")
def processor():
    return Processor(
        AutoConfig.from_pretrained(FOLDER),
        FAMILIES["qwen2_5_vl"],
        AutoTokenizer.from_pretrained(FOLDER),
        Qwen2VLImageProcessorPil.from_pretrained(FOLDER),
    )


def user(**part) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", **part}]}]


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def black_png(width: int, height: int) -> bytes:
    """A grey image of any size in few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        whole = name + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * min(height, 100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


SMALL = Image.new("RGB", (56, 56))
TEXT = base64.b64encode(encoded(SMALL)).decode()
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 56 56\n%%EndComments\nshowpage\n"


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


# Text of which a part is base64, and which readers that leave out the rest take for another image.
NOT_BASE64 = [
    ("base64", f"{TEXT}!!!!"),
    ("base64", f"{TEXT}{TEXT}="),
    ("base64", TEXT[:40] + "-_-_" + TEXT[40:]),
    ("url", f"data:image/png;base64,{TEXT[:40]}%2B%2F{TEXT[40:]}"),
]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"url": data_url(black_png(13_000, 13_000))}, "max_source_pixels"),
        ({"url": data_url(black_png(10**6, 10**6))}, "max_source_pixels"),
        ({"url": data_url(black_png(0, 0))}, "cannot|no pixels"),
        ({"url": data_url(black_png(1, 8 * 10**7))}, "more than 1,048,576 on a side"),
        ({"image": np.broadcast_to(np.uint8(9), (3, 1, 8 * 10**7))}, "on a side"),
        ({"image": SMALL, "min_pixels": 10**8}, r"1\d\d,\d{3},\d{3} pixels.*max_scaled_pixels"),
        ({"image": SMALL, "min_pixels": 10**30}, "min_pixels must be"),
        ({"image": SMALL, "max_pixels": 10**5000}, "max_pixels must be"),
        ({"image": Image.new("RGB", (0, 0))}, "no pixels: it is 0 x 0"),
        ({"image": Image.new("RGB", (0, 9))}, "no pixels: it is 0 x 9"),
        ({"image": np.broadcast_to(np.uint8(1), (3, 10**5, 10**5))}, "max_source_pixels"),
        ({"image": np.zeros((56, 0, 3), np.uint8)}, "is not an image"),
        ({"image": SMALL.resize((9000, 9))}, "aspect ratio"),
        ({"url": data_url(POSTSCRIPT)}, "PostScript"),
        ({"url": "data:image/png;base64"}, "comma"),
        ({"url": "DATA:nothing"}, "comma"),
        ({"url": "data:,"}, "cannot identify"),
        ({"base64": "http://127.0.0.1/a.png"}, "cannot|not base64"),
        ({"base64": str(FOLDER / "missing.png")}, "cannot|not base64"),
        ({"base64": "\ud800"}, "not base64"),
        *(({key: text}, "not base64 data") for key, text in NOT_BASE64),
        ({"base64": SMALL}, "holds a Image and not base64 text"),
        ({"base64": FOLDER}, "holds a path"),
        ({"path": SMALL}, "not the path of a file"),
        ({"path": f"data:image/png;base64,{TEXT}"}, "no such file"),
        ({"path": "a\0b"}, "no such file"),
        ({"path": "/dev/zero"}, "a device"),
        ({"path": str(FOLDER)}, "no such file"),
        ({"image": "ftp://a/b.png"}, "no such file"),
        ({"url": "http://"}, "no host"),
        ({"url": "HTTP://127.0.0.1/a.png"}, "own network"),
        ({"url": "http://[::1/"}, "cannot be read"),
        ({"url": "http://a:99999/"}, "cannot be read"),
        ({"image": {"url": ["x"]}}, "list is not an image"),
        ({"image": b"bytes"}, "bytes is not an image"),
        ({"image": True}, "bool is not an image"),
    ],
)
def test_it_is_refused_with_the_reason(processor, part, reason):
    tracemalloc.start()
    with pytest.raises(MessageError, match=reason) as caught:
        processor.prompt(user(**part))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20
    assert "Image 1 of 1 (messages[0]['content'][0]" in str(caught.value)
    assert str(caught.value).isprintable()


def progressive(scans: int, after: bytes = b"") -> bytes:
    """A JPEG file that goes over its pixels `scans` times more than the encoder meant."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (10, 200, 30)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * (1 + scans) + content[-2:] + after


def test_a_jpeg_file_with_thousands_of_scans_is_refused(processor, tmp_path):
    (tmp_path / "many.jpg").write_bytes(progressive(5000))
    for source in (str(tmp_path / "many.jpg"), data_url(progressive(5000))):
        with pytest.raises(MessageError, match="more than 100 scans"):
            processor.prompt(user(image=source))
    # What follows the end of the image, such as a video, is not decoded.
    for content in (progressive(0), progressive(0, after=b"\xff\xda" * 500)):
        (tmp_path / "few.jpg").write_bytes(content)
        assert processor.prompt(user(image=str(tmp_path / "few.jpg"))).token_ids.size


@pytest.mark.parametrize("end", [b"\x00", b"\xd0"])
def test_fill_bytes_of_a_jpeg_file_take_no_more_time_than_others(processor, end):
    content = progressive(0)
    # Looking at all of them from each of them would take an hour, and the suite gives up earlier.
    filled = content[:-2] + b"\xff" * 2**20 + end + content[-2:]
    plain, ours = (processor.prompt(user(image=data_url(each))) for each in (content, filled))
    np.testing.assert_array_equal(ours.pixels.values, plain.pixels.values)


def test_a_pipe_is_refused_before_it_is_opened(processor, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(MessageError, match="a pipe"):
        processor.prompt(user(image=tmp_path / "pipe.png"))


def test_the_key_of_base64_never_names_a_file(processor, tmp_path):
    path = tmp_path / "small.png"
    path.write_bytes(encoded(SMALL))
    with pytest.raises(MessageError, match="cannot|not base64"):
        processor.prompt(user(base64=str(path)))


@pytest.mark.parametrize("key", ["image", "url", "path", "image_url"])
@pytest.mark.parametrize("form", ["{}", "file://{}", "FILE://{}"])
def test_files_can_be_forbidden_for_a_model_or_a_call(processor, tmp_path, key, form):
    path = tmp_path / "small.png"
    path.write_bytes(encoded(SMALL))
    name = form.format(path)
    assert processor.prompt(user(**{key: name})).image_tokens == (4,)
    for wanted in (name, f"{name}.missing"):
        with pytest.raises(MessageError, match=r"files are not allowed here \(allow_files\)"):
            processor.prompt(user(**{key: wanted}), allow_files=False)
    closed = Processor(
        processor.config,
        processor.family,
        processor.tokenizer,
        processor.image_processor,
        ImageSources(allow_files=False),
    )
    with pytest.raises(MessageError, match="allow_files"):
        closed.prompt(user(**{key: name}))
    for harmless in (SMALL, TEXT, data_url(encoded(SMALL))):
        assert closed.prompt(user(image=harmless)).image_tokens == (4,)


def test_urls_can_be_forbidden(processor):
    with pytest.raises(MessageError, match=r"URLs are not allowed here \(allow_urls\)"):
        processor.prompt(user(image="https://example.com/a.png"), allow_urls=False)


def test_a_limit_on_bytes_holds_for_data(processor):
    sources = ImageSources(max_bytes=50)
    limited = Processor(
        processor.config,
        processor.family,
        processor.tokenizer,
        processor.image_processor,
        sources,
    )
    for part in ({"base64": TEXT}, {"image": TEXT}, {"url": data_url(encoded(SMALL))}):
        with pytest.raises(MessageError, match=re.escape("50 bytes (max_bytes)")):
            limited.prompt(user(**part))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_bytes": 0},
        {"max_seconds": float("inf")},
        {"max_redirects": -1},
        {"max_source_pixels": -5},
    ],
)
def test_settings_are_checked(settings):
    with pytest.raises(MessageError, match=next(iter(settings))):
        ImageSources(**settings)


def test_crops_are_counted_before_they_are_made():
    family = FAMILIES["gemma3"]
    image_processor = Gemma3ImageProcessorPil(size={"height": 896, "width": 896})
    options = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 1,
        "pan_and_scan_max_num_crops": 10**9,
    }
    config = small_config(Shape("gemma3", image_side=224))

    def pixels(height, width):
        return family.image_shapes(height, width, options, image_processor, config).pixels

    assert pixels(1, 10_000) == 10_001 * 896**2
    assert pixels(500, 500) == 896**2


def test_generate_forward_and_stream_take_the_settings(tiny_model, tmp_path):
    path = tmp_path / "small.png"
    path.write_bytes(encoded(SMALL))
    messages = user(image=path)
    for call in (
        lambda: bsjax.generate(tiny_model, messages, allow_files=False),
        lambda: bsjax.forward(tiny_model, messages, allow_files=False),
        lambda: list(bsjax.stream(tiny_model, messages, allow_files=False)),
        lambda: tiny_model.prompt(messages, allow_files=False),
        lambda: bsjax.generate(tiny_model, user(url="http://a.b/c"), allow_urls=False),
    ):
        with pytest.raises(MessageError, match="allow_"):
            call()
