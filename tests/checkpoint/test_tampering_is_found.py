"""Files that were changed after the conversion are found: some by `load`, all by the manifest."""

import hashlib
import json
import shutil

import numpy as np
import pytest

import bsjax
from bsjax.checkpoint.manifest import verify_manifest
from bsjax.checkpoint.restoring import CODECS
from bsjax.cli import main
from bsjax.errors import CheckpointError
from tests.support.fuzzing import check_message

UP = "parameters/language_model.layers.mlp.up_proj.kernel"
GATE = "parameters/language_model.layers.mlp.gate_proj.kernel"
METADATA = "parameters/_METADATA"
LARGE_CHUNKS = {"name": "regular", "configuration": {"chunk_shape": [2**31] * 3}}


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy to tamper with."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "ours")


def swap_parameters(folder):
    (folder / UP).rename(folder / "aside")
    (folder / GATE).rename(folder / UP)
    (folder / "aside").rename(folder / GATE)


def edit_dtype(folder):
    file = folder / UP / "zarr.json"
    text = file.read_text()
    assert text.count('"bfloat16"') == 1
    file.write_text(text.replace('"bfloat16"', '"float16"'))


def edit_byte_order(folder):
    file = folder / UP / "zarr.json"
    text = file.read_text()
    assert text.count('"little"') == 1
    file.write_text(text.replace('"little"', '"big"'))


def edit_array(folder, **fields):
    file = folder / UP / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def skip_a_parameter(folder):
    file = folder / METADATA
    text = file.read_text()
    file.write_text(text.replace('"skip_deserialize": false', '"skip_deserialize": true', 1))


def edit_end_of_sequence(folder):
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 5}))


def flip_a_bit(folder):
    chunk = max((folder / UP).rglob("*"), key=lambda file: file.stat().st_size)
    content = np.frombuffer(chunk.read_bytes(), np.uint8).copy()
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content.tobytes())


TAMPERING = [
    # What is done, whether `load` finds it, what the manifest says.
    (swap_parameters, False, ["changed 2", UP, GATE]),
    (edit_dtype, True, ["changed 1", f"{UP}/zarr.json"]),
    (edit_byte_order, True, ["changed 1", f"{UP}/zarr.json"]),
    (lambda folder: edit_array(folder, chunk_grid=LARGE_CHUNKS), True, ["changed 1", UP]),
    (lambda folder: edit_array(folder, codecs=[*CODECS[:1], {"name": "gzip"}]), True, ["changed"]),
    (lambda folder: edit_array(folder, codecs=CODECS[:1]), True, ["changed 1", UP]),
    (lambda folder: edit_array(folder, dimension_names=["a", "b", "c"]), True, ["changed 1", UP]),
    (lambda folder: (folder / UP / "zarr.json").write_text("[" * 100_000), True, ["changed 1", UP]),
    (lambda folder: (folder / METADATA).write_text("[" * 100_000), True, ["changed 1", METADATA]),
    (lambda folder: (folder / METADATA).write_text("{}"), True, ["changed 1", METADATA]),
    (lambda folder: (folder / METADATA).unlink(), True, ["missing 1", METADATA]),
    (skip_a_parameter, True, ["changed 1", METADATA]),
    (edit_end_of_sequence, False, ["changed 1: generation_config.json"]),
    (flip_a_bit, True, ["changed 1", UP]),
    (lambda folder: (folder / "bsjax.json").open("a").close(), False, None),
    (lambda folder: (folder / "extra.json").write_text("{}"), False, ["added 1: extra.json"]),
    (lambda folder: (folder / "extra").symlink_to("/"), False, ["added 1: extra"]),
    (lambda folder: (folder / "chat_template.jinja").unlink(), True,
     ["missing 1: chat_template.jinja"]),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), True, ["changed 1: tokenizer"]),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change, found, words", TAMPERING)
def test_what_load_finds_and_what_the_manifest_finds(folder, change, found, words):
    change(folder)
    if found:
        with pytest.raises(CheckpointError) as caught:
            bsjax.load(folder)
        check_message(caught.value)
    else:
        bsjax.load(folder)
    if words is None:  # The file is as it was.
        bsjax.load(folder, verify=True)
        return
    with pytest.raises(CheckpointError) as caught:
        bsjax.load(folder, verify=True)
    for part in words:
        assert part in str(caught.value)


def test_the_manifest_lists_every_file(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*")}
    files = {name: file for name, file in files.items() if file.is_file()}
    assert manifest["files"].keys() == files.keys() - {"manifest.json"}
    for name, entry in manifest["files"].items():
        content = files[name].read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_command_prints_the_fingerprint_and_compares_it(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    fingerprint = json.loads((folder / "manifest.json").read_text())["fingerprint"]
    assert f"fingerprint  {fingerprint}" in capsys.readouterr().out
    assert main(["verify", str(folder), "--fingerprint", fingerprint]) == 0
    capsys.readouterr()
    assert main(["verify", str(folder), "--fingerprint", "0" * 64]) == 2
    assert f"has the fingerprint {fingerprint}, not 000" in capsys.readouterr().err


def test_the_command_names_what_changed(folder, capsys):
    swap_parameters(folder)
    assert main(["verify", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and UP in error


MANIFESTS = {
    "an entry changed": lambda manifest: manifest["files"]["config.json"].update(bytes=1),
    "an entry removed": lambda manifest: manifest["files"].pop("config.json"),
    "an entry of another type": lambda manifest: manifest["files"].update({"config.json": 1}),
    "no entries": lambda manifest: manifest.pop("files"),
    "entries in a list": lambda manifest: manifest.update(files=list(manifest["files"])),
    "no fingerprint": lambda manifest: manifest.pop("fingerprint"),
    "another format": lambda manifest: manifest.update(format_version=2),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests_that_were_changed_are_refused(folder, change):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest"):
        verify_manifest(folder)


def test_names_outside_the_folder_are_not_opened(folder, tmp_path):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    (tmp_path / "secret").write_text("secret")
    manifest["files"]["../secret"] = {
        "bytes": 6,
        "sha256": hashlib.sha256(b"secret").hexdigest(),
    }
    canonical = json.dumps(manifest["files"], sort_keys=True, separators=(",", ":"))
    manifest["fingerprint"] = hashlib.sha256(canonical.encode()).hexdigest()
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="missing 1: ../secret"):
        verify_manifest(folder)


def test_checkpoints_without_a_manifest_load_but_are_not_verified(folder):
    (folder / "manifest.json").unlink()
    assert bsjax.load(folder).family.name == "qwen2_5_vl"
    with pytest.raises(CheckpointError, match="Convert it again"):
        bsjax.load(folder, verify=True)
