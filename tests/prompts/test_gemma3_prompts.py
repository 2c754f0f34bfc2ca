"""A Gemma 3 prompt equals that of Gemma3Processor for the same messages, crops included."""

import copy

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, Gemma3ImageProcessorPil, Gemma3Processor

from bsjax.errors import MessageError
from bsjax.models import FAMILIES
from bsjax.models.gemma3.vision_plan import to_images
from bsjax.models.pixels import pixel_values_of
from bsjax.prompts.prompt import Processor, Prompt
from tests.support.paths import ROOT
from tests.support.small_models import Shape, small_config

SIDE = 32
# As the published template does: text is trimmed, and only the start of an image is written.
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}\
{% for item in message['content'] %}{% if item['type'] == 'image' %}<start_of_image>\
{% else %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


@pytest.fixture(scope="module")
def files():
    """Tokenizer, image processor, configuration, and the transformers processor made from them."""
    folder = ROOT / "examples" / "tiny-qwen2.5-vl"
    names = {
        "bos_token": "<bos>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = AutoTokenizer.from_pretrained(
        folder, extra_special_tokens=names, chat_template=CHAT_TEMPLATE
    )
    # Adjacent newlines become one token, so that it matters where the processor writes them.
    tokenizer.add_tokens(["\n\n\n", "\n\n"])
    image_processor = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    config = small_config(Shape("gemma3"))
    config.boi_token_index, config.image_token_index, config.eoi_token_index = (
        tokenizer.convert_tokens_to_ids(names[name])
        for name in ("boi_token", "image_token", "eoi_token")
    )
    processor = Gemma3Processor(
        image_processor, tokenizer, chat_template=CHAT_TEMPLATE, image_seq_length=16
    )
    return tokenizer, image_processor, config, processor


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def conversation(pictures, **options):
    content = [{"type": "text", "text": "Compare\n"}]
    for number, item in enumerate(pictures):
        content += [
            {"type": "image", "image": item, **options},
            {"type": "text", "text": f" and this one, {number}:\n\n"},
        ]
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]


def prepare(messages, config, tokenizer, image_processor) -> Prompt:
    family = FAMILIES[config.model_type]
    return Processor(config, family, tokenizer, image_processor).prompt(messages)


CROPS = {"do_pan_and_scan": True}
OTHER_CROPS = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 100,
    "pan_and_scan_max_num_crops": 2,
    "pan_and_scan_min_ratio_to_activate": 1.0,
}


# CROPS cuts one of the four images into two crops and one into three; OTHER_CROPS three into two.
@pytest.mark.parametrize(("options", "crops"), [({}, 0), (CROPS, 5), (OTHER_CROPS, 6)])
@pytest.mark.parametrize("sizes", [[], [(64, 64)], [(700, 300), (32, 40), (280, 900), (500, 500)]])
def test_prompts_equal_those_of_transformers(files, sizes, options, crops):
    tokenizer, image_processor, config, processor = files
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    prompt = prepare(conversation(pictures, **options), config, tokenizer, image_processor)
    expected = processor.apply_chat_template(
        conversation(pictures), add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="np", processor_kwargs=dict(options),
    )  # fmt: skip
    np.testing.assert_array_equal(prompt.token_ids, expected["input_ids"][0])
    images = len(prompt.image_tokens)
    assert prompt.image_tokens == (16,) * images
    assert images == len(sizes) + (crops if len(sizes) > 1 else 0)
    if not sizes:
        assert prompt.images == ()
        return
    np.testing.assert_array_equal(prompt.grid_thw, [[1, 8, 8]] * images)
    pixel_values = to_images(pixel_values_of(prompt.pixels), config)
    np.testing.assert_allclose(pixel_values, expected["pixel_values"], rtol=0, atol=1e-6)
    is_image = prompt.token_ids == config.image_token_index
    np.testing.assert_array_equal(expected["token_type_ids"][0] == 1, is_image)


def test_image_settings_take_precedence_as_in_transformers(files):
    tokenizer, _, config, _ = files
    image_processor = Gemma3ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_pan_and_scan=True, pan_and_scan_max_num_crops=2
    )
    messages = conversation([picture(300, 900)])
    theirs = Gemma3Processor(
        image_processor, tokenizer, chat_template=CHAT_TEMPLATE, image_seq_length=16
    )
    expected = theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    prompt = prepare(messages, config, tokenizer, image_processor)
    np.testing.assert_array_equal(prompt.token_ids, expected["input_ids"][0])
    assert len(prompt.image_tokens) == len(expected["pixel_values"])


@pytest.mark.parametrize(
    ("options", "text", "words"),
    [
        ({"max_pixels": 1000}, "?", "Image 1 of 1 .*max_pixels: Gemma 3 scales all images"),
        ({"do_pan_and_scan": "yes"}, "?", "Image 1 of 1 .*must be true or false, got 'yes'"),
        ({"pan_and_scan_max_num_crops": 2}, "?", "has no effect without do_pan_and_scan"),
        ({**CROPS, "pan_and_scan_max_num_crops": 0}, "?", "num_crops must be at least 1, got 0"),
        ({**CROPS, "pan_and_scan_min_crop_size": "a"}, "?", "crop_size must be a whole number"),
        ({**CROPS, "pan_and_scan_min_ratio_to_activate": 0.5}, "?", "at least 1; got 0.5"),
        ({}, "<image_soft_token>", "contains '<image_soft_token>'"),
        ({}, "<start_of_image>", "1 image, but the prompt has 2 image placeholders"),
    ],
)
def test_prompts_that_are_refused(files, options, text, words):
    tokenizer, image_processor, config, _ = files
    content = [
        {"type": "image", "image": picture(40, 40), **options},
        {"type": "text", "text": text},
    ]
    with pytest.raises(MessageError, match=words):
        prepare([{"role": "user", "content": content}], config, tokenizer, image_processor)


def test_image_settings_of_another_tower_are_refused(files):
    tokenizer, _, config, _ = files
    image_processor = Gemma3ImageProcessorPil(size={"height": 48, "width": 48})
    with pytest.raises(MessageError, match="48 x 48 pixels, but its vision tower needs 32 x 32"):
        prepare(conversation([picture(40, 40)]), config, tokenizer, image_processor)


def test_a_delimiter_missing_in_the_tokenizer_is_named(files):
    tokenizer, image_processor, config, _ = files
    config = copy.deepcopy(config)
    config.eoi_token_index = 10**6
    with pytest.raises(MessageError, match="no token 1000000, .* config's eoi_token_index"):
        prepare(conversation([picture(40, 40)]), config, tokenizer, image_processor)


def test_text_only_models_refuse_images(files):
    tokenizer, _, _, _ = files
    config = small_config(Shape("gemma3_text"))
    with pytest.raises(MessageError, match="1 image, but this model reads text only"):
        prepare(conversation([picture(40, 40)]), config, tokenizer, None)
    assert prepare(conversation([]), config, tokenizer, None).images == ()
