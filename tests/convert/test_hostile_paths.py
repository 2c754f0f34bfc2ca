"""Links out of a folder, pipes, devices and endless files are refused before they are opened."""

import contextlib
import functools
import os
import shutil
import time
from pathlib import Path

import pytest

import bsjax
from bsjax.cli import main
from bsjax.errors import BsjaxError, CheckpointError, ProfileError, SampleError
from convert.conversion import convert_checkpoint, prepare
from tests.support.fuzzing import check_message


def refused(action, error):
    started = time.monotonic()
    with pytest.raises(error) as caught:
        action()
    assert time.monotonic() - started < 5
    check_message(caught.value)
    return str(caught.value)


def replace(file, kind):
    """Puts something other than a file in its place."""
    with contextlib.suppress(FileNotFoundError):
        file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "large file":
        file.touch()
        os.truncate(file, 2**40)  # Takes no space on the disk.
    else:
        file.symlink_to(kind)


@pytest.fixture
def source(tiny_source, tmp_path):
    return shutil.copytree(tiny_source, tmp_path / "hf")


@pytest.fixture
def converted(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "ours")


@pytest.mark.parametrize("kind", ["pipe", "large file", "/dev/zero", "nowhere"])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors",
             "LICENSE", "merges.txt"]
)  # fmt: skip
def test_convert_refuses_what_is_not_an_ordinary_file(source, name, kind):
    replace(source / name, kind)
    assert name in refused(lambda: prepare(source), CheckpointError)


@pytest.mark.parametrize("name", ["LICENSE", "notes.json", "model.safetensors", "merges.txt"])
@pytest.mark.parametrize("inside", [True, False])
def test_links_are_followed_inside_the_folder_only(source, tmp_path, name, inside):
    target = (source if inside else tmp_path) / "secret"
    if (source / name).exists():
        shutil.move(source / name, target)
    else:
        target.write_text("{}")
    (source / name).symlink_to(target)
    if inside:
        assert any(file.name == name for file in prepare(source).copied) == (
            name != "model.safetensors"
        )
        return
    message = refused(lambda: prepare(source), CheckpointError)
    assert str(source / name) in message and str(target) in message


@pytest.mark.parametrize("link", ["additional_chat_templates", "LICENSES"])
def test_links_to_folders_elsewhere(source, tmp_path, link):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.jinja").write_text("secret")
    (source / link).symlink_to(tmp_path / "elsewhere")
    if link == "LICENSES":
        assert not any(file.name == link for file in prepare(source).copied)
    else:
        assert "secret.jinja" in refused(lambda: prepare(source), CheckpointError)


def in_cache(source, cache, blobs):
    """Lays a source out as the hub's cache does; returns the snapshot's folder."""
    repository = cache / "models--someone--something"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (repository / blobs).mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, repository / blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", blobs, str(number)))
    return snapshot


def test_the_hub_cache_is_made_of_links(tiny_source, tmp_path):
    snapshot = in_cache(tiny_source, tmp_path / "hub", "blobs")
    assert {file.name for file in prepare(snapshot).copied} >= {"config.json", "tokenizer.json"}


def test_a_snapshot_may_not_link_to_other_folders_of_the_cache(tiny_source, tmp_path):
    snapshot = in_cache(tiny_source, tmp_path / "hub", "secrets")
    assert "is a link to" in refused(lambda: prepare(snapshot), CheckpointError)
    snapshot = in_cache(tiny_source, tmp_path / "other", "blobs")
    (snapshot / "notes.json").symlink_to(snapshot.parents[1] / "refs")
    (snapshot.parents[1] / "refs").write_text("{}")
    assert "notes.json" in refused(lambda: prepare(snapshot), CheckpointError)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "nowhere", "folder"])
@pytest.mark.parametrize(
    "name", ["bsjax.json", "config.json", "tokenizer.json",
             "parameters/language_model.norm.scale/c/0"]
)  # fmt: skip
def test_load_refuses_what_is_not_an_ordinary_file(converted, name, kind):
    replace(converted / name, kind)
    refused(lambda: bsjax.load(converted), CheckpointError)
    refused(lambda: bsjax.load(converted, verify=True), CheckpointError)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "large file", "nowhere", "folder"])
def test_profiles_samples_and_states_are_ordinary_files(tiny_model, tmp_path, kind, capsys):
    path = tmp_path / "given.json"
    replace(path, kind)
    conversation = [{"role": "user", "content": "?"}]
    message = refused(lambda: bsjax.Profile.load(path), ProfileError)
    assert str(path) in message
    refused(lambda: bsjax.generate(tiny_model, conversation, profile=path), ProfileError)
    refused(lambda: bsjax.generate(tiny_model, conversation, profile=str(path)), ProfileError)
    if kind != "folder":
        refused(lambda: bsjax.read_samples(path), SampleError)
    samples = [conversation]
    refused(lambda: bsjax.profile(tiny_model, samples, resume=path), ProfileError)
    assert main(["profile", "show", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_destinations_that_are_not_text(tiny_source, tmp_path):
    action = functools.partial(convert_checkpoint, tiny_source, tmp_path / "a\udcff")
    assert "a\\udcff" in refused(action, CheckpointError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "nowhere"])
def test_images_of_samples_are_ordinary_files(tmp_path, kind):
    replace(tmp_path / "one.png", kind)
    (tmp_path / "samples.jsonl").write_text(
        '[{"role": "user", "content": [{"type": "image", "image": "one.png"}]}]'
    )
    assert "one.png" in refused(lambda: bsjax.read_samples(tmp_path / "samples.jsonl"), SampleError)
    refused(lambda: bsjax.read_samples(tmp_path, images_per_prompt=(1, 1)), SampleError)


@pytest.mark.parametrize(
    "path", ["a\0b", "x" * 5000, "/" + "x/" * 3000, "~nobody-at-all/x", "", "a\udcff"]
)
def test_names_that_no_file_can_have(tiny_model, path):
    conversation = [{"role": "user", "content": "?"}]
    refused(lambda: prepare(path), CheckpointError)
    refused(lambda: bsjax.load(path), CheckpointError)
    refused(lambda: bsjax.Profile.load(path), ProfileError)
    refused(lambda: bsjax.generate(tiny_model, conversation, profile=path), BsjaxError)
    refused(lambda: bsjax.read_samples(path), SampleError)
    if path:
        refused(lambda: bsjax.profile(tiny_model, [conversation], resume=path), ProfileError)
