"""Every code block of the README runs as it is printed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bsjax
import bsjax.cli
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language; shell blocks have none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def commands() -> list[list[str]]:
    """The words of each command in the shell blocks."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def working_directory(tiny_checkpoint, tmp_path, monkeypatch) -> Path:
    """A folder with the files that the README names."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "qwen2.5-vl-3b").symlink_to(tiny_checkpoint)
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for name in ("before.jpg", "after.jpg", "photos/1.jpg", "photos/2.jpg"):
        pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_python_blocks_run_one_after_the_other(working_directory, capsys):
    names: dict[str, object] = {}
    printed = blocks("python")
    assert len(printed) >= 4
    for number, block in enumerate(printed, start=1):
        exec(compile(block, f"README.md, Python block {number}", "exec"), names)
    assert bsjax.Profile.load("profile.json").evidence is not None
    assert (working_directory / "mask.png").stat().st_size > 1000
    assert names["out"].shape == (names["template"].tokens, 8, 128)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_exist_with_the_options_that_are_printed(command):
    match command:
        case ["make", target]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert target in known
        case ["pip", "install", extra]:
            project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert re.search(rf"^{extra[2:-1]} = ", project, re.MULTILINE)
        case ["python", "-m", "convert", *arguments]:
            help_text = subprocess.run(
                [sys.executable, "-m", "convert", "--help"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            assert all(word in help_text for word in arguments if word.startswith("--"))
        case ["bsjax", *arguments]:
            parsed = bsjax.cli.build_parser().parse_args(bsjax.cli.profile.with_run(arguments))
            assert callable(parsed.run)
        case _:
            pytest.fail(f"The README has a command that this test does not know: {command}")


def test_links_lead_to_files_of_the_repository():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing
