"""If anything is wrong with a checkpoint, the error says what and where, and nothing is written."""

import json
import re
import shutil
import types

import numpy as np
import pytest

import convert.source
import convert.verify
import convert.writing
from bsjax.checkpoint.loading import load
from bsjax.errors import BsjaxError, CheckpointError
from convert.__main__ import main
from convert.conversion import convert_checkpoint
from tests.support import convert_sources as sources
from tests.support.parity import torch

pytestmark = pytest.mark.parity

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return sources.write_source(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture
def source(original, tmp_path):
    """A copy to damage, in three shards."""
    copy = shutil.copytree(original, tmp_path / "hf")
    return sources.change_weights(copy, lambda tensors: None, shards=3)


@pytest.fixture
def refused(source, tmp_path):
    """Converts `source`, checks that nothing is written, and returns the error message."""

    def convert(*, origin=source, **options):
        with pytest.raises(CheckpointError) as caught:
            convert_checkpoint(origin, tmp_path / "ours", **options)
        assert not list(tmp_path.glob("ours*"))
        return str(caught.value)

    return convert


def test_a_missing_shard_is_named_in_the_error(source, refused):
    (source / SHARD).unlink()
    message = refused()
    assert SHARD in message and "lacks 1 of its 3 shards" in message


@pytest.mark.parametrize("kept", [0.7, 0.001], ids=["in the tensors", "in the header"])
def test_a_truncated_shard_is_named_in_the_error(source, refused, kept):
    content = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(content[: int(len(content) * kept)])
    message = refused()
    assert SHARD in message and "truncated" in message


def test_a_shard_that_is_not_a_safetensors_file_is_named(source, refused):
    (source / SHARD).write_bytes(b"<!DOCTYPE html>" * 1000)
    assert SHARD in refused()
    (source / SHARD).write_bytes((20).to_bytes(8, "little") + b"not a header at all, but text")
    assert "not a valid safetensors file" in refused()


def test_a_header_that_contradicts_itself_is_refused(source, refused):
    content = (source / SHARD).read_bytes()
    changed = content.replace(b'"shape":[64', b'"shape":[65', 1)
    assert changed != content
    (source / SHARD).write_bytes(changed)
    message = refused()
    assert SHARD in message and "invalid shape" in message


def test_a_tensor_that_only_the_index_lists_is_named(source, refused):
    index = json.loads((source / sources.INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = SHARD
    (source / sources.INDEX).write_text(json.dumps(index))
    assert "model.extra.weight" in refused()


def test_an_index_that_points_outside_its_folder_is_refused(source, refused):
    index = json.loads((source / sources.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../../elsewhere.safetensors"
    (source / sources.INDEX).write_text(json.dumps(index))
    assert "'../../elsewhere.safetensors'" in refused()


def test_shards_without_their_index_are_refused(source, refused):
    (source / sources.INDEX).unlink()
    assert sources.INDEX in refused()


@pytest.mark.parametrize(
    "key, shape",
    [
        ("model.layers.1.mlp.up_proj.weight", [96, 64]),
        ("model.embed_tokens.weight", [256, 64]),
        ("visual.patch_embed.proj.weight", [32, 3, 2, 4, 4]),
    ],
)
def test_a_wrong_shape_is_named_with_the_expected_one(source, refused, key, shape):
    def change(tensors):
        assert list(tensors[key].shape) == shape
        tensors[key] = torch.cat([tensors[key]] * 2)

    sources.change_weights(source, change, shards=3)
    message = refused()
    shard = json.loads((source / sources.INDEX).read_text())["weight_map"][key]
    assert key in message and shard in message
    assert f"found {[2 * shape[0], *shape[1:]]}" in message
    if len(shape) == 2:
        assert f"expected {shape}" in message
    else:
        assert "expected [96, 32] after flatten_patch" in message


def test_missing_keys_are_named(source, refused):
    sources.change_weights(
        source, lambda tensors: [tensors.pop(f"model.layers.1.{name}") for name in
                                 ("mlp.up_proj.weight", "self_attn.q_proj.bias")]
    )  # fmt: skip
    message = refused()
    assert "lacks 2 tensors" in message
    assert "model.language_model.layers.1.mlp.up_proj.weight" in message
    assert "model.language_model.layers.1.self_attn.q_proj.bias" in message


def test_unknown_keys_are_named_up_to_twenty(source, refused):
    def change(tensors):
        tensors |= {f"model.layers.{n}.adapter.weight": torch.ones(2) for n in range(25)}

    sources.change_weights(source, change)
    message = refused()
    assert "has 25 tensors" in message and "and 5 more" in message
    assert len(re.findall(r"adapter\.weight", message)) == 20
    assert "model.layers.2.adapter.weight, model.layers.3.adapter.weight" in message


def test_missing_and_unknown_keys_are_both_reported(source, refused):
    sources.rename_keys(source, ("model.norm.", "model.norn."))
    message = refused()
    assert "model.language_model.norm.weight" in message and "model.norn.weight" in message


def test_a_tensor_under_two_names_is_refused(source, refused):
    def change(tensors):
        tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"].clone()

    sources.change_weights(source, change)
    message = refused()
    assert "model.norm.weight" in message and "model.language_model.norm.weight" in message


def test_a_key_in_two_shards_is_refused(source, refused):
    import safetensors.torch

    tensors = safetensors.torch.load_file(source / SHARD)
    tensors |= safetensors.torch.load_file(source / "model-00001-of-00003.safetensors")
    safetensors.torch.save_file(tensors, source / SHARD)
    assert "both model-00001-of-00003.safetensors and model-00002-of" in refused()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_weight_that_is_not_finite_is_named(source, refused, value, dtype):
    def change(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(getattr(torch, dtype))
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    sources.change_weights(source, change, shards=3)
    message = refused()
    assert "model.layers.1.mlp.down_proj.weight" in message and str(value) in message


def test_a_dtype_that_the_family_does_not_compute_in_is_refused(tmp_path):
    source = sources.write_source(tmp_path / "hf", "gemma3")
    with pytest.raises(CheckpointError, match="cannot run in float16.*float32 or bfloat16"):
        convert_checkpoint(source, tmp_path / "ours", dtype="float16")
    assert not (tmp_path / "ours").exists()


def test_weights_too_large_for_float16(source, refused):
    def change(tensors):
        tensors["model.norm.weight"][1] = 1e6

    sources.change_weights(source, change)
    message = refused(dtype="float16")
    assert "model.norm.weight" in message and "float16" in message and "bfloat16" in message


def test_quantised_weights_are_refused(source, refused):
    def change(tensors):
        key = "model.layers.0.mlp.up_proj.weight"
        tensors[key] = tensors[key].to(torch.int8)

    sources.change_weights(source, change)
    message = refused()
    assert "model.layers.0.mlp.up_proj.weight (I8)" in message and "uantised" in message


def test_a_config_of_an_unknown_family_is_refused(source, refused):
    sources.edit_json(source / "config.json", model_type="llama")
    message = refused()
    assert "'llama'" in message and "qwen2_5_vl, qwen2_vl" in message


def test_weights_of_a_sister_family_are_refused(source, refused):
    sources.edit_json(source / "config.json", model_type="qwen2_5_vl")
    assert "tensors that the model" in refused()


@pytest.mark.parametrize(
    "content, part",
    [(None, "holds no config.json"), ("{", "not JSON"), ("[]", "not hold a JSON object"),
     ("{}", "no model_type")],
)  # fmt: skip
def test_a_damaged_config_is_named_in_the_error(source, refused, content, part):
    if content is None:
        (source / "config.json").unlink()
    else:
        (source / "config.json").write_text(content)
    message = refused()
    assert "config.json" in message and part in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(source, refused, name):
    for file in [*source.glob("*.safetensors"), source / sources.INDEX]:
        file.unlink()
    (source / name).write_bytes(b"")
    message = refused()
    assert name in message and "runs whatever code" in message


def test_a_folder_without_weights_is_refused(source, refused):
    for file in [*source.glob("*.safetensors"), source / sources.INDEX]:
        file.unlink()
    assert "holds no weights" in refused()


def test_missing_tokenizer_and_image_settings_are_named(source, refused):
    (source / "tokenizer.json").unlink()
    (source / "preprocessor_config.json").unlink()
    message = refused()
    assert "tokenizer.json" in message and "preprocessor_config.json" in message


def test_a_source_that_is_already_converted_is_refused(source, tmp_path, refused):
    convert_checkpoint(source, tmp_path / "first")
    assert "converted checkpoint already" in refused(origin=tmp_path / "first")


def test_a_source_that_does_not_exist_is_refused(tmp_path, refused, source):
    assert "no folder" in refused(origin=tmp_path / "nowhere")
    assert "is a file" in refused(origin=source / "config.json")
    assert "for hub ids only" in refused(revision="main")


def hub_errors():
    from huggingface_hub import errors

    response = types.SimpleNamespace(headers={}, request=None, status_code=404)
    yield errors.LocalEntryNotFoundError("offline"), "cannot be reached"
    yield errors.RepositoryNotFoundError("no", response=response), "has no public checkpoint"
    yield errors.RevisionNotFoundError("no", response=response), "has no revision 'old'"
    yield errors.GatedRepoError("no", response=response), "accept the licence"
    yield OSError("connection reset"), "connection reset"


@pytest.mark.parametrize("error, part", list(hub_errors()), ids=lambda value: type(value).__name__)
def test_errors_of_the_hub_are_explained(refused, monkeypatch, error, part):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    message = refused(origin="someone/something", revision="old")
    assert part in message and "someone/something" in message


def test_a_hub_id_is_fetched_without_pickles(source, tmp_path, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    convert_checkpoint("someone/something", tmp_path / "ours", revision="v1")
    assert asked["name"] == "someone/something" and asked["revision"] == "v1"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", "*")) and "LICENSE" not in pattern
                   for pattern in asked["allow_patterns"])  # fmt: skip
    manifest = json.loads((tmp_path / "ours/bsjax.json").read_text())
    assert manifest["source"]["name"] == "someone/something"
    assert manifest["source"]["revision"] == source.name


def test_unknown_dtype(refused):
    assert "'int8'" in refused(dtype="int8")
    assert "'brainfloat'" in refused(dtype="brainfloat")


def test_a_destination_that_is_not_empty_is_left_alone(source, tmp_path):
    destination = tmp_path / "ours"
    destination.mkdir()
    (destination / "precious").write_text("data")
    with pytest.raises(CheckpointError, match="not empty"):
        convert_checkpoint(source, destination)
    assert (destination / "precious").read_text() == "data"
    with pytest.raises(CheckpointError, match="not a folder"):
        convert_checkpoint(source, destination / "precious")
    assert [file.name for file in destination.iterdir()] == ["precious"]


@pytest.mark.parametrize("path", [None, 3, b"x", "~nobody-of-this-name/x", "a\0b", "\ud800"])
def test_paths_that_are_not_valid(source, tmp_path, path):
    with pytest.raises(CheckpointError, match="not the path of a folder|cannot be written"):
        convert_checkpoint(source, path)
    with pytest.raises(CheckpointError, match="not the path of a folder|there is no folder"):
        convert_checkpoint(path, tmp_path / "ours")


def test_an_empty_destination_and_missing_parents_are_accepted(source, tmp_path):
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty")
    convert_checkpoint(source, tmp_path / "some/where/new")
    assert load(tmp_path / "empty").fingerprint == load(tmp_path / "some/where/new").fingerprint


def test_a_disk_that_is_too_small_is_refused(refused, monkeypatch):
    usage = types.SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr(convert.writing.shutil, "disk_usage", lambda folder: usage)
    message = refused()
    assert "GB" in message and "free" in message


def test_verification_without_torch_says_how_to_install_it(refused, monkeypatch):
    monkeypatch.setattr(convert.verify.importlib.util, "find_spec", lambda name: None)
    assert "pip install torch" in refused(check=True)


def test_command_line_prints_one_line_and_no_traceback(source, tmp_path, capsys):
    (source / SHARD).unlink()
    assert main([str(source), str(tmp_path / "ours")]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1


def test_command_line_refuses_unknown_dtypes(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), str(tmp_path / "ours"), "--dtype", "int8"])
    assert caught.value.code == 2
    assert "bfloat16" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m convert Qwen/" in capsys.readouterr().out


class TestLoading:
    """`load` explains what is wrong with folders that are not what `convert` wrote."""

    @pytest.fixture
    def converted(self, source, tmp_path):
        convert_checkpoint(source, tmp_path / "ours")
        return tmp_path / "ours"

    def message(self, path, **options):
        with pytest.raises(BsjaxError) as caught:
            load(path, **options)
        assert isinstance(caught.value, CheckpointError)
        return str(caught.value)

    def test_a_missing_folder_is_named(self, tmp_path):
        assert "no folder" in self.message(tmp_path / "nowhere")
        assert "python -m convert Qwen/Qwen2-VL-2B-Instruct" in self.message(
            "Qwen/Qwen2-VL-2B-Instruct"
        )

    def test_an_unconverted_folder_is_refused_with_the_command(self, source, tmp_path):
        assert f"python -m convert {source}" in self.message(source)
        assert "no bsjax.json" in self.message(tmp_path)

    def test_a_damaged_manifest_is_refused(self, converted):
        manifest = converted / "bsjax.json"
        sources.edit_json(manifest, fingerprint=None)
        assert "lacks fingerprint" in self.message(converted)
        manifest.write_text("{")
        assert "damaged" in self.message(converted)

    def test_a_newer_format_is_refused(self, converted):
        sources.edit_json(converted / "bsjax.json", format_version=2)
        assert "format version 2" in self.message(converted)

    def test_another_family_in_the_manifest_or_config_is_refused(self, converted):
        sources.edit_json(converted / "bsjax.json", family="qwen2_5_vl")
        assert "converted as qwen2_5_vl" in self.message(converted)
        sources.edit_json(converted / "config.json", model_type="llama")
        assert "'llama'" in self.message(converted)

    def test_a_config_of_another_size_is_refused(self, converted):
        text = json.loads((converted / "config.json").read_text())["text_config"]
        text |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
        sources.edit_json(converted / "config.json", text_config=text)
        assert "needs [3, 64]" in self.message(converted)

    def test_a_missing_parameter_is_named(self, converted):
        shutil.rmtree(converted / "parameters/language_model.norm.scale")
        assert "language_model.norm.scale" in self.message(converted)

    def test_a_parameter_with_a_missing_chunk_is_named(self, converted):
        folder = converted / "parameters/language_model.layers.mlp.up_proj.kernel"
        next(file for file in folder.rglob("*") if file.is_file() and file.suffix == "").unlink()
        assert "language_model.layers.mlp.up_proj.kernel" in self.message(converted)

    def test_a_parameter_with_a_flipped_bit_is_named(self, converted):
        folder = converted / "parameters/language_model.layers.mlp.up_proj.kernel"
        chunk = next(file for file in folder.rglob("*") if file.is_file() and file.suffix == "")
        content = np.frombuffer(chunk.read_bytes(), np.uint8).copy()
        content[len(content) // 2] ^= 1
        chunk.write_bytes(content.tobytes())
        message = self.message(converted)
        assert "language_model.layers.mlp.up_proj.kernel" in message and "damaged" in message

    def test_a_missing_parameters_folder_is_named(self, converted):
        (converted / "parameters/_METADATA").unlink()
        assert "parameters is damaged" in self.message(converted)
        shutil.rmtree(converted / "parameters")
        assert "parameters is missing" in self.message(converted)

    def test_a_damaged_tokenizer_is_named(self, converted):
        (converted / "tokenizer.json").write_text("{")
        assert "tokenizer" in self.message(converted)

    def test_weights_too_large_for_float16(self, source, tmp_path):
        sources.change_weights(source, lambda t: t["model.norm.weight"].fill_(1e6))
        convert_checkpoint(source, tmp_path / "ours")
        message = self.message(tmp_path / "ours", dtype="float16")
        assert "language_model.norm.scale" in message and "too large for float16" in message

    def test_unknown_dtype(self, converted):
        assert "'int8'" in self.message(converted, dtype="int8")


def test_a_tied_embedding_that_differs_is_refused(tmp_path):
    folder = sources.write_source(tmp_path / "tied", tied=True)
    embedding = "model.embed_tokens.weight"

    def copy(tensors):
        tensors["lm_head.weight"] = tensors[embedding].clone()

    sources.change_weights(folder, copy)
    assert load(convert_checkpoint(folder, tmp_path / "copy").destination).module.lm_head is None

    def change(tensors):
        tensors["lm_head.weight"][-1, -1] += 1

    sources.change_weights(folder, change)
    with pytest.raises(CheckpointError, match=f"lm_head.weight in .* differs from {embedding}"):
        convert_checkpoint(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("config.json", {"vision_config": {"num_heads": 3}}, "do not match"),
        ("config.json", {"image_token_id": 7}, "do not match"),
        ("config.json", {"model_type": ["qwen2_vl"]}, "qwen2_vl"),
        ("preprocessor_config.json", {"patch_size": 8}, "do not match"),
        ("preprocessor_config.json", {"merge_size": 1}, "do not match"),
        ("generation_config.json", {"eos_token_id": "x"}, "end-of-sequence token 'x'"),
    ],
)
def test_settings_that_do_not_match_each_other_are_refused(source, refused, file, change, words):
    settings = json.loads((source / file).read_text())
    for key, value in change.items():
        if isinstance(value, dict):
            settings[key] |= value
        else:
            settings[key] = value
    (source / file).write_text(json.dumps(settings))
    assert words in refused()


@pytest.mark.parametrize(
    "file",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "generation_config.json",
    ],
)
def test_damaged_files_other_than_weights_are_refused(source, refused, file):
    (source / file).write_text("{")
    assert str(source) in refused()
