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
