"""Prompts that continue or score the last message have the tokens that transformers gives them."""

import copy

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Gemma3ImageProcessorPil, Gemma3Processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bsjax.errors import MessageError
from bsjax.models import FAMILIES
from bsjax.prompts.prompt import Processor
from tests.prompts.test_gemma3_prompts import CHAT_TEMPLATE
from tests.support.paths import ROOT
from tests.support.refusals import refused
from tests.support.small_models import Shape, small_config

# As the published template does: the assistant is called the model.
GEMMA_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['role'] }}",
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}",
)
CHECKPOINT = ROOT / "examples" / "tiny-qwen2.5-vl"
NAMES = {
    "bos_token": "<bos>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


def qwen(family: str, template: str | None = None) -> Processor:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    # As in the published tokenizers, newlines that follow one another are one token.
    tokenizer.add_tokens(["\n\n"])
    tokenizer.chat_template = template or tokenizer.chat_template
    config = AutoConfig.from_pretrained(CHECKPOINT)
    images = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)
    return Processor(config, FAMILIES[family], tokenizer, images)


def gemma(family: str) -> Processor:
    tokenizer = AutoTokenizer.from_pretrained(
        CHECKPOINT, extra_special_tokens=NAMES, chat_template=GEMMA_TEMPLATE
    )
    tokenizer.add_tokens(["\n\n"])
    config = small_config(Shape(family))
    if family == "gemma3_text":
        return Processor(config, FAMILIES[family], tokenizer, None)
    config.boi_token_index, config.image_token_index, config.eoi_token_index = (
        tokenizer.convert_tokens_to_ids(NAMES[name])
        for name in ("boi_token", "image_token", "eoi_token")
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return Processor(config, FAMILIES[family], tokenizer, images)


PROCESSORS = {
    "qwen2_vl": qwen("qwen2_vl"),
    "qwen2_5_vl": qwen("qwen2_5_vl"),
    "gemma3": gemma("gemma3"),
    "gemma3_text": gemma("gemma3_text"),
}
FAMILY = pytest.mark.parametrize("family", list(PROCESSORS))
PICTURE = Image.fromarray(np.arange(56 * 84 * 3, dtype=np.uint8).reshape(56, 84, 3))


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*words: str, images: int = 0) -> dict:
    content = [{"type": "image", "image": PICTURE}] * images + [text(each) for each in words]
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def expected_ids(processor: Processor, messages, **options) -> list[int]:
    """What transformers makes of messages, with one token per image."""
    if processor.family.name == "gemma3":
        theirs = Gemma3Processor(
            processor.image_processor,
            processor.tokenizer,
            chat_template=GEMMA_TEMPLATE,
            image_seq_length=1,
        )
        made = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        (ids,) = made["input_ids"]
        return ids
    return processor.tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, **options
    )


def with_single_images(processor: Processor, token_ids) -> list[int]:
    """Token ids with one token for each image."""
    is_image = token_ids == processor.family.image_token_id(processor.config)
    again = is_image & np.append(False, is_image[:-1])
    return token_ids[~again].tolist()


CONTENTS = [
    "The first",
    "The first ",
    "The first  \n",
    " The first\n\n",
    "\nThe first\t",
    "CONTINUE_FINAL_MESSAGE_TAG ",
    [text("The first")],
    [text("The first "), text("one \n")],
    [text("The first"), text(" ")],
]


@FAMILY
@pytest.mark.parametrize("content", CONTENTS, ids=repr)
@pytest.mark.parametrize("images", [0, 2])
def test_continued_messages_are_those_of_transformers(family, content, images):
    processor = PROCESSORS[family]
    images = 0 if processor.image_processor is None else images
    messages = [
        {"role": "system", "content": "Be brief."},
        user("Which is ", "brighter?\n", images=images),
        assistant("This one. "),
        user("Sure?"),
        assistant(content),
    ]
    before = copy.deepcopy(messages)
    prompt = processor.prompt(messages, continue_final_message=True)
    expected = expected_ids(processor, messages, continue_final_message=True)
    assert with_single_images(processor, prompt.token_ids) == expected
    assert len(prompt.image_tokens) == images
    assert [each["content"] for each in messages[-3:]] == [each["content"] for each in before[-3:]]
    ended = expected_ids(processor, messages)
    assert expected != ended, "the end of the turn is left out"


@FAMILY
@pytest.mark.parametrize("images", [0, 1])
def test_scored_tokens_are_those_that_evaluation_harnesses_take(family, images):
    processor = PROCESSORS[family]
    images = 0 if processor.image_processor is None else images
    messages = [user("Which is brighter?", images=images), assistant(" The first, I think. ")]
    prompt, first = processor.answered_prompt(messages, processor.options(None, None, None))
    context = expected_ids(processor, messages[:-1], add_generation_prompt=True)
    whole = expected_ids(processor, messages, continue_final_message=True)
    assert whole[: len(context)] == context
    assert with_single_images(processor, prompt.token_ids[:first]) == context
    assert prompt.token_ids[first:].tolist() == whole[len(context) :]
    trims = family.startswith("gemma")
    answer = processor.tokenizer.decode(prompt.token_ids[first:])
    assert answer == ("The first, I think." if trims else " The first, I think. ")


