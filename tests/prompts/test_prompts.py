"""A prompt equals that of transformers for the same messages; invalid messages are explained."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bsjax.errors import MessageError
from bsjax.models import FAMILIES
from bsjax.models.pixels import pixel_values_of
from bsjax.prompts.prompt import Processor, Prompt
from tests.support.paths import ROOT

CHECKPOINT = ROOT / "examples" / "tiny-qwen2.5-vl"
TOKENIZER = AutoTokenizer.from_pretrained(CHECKPOINT)
IMAGE_PROCESSOR = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)
CONFIG = AutoConfig.from_pretrained(CHECKPOINT)


def prepare(messages, tokenizer=TOKENIZER) -> Prompt:
    return Processor(CONFIG, FAMILIES["qwen2_5_vl"], tokenizer, IMAGE_PROCESSOR).prompt(messages)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    return Image.fromarray(coarse, "RGBA").resize((width, height), 3).convert(mode)


def user(*parts) -> list[dict]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def image(source, **options) -> dict:
    return {"type": "image", "image": source, **options}


def hugging_face_prompt(messages) -> tuple[np.ndarray, dict]:
    """What Qwen2VLProcessor computes, without its video processor, which needs torchvision."""
    processor = object.__new__(Qwen2VLProcessor)
    processor.image_processor, processor.tokenizer = IMAGE_PROCESSOR, TOKENIZER
    processor.image_token = "<|image_pad|>"
    images = [
        part["image"]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    features = IMAGE_PROCESSOR(images=images, return_tensors="np")
    for index in range(len(images)):
        expanded = processor.replace_image_token(features, index)
        text = text.replace("<|image_pad|>", "#" * len(expanded.split("<|image_pad|>")[1:]), 1)
    text = text.replace("#", "<|image_pad|>")
    return np.array(TOKENIZER(text)["input_ids"]), features


def values_of(prompt):
    return pixel_values_of(prompt.pixels, frames=2)


SIZES = [(56, 56), (640, 427), (90, 700), (1600, 200), (28, 28), (333, 517)]


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_prompts_equal_those_of_transformers(images, mode):
    pictures = [picture(*SIZES[index], mode, seed=index) for index in range(images)]
    messages = [
        {"role": "system", "content": "Answer in one word."},
        *user("Compare", *(image(item) for item in pictures), "with each other: which is first?"),
    ]
    prompt = prepare(messages)
    token_ids, features = hugging_face_prompt(messages)
    np.testing.assert_array_equal(prompt.token_ids, token_ids)
    np.testing.assert_allclose(values_of(prompt), features["pixel_values"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(prompt.grid_thw, features["image_grid_thw"])
    assert prompt.token_ids.dtype == prompt.grid_thw.dtype == np.int32
    assert len(prompt.image_tokens) == images
    assert sum(prompt.image_tokens) == np.sum(prompt.token_ids == CONFIG.image_token_id)


def test_images_keep_their_order_over_several_messages():
    first, second = picture(56, 112), picture(224, 56)
    prompt = prepare(
        [
            *user(image(first), "What is it?"),
            {"role": "assistant", "content": "A picture."},
            *user("And this?", image(second)),
        ]
    )
    assert prompt.image_tokens == (8, 16)
    expected = IMAGE_PROCESSOR([first, second], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(values_of(prompt), expected, rtol=0, atol=1e-6)


def test_text_alone_has_no_pixels():
    prompt = prepare([{"role": "user", "content": "Count: one, two, three."}])
    assert prompt.images == ()
    assert prompt.grid_thw.shape == (0, 3)
    assert prompt.image_tokens == ()
    text = TOKENIZER.decode(prompt.token_ids)
    assert text.endswith(
        "<|im_start|>user\nCount: one, two, three.<|im_end|>\n<|im_start|>assistant\n"
    )


def png(item: Image.Image) -> bytes:
    buffer = io.BytesIO()
    item.save(buffer, "PNG")
    return buffer.getvalue()


def test_every_way_to_name_an_image_gives_the_same_pixels(tmp_path):
    original = picture(84, 56)
    path = tmp_path / "a picture.png"
    path.write_bytes(png(original))
    text = base64.b64encode(png(original)).decode()
    expected = prepare(user(image(original), "?"))
    for part in (
        image(path),
        image(str(path)),
        image(path.as_uri()),
        image(f"data:image/png;base64,{text}"),
        image(text),
        image(np.array(original)),
        image(np.array(original).transpose(2, 0, 1)),
        image(np.array(original).astype(np.float32)),
        {"type": "image", "path": str(path)},
        {"type": "image", "url": str(path), "text": None},
        {"type": "image", "base64": text},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
        {"type": "image_url", "image_url": {"url": path.as_uri(), "detail": "low"}},
    ):
        prompt = prepare(user(part, "?"))
        np.testing.assert_array_equal(prompt.token_ids, expected.token_ids)
        np.testing.assert_array_equal(values_of(prompt), values_of(expected), err_msg=str(part))


def test_greyscale_array_equals_the_greyscale_image():
    original = picture(84, 56, "L")
    np.testing.assert_array_equal(
        values_of(prepare(user(image(np.array(original))))),
        values_of(prepare(user(image(original)))),
    )


def test_exif_rotates_files_and_not_pil_images(tmp_path):
    sideways = picture(112, 56)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "sideways.png"
    sideways.save(path, exif=exif)
    assert prepare(user(image(path))).grid_thw.tolist() == [[1, 8, 4]]
    assert prepare(user(image(Image.open(path)))).grid_thw.tolist() == [[1, 4, 8]]


def test_pixel_bounds_apply_only_to_their_image():
    large = picture(640, 480)
    small = picture(60, 60)
    prompt = prepare(
        user(
            image(large),
            image(large, max_pixels=28 * 28 * 20),
            image(small, min_pixels=28 * 28 * 50),
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,"
             + base64.b64encode(png(large)).decode()}, "max_pixels": 28 * 28},
        )
    )  # fmt: skip
    assert prompt.image_tokens[0] == 17 * 23
    assert prompt.image_tokens[1] <= 20
    assert prompt.image_tokens[2] >= 50
    assert prompt.image_tokens[3] == 1


def refused(messages, *words):
    with pytest.raises(MessageError) as caught:
        prepare(messages)
    for word in words:
        assert word in str(caught.value)


def test_messages_of_an_invalid_form_are_refused():
    refused([], "empty")
    refused("Hello", "list", "str")
    refused({"role": "user", "content": "Hello"}, "list", "dict")
    refused([user("Hello")], "messages[0] is a list")
    refused([{"role": "user"}], "messages[0]", "'content'")
    refused([{"content": "Hello"}], "messages[0]", "'role'")
    refused([{"role": "user", "content": 3}], "messages[0]['content']", "int")
    refused(user("a", {"type": "audio", "audio": "a.wav"}), "['content'][1]", "'audio'")
    refused(user({"text": "no type"}), "['content'][0]", "None")
    refused(user({"type": "video", "video": "a.mp4"}), "['content'][0]", "video")
    refused(user({"type": "text"}), "'text'")
    refused(user({"type": "text", "text": "a", "size": 3}), "'size'")
    refused(user({"type": "image"}), "without an image")
    refused(user({"type": "image", "url": "a", "path": "b"}), "more than once", "url", "path")
    refused(user({"type": "image_url", "image_url": {"detail": "low"}}), "'url'")
    refused(user(image(picture(56, 56), resized_height=28)), "'resized_height'")


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "large"])
def test_pixel_bounds_are_checked(name, value):
    refused(user(image(picture(56, 56), **{name: value})), name)


def test_crossed_pixel_bounds_are_refused():
    refused(user(image(picture(56, 56), min_pixels=1000, max_pixels=999)), "1000", "999")


def test_placeholders_and_images_must_match():
    refused(user("Look: <|image_pad|>"), "0 images", "1 image placeholder.", "<|image_pad|>")
    refused([{"role": "user", "content": "<|image_pad|>"}], "0 images", "1 image placeholder.")
    refused(user(image(picture(56, 56)), "<|image_pad|>"), "1 image,", "2 image placeholders")
    refused(user("<|video_pad|>"), "video")


def test_images_that_the_template_leaves_out_are_refused():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    with pytest.raises(MessageError, match="1 image, but the prompt has 0 image placeholders"):
        prepare(user("a", image(picture(56, 56))), tokenizer)


def test_errors_of_the_template_are_passed_on():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(MessageError, match="roles must alternate"):
        prepare(user("a"), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(MessageError, match="no chat template"):
        prepare(user("a"), tokenizer)


def test_unreadable_images_are_named(tmp_path):
    good = image(picture(56, 56))
    broken = tmp_path / "broken.png"
    broken.write_bytes(png(picture(300, 300))[:2000])
    text = tmp_path / "text.png"
    text.write_text("this is not a picture")
    where = "Image 2 of 3 (messages[0]['content'][1]"
    refused(user(good, image(broken), good), where, "broken", "cannot be read")
    refused(user(good, image(str(text)), good), where, "text.png", "cannot identify image file")
    refused(user(good, image("missing.png"), good), where, "missing.png", "no such file")
    refused(user(good, image(tmp_path), good), where, "no such file")
    refused(user(good, {"type": "image", "url": "missing.png"}, good), where, "neither a URL")
    refused(user(good, image(17), good), where, "int is not an image")
    refused(user(good, image("!" * 5000), good), where, "...")
    refused(user(good, image(picture(2000, 5)), good), where, "aspect ratio")


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((56, 56, 2), np.uint8), "(56, 56, 2)"),
        (np.zeros((2, 56, 56, 3), np.uint8), "(2, 56, 56, 3)"),
        (np.zeros((0, 56, 3), np.uint8), "(0, 56, 3)"),
        (np.zeros((56, 56, 3), bool), "bool"),
        (np.full((56, 56, 3), np.nan), "between 0 and 255"),
        (np.full((56, 56, 3), -1), "between 0 and 255"),
        (np.full((56, 56, 3), 256), "between 0 and 255"),
        (np.full((56, 56, 3), 0.5), "multiply by 255"),
    ],
)
def test_arrays_that_are_not_images_are_refused(array, word):
    refused(user(image(array)), "Image 1 of 1", word)


def test_long_sources_are_shortened_in_messages():
    with pytest.raises(MessageError) as caught:
        prepare(user(image("A" * 100_000)))
    assert len(str(caught.value)) < 1000
