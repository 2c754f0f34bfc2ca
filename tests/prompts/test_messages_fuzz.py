"""Any messages become either a prompt or a one-line error."""

import base64
import copy
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bsjax.errors import BsjaxError, MessageError
from bsjax.models import FAMILIES
from bsjax.prompts.prompt import Processor
from tests.support.fuzzing import FUZZ, ODD_VALUES, check_message
from tests.support.paths import ROOT

FOLDER = ROOT / "examples" / "tiny-qwen2.5-vl"
PROCESSOR = Processor(
    AutoConfig.from_pretrained(FOLDER),
    FAMILIES["qwen2_5_vl"],
    AutoTokenizer.from_pretrained(FOLDER),
    Qwen2VLImageProcessorPil.from_pretrained(FOLDER),
)


def encoded() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 84), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


TEXT = encoded()
VALID = [
    {"role": "system", "content": "Be brief.", "name": "x"},
    {
        "role": "user",
        "content": [
            {"type": "image", "base64": TEXT, "max_pixels": 3136, "min_pixels": 784},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{TEXT}"}},
            {"type": "text", "text": "Compare."},
        ],
    },
    {"role": "assistant", "content": "Both red.", "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "user", "content": "Sure?"},
]


def cyclic() -> list:
    value: list = []
    value.append(value)
    return value


def shared(levels: int = 60) -> list:
    """`levels` lists inside each other that, written out, hold 2**levels values."""
    value: list = ["x"]
    for _ in range(levels):
        value = [value, value]
    return value


VALUES = ODD_VALUES | st.sampled_from(
    [
        *(TEXT, TEXT[:50], TEXT[:-9] + "=", "data:", "data:,", "DATA:x;base64,QQ==", "a\0.png"),
        *(
            "HTTP://127.0.0.1:9/",
            "http://",
            "https://[",
            "file://",
            "file:///dev/zero",
            "/dev/zero",
        ),
        *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "{{ 1 / 0 }}", "x" * 3_000_000),
        *(b"bytes", {1, 2}, object(), np.float32(1), np.zeros((3, 9, 3)), np.ones((60, 60), bool)),
        *(Image.new("RGB", (0, 0)), Image.new("F", (60, 60), 0.5), Image.new("LA", (60, 60))),
        *({"url": "data:,"}, {"url": None}, {1: 2}, {(1, 2): 3}, {"\ud800": 1}, cyclic()),
        # No more levels than hypothesis can write out.
        shared(18),
        *({"type": "image"}, {"type": "text", "text": "\udfff"}, {"type": "video"}, 10**5000),
    ]
)
KEYS = st.sampled_from(
    [
        "type",
        "text",
        "role",
        "content",
        "image",
        "url",
        "path",
        "base64",
        "max_pixels",
        "x",
        "\ud800",
    ]
    + ["do_pan_and_scan", "image_url", "tool_calls", "thinking", ""]
)


@st.composite
def messages(draw):
    result = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 4))):
        all_places = places_within(result)
        if not all_places:
            break
        *path, last = draw(st.sampled_from(all_places))
        parent = result
        for key in path:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "add", "repeat"])):
            case "replace":
                parent[last] = copy.deepcopy(draw(VALUES))
            case "remove":
                del parent[last]
            case "add" if isinstance(parent, dict):
                parent[draw(KEYS)] = copy.deepcopy(draw(VALUES))
            case "repeat" if isinstance(parent, list):
                parent += copy.copy(parent)
    return result


def places_within(value):
    """The paths of the first 200 values inside; a list that contains itself has no last one."""
    found = []
    left = [((), value)]
    while left and len(found) < 200:
        path, node = left.pop(0)
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, item in items:
            found.append((*path, key))
            if isinstance(item, dict | list):
                left.append(((*path, key), item))
    return found


@FUZZ
@given(messages())
def test_fuzz_messages(conversation):
    try:
        prompt = PROCESSOR.prompt(conversation)
    except BsjaxError as error:
        check_message(error)
        return
    assert prompt.token_ids.size > 0
    tokens = int(np.sum(prompt.token_ids == PROCESSOR.config.image_token_id))
    assert tokens == sum(prompt.image_tokens)
    merged = prompt.grid_thw.prod(axis=1) // 4
    assert tuple(merged.tolist()) == prompt.image_tokens


def test_the_fuzzer_starts_from_messages_that_are_valid():
    assert PROCESSOR.prompt(VALID).image_tokens == (2, 6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"content": "a \ud83d question"}, r"messages\[0\] holds '\\ud83d', half of a surrogate"),
        ({"role": "\udc00"}, "half of a surrogate"),
        ({"content": [{"type": "text", "text": "\ud800"}]}, "half of a surrogate"),
        ({"tool_calls": {"\ud800": 1}}, "half of a surrogate"),
        ({"content": cyclic()}, r"\['content'\]\[0\] is a list"),
        ({"content": [{"type": cyclic()}]}, "has the type"),
        ({"content": [{"type": np.zeros(3)}]}, "has the type"),
        ({"tool_calls": cyclic()}, "contains itself"),
        ({"tool_calls": shared()}, "too long"),
        ({"role": shared()}, "must be text"),
        ({"role": 10**5000}, "must be text"),
        ({"tool_calls": {(1, 2): 3}}, "cannot be given these messages"),
        ({"content": "x" * 3_000_000}, "too long: more than 1,000,000 characters"),
        ({"role": "x" * 3_000_000}, "too long: more than 1,000,000 characters"),
        ({"content": ["a"] * 100_001}, "100,000 values"),
        ({"content": [{"type": "image", "image": Image.new("L", (0, 5))}]}, "no pixels"),
    ],
)
def test_an_error_names_the_place_in_the_messages(change, reason):
    with pytest.raises(MessageError, match=reason) as caught:
        PROCESSOR.prompt([{"role": "user", "content": "a", **change}])
    check_message(caught.value)
