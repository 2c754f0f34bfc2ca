"""A session decodes no image of its history again, and sees every change of one."""

import base64
import os

import numpy as np
import pytest
from PIL import Image

import bsjax
from bsjax.prompts.known_images import ImageContent, KnownImages
from tests.support.messages import asked


def pixels_of(number):
    return np.random.default_rng(number).integers(0, 256, (84, 112, 3), dtype=np.uint8)


def as_file(folder, number):
    path = folder / "picture.bmp"
    Image.fromarray(pixels_of(number)).save(path.with_suffix(".new"), "BMP")
    path.with_suffix(".new").replace(path)
    return path


def changed_file(path, number):
    """As large as before, with the times of before."""
    before = os.stat(path)
    Image.fromarray(pixels_of(number)).save(path, "BMP")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns


def changed_array(array, number):
    array[:] = pixels_of(number)


def changed_picture(picture, number):
    picture.paste(Image.fromarray(pixels_of(number)))


SOURCES = {
    "file": (as_file, changed_file),
    "array": (lambda folder, number: pixels_of(number), changed_array),
    "PIL": (lambda folder, number: Image.fromarray(pixels_of(number)), changed_picture),
}


@pytest.fixture
def decoded(monkeypatch):
    """The images whose pixels were read."""
    found = []
    pixels = ImageContent.pixels

    def counting(content):
        found.append(content)
        return pixels(content)

    monkeypatch.setattr(ImageContent, "pixels", counting)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_every_change_of_an_image_is_seen(tiny_model, tmp_path, kind):
    make, change = SOURCES[kind]
    source = make(tmp_path, 0)
    session = bsjax.Session(tiny_model, max_tokens=512)
    messages = asked(source, "Which?")
    first = session.generate(messages, max_new_tokens=4)
    assert session.generate(messages, max_new_tokens=4).stats.reused_tokens > 12
    change(source, 1)
    changed = session.generate(messages, max_new_tokens=4)
    expected = bsjax.generate(tiny_model, asked(pixels_of(1), "Which?"), max_new_tokens=4)
    assert changed.token_ids == expected.token_ids
    assert changed.stats.reused_tokens < first.prompt_tokens - 12, "the image runs again"


@pytest.mark.slow
def test_images_of_the_history_are_not_decoded_again(tiny_model, tmp_path, decoded):
    Image.fromarray(pixels_of(0)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    data = "data:image/png;base64," + base64.b64encode((tmp_path / "0.png").read_bytes()).decode()
    sources = [
        *(tmp_path / "0.png", tmp_path / "1.png"),
        *(pixels_of(2), Image.fromarray(pixels_of(3)), Image.fromarray(pixels_of(4)[..., 0])),
    ]
    palette = Image.fromarray(pixels_of(5)).quantize(16)
    session = bsjax.Session(tiny_model, max_tokens=1024, image_cache_bytes=0)
    messages = asked(*sources, palette, "Which?")
    messages[0]["content"].append({"type": "image_url", "image_url": {"url": data}})
    session.generate(messages, max_new_tokens=1)
    assert len(decoded) == len(sources) + 2
    decoded.clear()
    messages += [{"role": "assistant", "content": "That."}, *asked(pixels_of(6), "And now?")]
    answer = session.generate(messages, max_new_tokens=4)
    assert len(decoded) == 2, "the new one, and the one whose pixels alone do not say what it is"
    assert answer.stats.reused_images == 0 < answer.stats.reused_tokens
    assert answer.token_ids == bsjax.generate(tiny_model, messages, max_new_tokens=4).token_ids
    # Where the history is left before its last image, that image runs.
    other = asked(*sources[:2], "Why?", *sources[2:], "Which?")
    decoded.clear()
    logits, first = session.forward(other)
    assert len(decoded) == len(sources) - 2
    expected = bsjax.forward(tiny_model, other)[first:]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # It needs no pixels if its features are kept.
    session = bsjax.Session(tiny_model, max_tokens=1024)
    session.forward(messages)
    decoded.clear()
    session.forward(other)
    assert not decoded


def test_options_and_crops_have_digests_of_their_own():
    known = KnownImages()
    known.put("content", 0, "whole")
    known.put("content", 1, "crop")
    known.put(None, 0, "unreadable")
    assert [known.get("content", index) for index in range(3)] == ["whole", "crop", None]
    assert known.get(None, 0) is None