def test_a_token_that_prompt_and_answer_share_is_scored():
    processor = PROCESSORS["qwen2_5_vl"]
    messages = [user("Which?"), assistant("\nThis one.")]
    prompt, first = processor.answered_prompt(messages, processor.options(None, None, None))
    context = expected_ids(processor, messages[:-1], add_generation_prompt=True)
    assert prompt.token_ids[:first].tolist() == context[:-1]
    assert processor.tokenizer.decode(context[-1:]) == "\n"
    assert processor.tokenizer.decode(prompt.token_ids[first:]) == "\n\nThis one."


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([user("Why?")], "messages[0], the last message, has the role 'user'"),
        ([user("Why?"), {"role": "model", "content": "a"}], "messages[1], the last message, has"),
        ([user("Why?"), assistant(" \n")], "messages[1] is to be continued or scored, but holds"),
        ([user("Why?"), assistant([])], "messages[1] is to be continued or scored, but holds"),
        (
            [user("Why?"), assistant([text("a"), {"type": "image", "image": PICTURE}])],
            "messages[1] ends with an image",
        ),
    ],
)
def test_messages_that_cannot_be_continued_or_scored(messages, words):
    processor = PROCESSORS["qwen2_5_vl"]
    options = processor.options(None, None, None)
    refused(lambda: processor.prompt(messages, continue_final_message=True), MessageError, words)
    refused(lambda: processor.answered_prompt(messages, options), MessageError, words)


def test_answers_with_images_are_not_scored():
    processor = PROCESSORS["qwen2_5_vl"]
    answer = assistant([{"type": "image", "image": PICTURE}, text("a")])
    options = processor.options(None, None, None)
    words = "messages[1] has an image, but only the text of an answer can be scored"
    messages = [user("Why?"), answer]
    refused(lambda: processor.answered_prompt(messages, options), MessageError, words)
    refused(lambda: processor.check(messages, options, answered=True), MessageError, words)
    assert processor.prompt(messages, continue_final_message=True).images


def test_answers_to_nothing_are_not_scored():
    processor = PROCESSORS["qwen2_5_vl"]
    options = processor.options(None, None, None)
    words = "messages[0] is an answer to nothing"
    refused(lambda: processor.answered_prompt([assistant("a")], options), MessageError, words)


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}",
        "{% for message in messages %}{{ message['role'] }}{% endfor %}",
        "{{ messages[-1]['content'][:3] }}",
    ],
)
def test_templates_that_change_the_last_message_are_refused(template):
    processor = qwen("qwen2_5_vl", template)
    messages = [{"role": "user", "content": "Why?"}, assistant("Because it is.")]
    with pytest.raises(ValueError, match="continue_final_message"):
        expected_ids(processor, messages, continue_final_message=True)
    refused(
        lambda: processor.prompt(messages, continue_final_message=True),
        MessageError,
        "does not write the text of the last message as it is",
    )


def test_templates_that_let_answers_begin_in_another_way_are_not_scored():
    processor = qwen(
        "qwen2_5_vl",
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>{% endif %}",
    )
    messages = [{"role": "user", "content": "Why?"}, assistant("Because it is.")]
    assert processor.prompt(messages, continue_final_message=True).token_ids.size
    options = processor.options(None, None, None)
    words = "writes an answer of the assistant differently"
    refused(lambda: processor.answered_prompt(messages, options), MessageError, words)


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize("value", [None, 1, "no"])
def test_only_truth_values_say_whether_to_continue(value):
    words = "continue_final_message must be True or False"
    refused(
        lambda: PROCESSORS["qwen2_vl"].prompt([user("a")], continue_final_message=value),
        MessageError,
        words,
    )


def test_max_pixels_of_a_call_are_the_default_of_its_images():
    processor = PROCESSORS["qwen2_5_vl"]
    large = Image.new("RGB", (640, 480))

    def images(*options):
        parts = [{"type": "image", "image": large, **each} for each in options]
        return [{"role": "user", "content": parts}]

    per_call = processor.prompt(
        images({}, {"max_pixels": 28 * 28}, {"max_pixels": None}, {"min_pixels": 28 * 28 * 19}),
        max_pixels=28 * 28 * 20,
    )
    twenty = {"max_pixels": 28 * 28 * 20}
    per_image = processor.prompt(
        images(twenty, {"max_pixels": 28 * 28}, twenty, {**twenty, "min_pixels": 28 * 28 * 19})
    )
    assert per_call.image_tokens == per_image.image_tokens
    assert per_call.image_tokens[1] == 1 < per_call.image_tokens[0] <= 20
    np.testing.assert_array_equal(per_call.pixels.values, per_image.pixels.values)
    assert processor.prompt(images({})).image_tokens == (17 * 23,)


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize(
    ("family", "value", "words"),
    [
        ("gemma3", 1000, "Images of gemma3 models have no max_pixels. Their options are do_pan"),
        ("gemma3_text", 1000, "this model reads text only"),
        ("qwen2_vl", 0, "max_pixels must be at least 1, got 0"),
        ("qwen2_vl", "large", "max_pixels must be a whole number"),
        ("qwen2_vl", True, "max_pixels must be a whole number"),
    ],
)
def test_max_pixels_that_are_refused(family, value, words):
    processor = PROCESSORS[family]
    refused(lambda: processor.prompt([user("a")], max_pixels=value), MessageError, words)
