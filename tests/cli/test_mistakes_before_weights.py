"""Every command finds what its arguments get wrong before it reads any weights."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bsjax
from bsjax.checkpoint import loading
from bsjax.cli import main
from convert.conversion import convert_checkpoint
from tests.support.convert_sources import edit_json, write_source

pytestmark = pytest.mark.usefixtures("no_weights")


@pytest.fixture
def no_weights(monkeypatch):
    """Makes reading weights fail the test."""

    def restore(*_):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(loading, "restore_parameters", restore)


_WHY = b'[{"role": "user", "content": "Why?"}]\n'
BATCHES = {
    "empty.jsonl": b"\n\n",
    "torn.jsonl": _WHY + b'[{"role": "us\n',
    "lines.jsonl": b"[\n" + _WHY + b"]\n",
    "text.jsonl": b"\xff\xfe",
    "no messages.jsonl": _WHY + b'\n{"id": 1}\n',
    "key.jsonl": _WHY + b'{"message": [], "id": 1}\n',
    "ids.jsonl": b'{"id": "a", "messages": []}\n' * 2,
    "id.jsonl": b'{"id": [1], "messages": []}\n',
    "role.jsonl": _WHY + b'[{"content": "Why?"}]\n',
    "part key.jsonl": b'[{"role": "user", "content": [{"type": "text", "text": "?", "b": 1}]}]\n',
    "missing.jsonl": _WHY + b'[{"role": "user", "content": [{"type": "image", "path": "no.png"}]}]',
    "no image.jsonl": b'{"messages": [{"role": "user", "content": ""}], "images": ["text.png"]}',
    "image.jsonl": b'{"messages": [{"role": "user", "content": "?"}], "images": ["photo.png"]}',
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with images, samples and a profile of another model."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "photos").mkdir()
    random = np.random.default_rng(0)
    for name in ("photo.png", "photos/0.png", "photos/1.png"):
        pixels = random.integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    whole = (folder / "photo.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not an image")
    parts = [{"type": "image", "image": name} for name in ("photo.png", "cut.png")]
    sample = [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]
    (folder / "cut.jsonl").write_text(json.dumps(sample))
    for name, lines in BATCHES.items():
        (folder / name).write_bytes(lines)
    other = bsjax.Profile.uniform("SINK", family="qwen2_vl", layers=2, heads=2)
    other.save(folder / "other.json")
    return folder


@pytest.fixture
def refusal(tiny_checkpoint, files, monkeypatch, capsys):
    """Runs a command in the folder of files, and returns the line that refuses it."""
    monkeypatch.chdir(files)
    monkeypatch.setattr("sys.stdin", io.StringIO("Never asked.\n"))
    present = sorted(files.iterdir())

    def run(command: str, *arguments: str, checkpoint: Path = tiny_checkpoint) -> str:
        capsys.readouterr()
        assert main([command, str(checkpoint), *arguments]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1
        assert output.err.startswith("error: ")
        assert sorted(files.iterdir()) == present
        return output.err

    return run


OF_A_PROFILE = [
    (["--profile", "other.json"], "This profile is for qwen2_vl"),
    (["--profile", "nothing.json"], "nothing.json cannot be read"),
    (["--profile", "unknown"], "no shipped profile named 'unknown'"),
]
OF_DEVICES = [
    (["--backend", "cudnn"], "Unknown attention backend 'cudnn'"),
    (["--dtype", "int8"], "--dtype 'int8'"),
]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.png"], "Image 1 of 1 (messages[0]['content'][0], 'missing.png'): there is no"),
        (["photo.png", "text.png"], "Image 2 of 2 (messages[0]['content'][1], 'text.png')"),
        (["cut.png"], "'cut.png') cannot be read"),
        (["photo.png", "--pan-and-scan"], "--pan-and-scan: Qwen's image processor has no such"),
        (["photo.png", "--max-pixels", "0"], "--max-pixels must be a positive number"),
        (["--temperature", "-1"], "--temperature must be"),
        (["--top-k", "0"], "--top-k must be"),
        (["--top-p", "1.5"], "--top-p must be"),
        (["--min-p", "2"], "--min-p must be"),
        (["--repetition-penalty", "0"], "--repetition-penalty must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--stop", ""], "--stop must be"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--max-new-tokens", "40000"], "Lower --max-new-tokens to"),
        *OF_A_PROFILE,
        *OF_DEVICES,
    ],
)
def test_generate(refusal, arguments, words):
    assert words in refusal("generate", "What is it?", *arguments)


@pytest.mark.parametrize(
    ("batch", "arguments", "words"),
    [
        ("nothing.jsonl", [], "nothing.jsonl cannot be read: . holds no nothing.jsonl"),
        ("photos", [], "photos is a folder"),
        ("empty.jsonl", [], "empty.jsonl has no conversations"),
        ("torn.jsonl", [], "torn.jsonl, line 2 is not JSON"),
        (
            "lines.jsonl",
            [],
            "line 1 is not JSON: Expecting value: line 2 column 1 (char 2). It looks",
        ),
        ("text.jsonl", [], "text.jsonl, line 1 is not text in UTF-8"),
        ("no messages.jsonl", [], 'line 3 has no list under "messages"'),
        ("key.jsonl", [], "line 2 has the unknown key 'message'; known are id, messages, images"),
        ("ids.jsonl", [], "line 2 has the id 'a', as has line 1"),
        ("id.jsonl", [], "line 1: an id must be a text"),
        ("role.jsonl", [], "line 2: messages[0] has no 'role'"),
        ("part key.jsonl", [], "line 1: messages[0]['content'][0] has the unknown key 'b'"),
        ("missing.jsonl", [], "no.png'): there is no such file"),
        ("no image.jsonl", [], "line 1: Image 1 of 1 (messages[0]['content'][0], "),
        ("image.jsonl", ["--output", "no folder/out"], "Make it first"),
        ("image.jsonl", ["--output", "photos"], "is a folder: name a file in it"),
        ("image.jsonl", ["--output", "image.jsonl"], "is not a file of answers"),
        ("image.jsonl", ["--max-pixels", "0"], "--max-pixels must be a positive number"),
        ("image.jsonl", ["--pan-and-scan"], "--pan-and-scan: Qwen's image processor has no such"),
        ("image.jsonl", ["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        ("image.jsonl", ["What is it?"], "--batch does not go with a QUESTION"),
        ("image.jsonl", ["What is it?", "photo.png"], "--batch does not go with a QUESTION"),
        ("image.jsonl", ["--image", "photo.png"], "--batch does not go with --image"),
        ("image.jsonl", ["--system", "Be brief."], "--batch does not go with --system"),
        ("image.jsonl", ["--stream"], "--batch does not go with --stream"),
        ("image.jsonl", ["--json"], "--batch does not go with --json"),
        *(("image.jsonl", *case) for case in (*OF_A_PROFILE, *OF_DEVICES)),
    ],
)
def test_generate_of_a_batch(refusal, batch, arguments, words):
    output = () if "--output" in arguments else ("--output", "out.jsonl")
    assert words in refusal("generate", "--batch", batch, *output, *arguments)


def test_batch_and_output_go_together(refusal):
    assert "--batch needs --output FILE" in refusal("generate", "--batch", "image.jsonl")
    assert "--output is for the answers" in refusal("generate", "?", "--output", "out.jsonl")


def test_a_folder_that_cannot_be_written_to(refusal, monkeypatch):
    # Whoever runs the tests may be allowed to write anywhere.
    monkeypatch.setattr(os, "access", lambda *_: False)
    said = refusal("generate", "--batch", "image.jsonl", "--output", "out.jsonl")
    assert "cannot be written to" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["yes", ""], "messages[1] is to be continued or scored, but holds no text"),
        (["--image", "missing.png"], "Image 1 of 1 (messages[0]['content'][0], 'missing.png')"),
        (["--image", "cut.png"], "'cut.png') cannot be read"),
        (["--image", "photo.png", "--max-pixels", "0"], "--max-pixels must be a positive number"),
        (["word " * 40000], "Shorten the text of the messages."),
        (["--system", "\ud800"], "half of a surrogate pair"),
        *OF_A_PROFILE,
        *OF_DEVICES,
    ],
)
def test_score(refusal, arguments, words):
    assert words in refusal("score", "Is it a cat?", "no", *arguments)


def test_settings_of_the_checkpoint(refusal, tiny_source, tmp_path):
    convert_checkpoint(tiny_source, tmp_path / "ours")
    for settings, words in (
        ({"temperature": -1.0, "do_sample": True}, "generation config: temperature must be"),
        ({"temperature": 1.0, "num_beams": 4}, "leave --use-generation-config out"),
        ({"num_beams": 1, "max_length": 9}, "give --max-new-tokens, which goes before it"),
    ):
        edit_json(tmp_path / "ours" / "generation_config.json", **settings)
        said = refusal("generate", "?", "--use-generation-config", checkpoint=tmp_path / "ours")
        assert words in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-tokens", "1"], "--max-tokens must be at least 2"),
        (["--max-tokens", "999999"], "--max-tokens is 999999, but the model has"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--max-tokens", "200"], "256 new tokens follow, but the session has room for 200"),
        (["--system", "\ud800"], "half of a surrogate pair"),
        (["--pan-and-scan"], "--pan-and-scan: Qwen's image processor has no such option"),
        (["--max-pixels", "-3"], "--max-pixels must be a positive number"),
        *OF_A_PROFILE,
        *OF_DEVICES,
    ],
)
def test_chat(refusal, arguments, words):
    assert words in refusal("chat", *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--max-tokens", "999999"], "--max-tokens is 999999, but the model has"),
        *OF_A_PROFILE,
        *OF_DEVICES,
    ],
)
def test_warmup(refusal, arguments, words):
    assert words in refusal("warmup", *arguments)


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        ("cut.jsonl", [], "cut.jsonl, line 1: Image 2 of 2"),
        ("photos", ["--pan-and-scan"], "--pan-and-scan: Qwen's image processor has no such"),
        ("photos", ["--resume", "photo.png"], "photo.png cannot be used"),
        ("photos", ["--resume", "no folder/state"], "give --resume another path"),
        ("photos", ["--output", os.devnull], "is not an ordinary file"),
        *(("photos", *case) for case in OF_DEVICES),
    ],
)
def test_profile(refusal, source, arguments, words):
    output = () if "--output" in arguments else ("--output", "out.json")
    assert words in refusal("profile", source, *output, *arguments)


@pytest.mark.parity
def test_images_for_a_model_that_reads_text_only(refusal, tmp_path):
    write_source(tmp_path / "hf", "gemma3_text")
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours")
    for command, arguments in (
        ("generate", ("?", "photo.png")),
        ("score", ("?", "no", "--image", "photo.png")),
        ("profile", ("photos", "--output", "out.json")),
    ):
        said = refusal(command, *arguments, checkpoint=tmp_path / "ours")
        assert "reads text only" in said
    assert "reads text only" in refusal("chat", "--max-pixels", "9", checkpoint=tmp_path / "ours")


def test_a_prompt_that_needs_more_positions_than_the_model_has(refusal, tiny_source, tmp_path):
    convert_checkpoint(tiny_source, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    edit_json(
        tmp_path / "ours" / "config.json",
        text_config=config["text_config"] | {"max_position_embeddings": 16},
    )
    said = refusal("generate", "word " * 30, checkpoint=tmp_path / "ours")
    assert "positions" in said and "Shorten the text" in said
    said = refusal("generate", "?", *["photo.png"] * 9, checkpoint=tmp_path / "ours")
    assert "lower --max-pixels or pass fewer images" in said
