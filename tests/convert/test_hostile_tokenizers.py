"""A tokenizer that would take all memory or all time is refused; a failure is one line."""

import json
import os
import shutil

import pytest

from bsjax.checkpoint.loading import read_processor
from bsjax.checks import is_failure
from bsjax.errors import BsjaxError, CheckpointError, MessageError
from tests.support.fuzzing import check_message
from tests.support.paths import ROOT

FOLDER = ROOT / "examples" / "tiny-qwen2.5-vl"
MESSAGES = [{"role": "user", "content": "hello world " * 50}]
DOUBLE = {"type": "Replace", "pattern": {"String": "h"}, "content": "hh"}
ALL = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x"}
SLOW = {"type": "Split", "pattern": {"Regex": "((a|aa)+)+b"}, "behavior": "Isolated"}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
PLAIN = {"type": "NFC"}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "hf")


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def sequence(name, *steps):
    return {"type": "Sequence", name: list(steps)}


def template(*pieces):
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    ("part", "step", "words"),
    [
        ("normalizer", DOUBLE, "longer one"),
        ("normalizer", sequence("normalizers", PLAIN, sequence("normalizers", DOUBLE)), "longer"),
        ("normalizer", sequence("normalizers", *[PLAIN] * 5), "5 steps in its normalizer"),
        ("normalizer", ALL, "its pattern must be"),
        ("normalizer", DOUBLE | {"pattern": {"String": ""}}, "its pattern must be"),
        ("normalizer", DOUBLE | {"content": None}, "longer one"),
        ("normalizer", {"type": "Prepend", "prepend": "x" * 1000}, "at most 16 characters"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "does not run"),
        ("normalizer", {"type": ["NFC"]}, "does not run"),
        ("normalizer", 5, "does not run"),
        ("pre_tokenizer", SLOW, "its pattern must be"),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "does not run"),
        ("post_processor", template(*[TEXT] * 1000), "exactly once"),
        ("post_processor", template(), "exactly once"),
        ("decoder", sequence("decoders", ALL), "its pattern must be"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.4.0.0.json"])
def test_steps_that_are_not_bounded(folder, file, part, step, words):
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / file).write_text(json.dumps(content | {part: step}))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_processor(folder)
    check_message(caught.value)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("part", "step"),
    [
        # Those of Gemma 3.
        ("normalizer", {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}),
        ("pre_tokenizer", SPLIT | {"behavior": "MergedWithPrevious"}),
        ("post_processor", template({"SpecialToken": {"id": "<bos>", "type_id": 0}}, TEXT)),
        ("decoder", sequence("decoders", {"type": "ByteFallback"}, {"type": "Fuse"})),
        ("normalizer", None),
    ],
)
def test_steps_of_published_tokenizers(folder, part, step):
    tokens = {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}}
    if part == "post_processor":
        step = step | {"special_tokens": tokens}
    edit(folder / "tokenizer.json", **{part: step})
    assert read_processor(folder).prompt(MESSAGES).token_ids.size


@pytest.mark.parametrize("unknown", ["nope", ""])
def test_a_text_that_the_tokenizer_cannot_read(folder, unknown):
    model = {"type": "WordLevel", "unk_token": unknown, "vocab": {"a": 0}}
    edit(folder / "tokenizer.json", model=model)
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(MessageError, match="The tokenizer of .* cannot read") as caught:
        read_processor(folder).prompt(MESSAGES)
    check_message(caught.value)


def test_files_elsewhere_are_not_read(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    edit(folder / "tokenizer_config.json", gguf_file=str(tmp_path / "pipe"))
    with pytest.raises(CheckpointError, match="names a GGUF file"):
        read_processor(folder)


def test_a_text_of_no_tokens(folder, monkeypatch):
    processor = read_processor(folder)
    monkeypatch.setattr(processor.tokenizer, "chat_template", "{{ 'a' }}")
    monkeypatch.setattr(type(processor.tokenizer), "__call__", lambda *_, **__: {"input_ids": []})
    with pytest.raises(BsjaxError, match="makes no tokens"):
        processor.prompt(MESSAGES)


def test_what_libraries_in_rust_raise_is_a_failure():
    panic = type("PanicException", (BaseException,), {})
    assert is_failure(panic()) and is_failure(ValueError())
    assert not is_failure(KeyboardInterrupt())
