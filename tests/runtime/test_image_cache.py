"""Features of images are kept, so that an image that comes again needs no vision tower."""

import numpy as np
import pytest

import bsjax
from bsjax.errors import CheckpointError, GenerationError
from bsjax.models.pixels import PixelScale
from bsjax.prompts.prompt import PromptImage
from bsjax.runtime import images
from bsjax.runtime.image_cache import ImageCache, image_cache_of
from tests.support.messages import asked


def picture(number, size=(84, 112)):
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture
def encoded(monkeypatch):
    """The number of images in each group that goes through the vision tower."""
    found = []
    pixels = images.ImageGroup.pixels

    def counting(group):
        found.append(len(group.images))
        return pixels(group)

    monkeypatch.setattr(images.ImageGroup, "pixels", counting)
    return found


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return bsjax.load(tiny_checkpoint, image_cache_bytes=2**20)


CONVERSATIONS = [
    asked(picture(0), picture(1), "Which?"),
    asked(picture(2), picture(1), "Why?", picture(0), picture(3, (56, 56))),
    asked("First.", picture(3, (56, 56)), picture(2), picture(4), picture(0), "Last?"),
]
IMAGES, KNOWN = [2, 4, 4], [0, 2, 3]


@pytest.mark.slow
def test_images_come_again_in_any_order(tiny_model, model, encoded):
    image_cache_of(model).clear()
    profile = bsjax.Profile.uniform("INTRA_IMAGE_SINK", model)
    for conversation, count, known in zip(CONVERSATIONS, IMAGES, KNOWN, strict=True):
        plain = bsjax.generate(tiny_model, conversation, profile=profile, max_new_tokens=4)
        encoded.clear()
        result = bsjax.generate(model, conversation, profile=profile, max_new_tokens=4)
        assert result.token_ids == plain.token_ids
        assert (result.stats.reused_images, plain.stats.reused_images) == (known, 0)
        assert sum(encoded) == count - known
    encoded.clear()
    logits = bsjax.forward(model, CONVERSATIONS[1], profile=profile)
    assert not encoded
    expected = bsjax.forward(tiny_model, CONVERSATIONS[1], profile=profile)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_batches_and_sessions_share_the_models_cache(tiny_model, model, encoded):
    image_cache_of(model).clear()
    # Also one that was made when the cache was empty.
    session = bsjax.Session(model, max_tokens=512, image_cache_bytes=0)
    expected = [bsjax.generate(tiny_model, each, max_new_tokens=4) for each in CONVERSATIONS]
    bsjax.generate(model, CONVERSATIONS[0], max_new_tokens=1)
    encoded.clear()
    results = bsjax.generate(model, CONVERSATIONS, max_new_tokens=4)
    assert [each.token_ids for each in results] == [each.token_ids for each in expected]
    assert [each.stats.reused_images for each in results] == [2, 2, 1]
    encoded.clear()
    for conversation, plain in zip(CONVERSATIONS, expected, strict=True):
        assert session.generate(conversation, max_new_tokens=4).token_ids == plain.token_ids
    answer = [*CONVERSATIONS[2], {"role": "assistant", "content": "this one"}]
    ours = bsjax.score(model, answer).log_probability
    assert not encoded
    assert ours == pytest.approx(bsjax.score(tiny_model, answer).log_probability, rel=1e-4)


def test_a_session_has_a_cache_unless_it_is_told_not_to(tiny_model, encoded):
    for cache_bytes, known in ((2**20, 2), (0, 0)):
        session = bsjax.Session(tiny_model, max_tokens=512, image_cache_bytes=cache_bytes)
        session.generate(CONVERSATIONS[0], max_new_tokens=1)
        swapped = asked(picture(1), picture(0), "Which?")
        assert session.generate(swapped, max_new_tokens=1).stats.reused_images == known
    stats = bsjax.generate(tiny_model, CONVERSATIONS[0], max_new_tokens=1).stats
    assert stats.reused_images == 0 and image_cache_of(tiny_model) is None


SCALE = PixelScale(np.ones(3, np.float32), np.zeros(3, np.float32))


def image_of(number):
    pixels = np.full((4, 3), number, np.uint8)
    return PromptImage(np.int32([1, 2, 2]), 1, SCALE, lambda: pixels)


def test_what_does_not_fit_is_dropped_least_recently_used_first():
    cache = ImageCache(3 * 40)
    features = [np.full((1, 10), number, np.float32) for number in range(5)]
    for number in range(3):
        cache.put(image_of(number), features[number])
    assert cache.get(image_of(0)) is features[0]
    cache.put(image_of(3), features[3])
    assert [cache.get(image_of(number)) is not None for number in range(4)] == [
        True,
        False,
        True,
        True,
    ]
    cache.put(image_of(4), np.zeros((1, 31), np.float32))
    assert (len(cache), cache.bytes) == (3, 120), "larger than the cache"


def test_bad_sizes_are_refused(tiny_model, tiny_checkpoint):
    with pytest.raises(CheckpointError, match="image_cache_bytes"):
        bsjax.load(tiny_checkpoint, image_cache_bytes=-1)
    with pytest.raises(GenerationError, match="image_cache_bytes"):
        bsjax.Session(tiny_model, image_cache_bytes=-1)
