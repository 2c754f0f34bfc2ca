"""A converted checkpoint holds the source's weights, whatever the source's layout and shards."""

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import convert.streaming
from bsjax.checkpoint.loading import load
from bsjax.models.parameters import TRANSFORMS, canonical_key
from convert.conversion import convert_checkpoint
from tests.support import convert_sources as sources
from tests.support.paths import ROOT

pytestmark = pytest.mark.parity

NESTED = (("visual.", "model.visual."), ("model.", "model.language_model."))
WRAPPED = (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
# transformers writes Gemma 3's tower without the hub's `vision_model.`.
GEMMA_HUB = (("vision_tower.", "vision_tower.vision_model."),)
GEMMA_NESTED = (
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
)


def expected_parameters(source, model):
    """The expected parameters, in float32, computed by torch from the source's tensors."""
    tensors = {canonical_key(key): value for key, value in sources.read_weights(source).items()}
    for rule in model.family.parameter_table(model.config):
        arrays = [
            TRANSFORMS[rule.transform](sources.as_numpy(tensors[key])) for key in rule.sources
        ]
        yield rule.target, arrays[0] if rule.layers is None else np.stack(arrays)


def assert_same_weights(source, model, dtype="float32"):
    state = dict(nnx.to_flat_state(nnx.state(model.module)))
    count = 0
    for target, expected in expected_parameters(source, model):
        actual = state[target].get_value()
        assert actual.dtype == jnp.dtype(dtype), target
        np.testing.assert_array_equal(
            np.asarray(actual, np.float32), expected.astype(jnp.dtype(dtype)).astype(np.float32)
        )
        count += 1
    assert count == len(state)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "gemma3", "gemma3_text"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_converted(tmp_path, family, tied):
    source = sources.write_source(tmp_path / "hf", family, tied=tied)
    result = convert_checkpoint(source, tmp_path / "ours")
    model = load(tmp_path / "ours")
    assert_same_weights(source, model)
    assert model.family.name == result.family == family
    assert model.fingerprint == result.fingerprint
    assert result.dtype == "bfloat16"
    assert result.parameters == sum(
        expected.size for _, expected in expected_parameters(source, model)
    )


@pytest.mark.slow
@pytest.mark.parametrize("prefixes", [(), NESTED, WRAPPED], ids=["hub", "nested", "wrapped"])
@pytest.mark.parametrize("shards", [1, 3])
def test_layout_and_shards_do_not_matter(tmp_path, prefixes, shards):
    source = sources.write_source(tmp_path / "hf")
    reference = convert_checkpoint(source, tmp_path / "reference")
    changed = sources.rename_keys(
        shutil.copytree(source, tmp_path / "changed"), *prefixes, shards=shards
    )
    result = convert_checkpoint(changed, tmp_path / "ours")
    assert result.fingerprint == reference.fingerprint
    assert_same_weights(source, load(tmp_path / "ours"))


@pytest.mark.slow
@pytest.mark.parametrize("prefixes", [GEMMA_HUB, GEMMA_NESTED], ids=["hub", "nested"])
def test_the_layout_of_gemma3_does_not_matter(tmp_path, prefixes):
    source = sources.write_source(tmp_path / "hf", "gemma3")
    reference = convert_checkpoint(source, tmp_path / "reference")
    changed = sources.rename_keys(shutil.copytree(source, tmp_path / "changed"), *prefixes)
    assert sources.read_weights(changed).keys() != sources.read_weights(source).keys()
    result = convert_checkpoint(changed, tmp_path / "ours")
    assert result.fingerprint == reference.fingerprint
    assert_same_weights(source, load(tmp_path / "ours"))


def test_shards_are_read_as_transformers_writes_them(tmp_path):
    source = sources.write_source(tmp_path / "hf", shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    convert_checkpoint(source, tmp_path / "ours")
    assert_same_weights(source, load(tmp_path / "ours"))
    assert not list((tmp_path / "ours").glob("*.index.json"))


@pytest.mark.slow
@pytest.mark.parametrize("source_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_is_converted_to_every_dtype(tmp_path, source_dtype, dtype):
    source = sources.write_source(tmp_path / "hf", dtype=source_dtype)
    result = convert_checkpoint(source, tmp_path / "ours", dtype=dtype)
    assert result.dtype == dtype
    assert_same_weights(source, load(tmp_path / "ours", dtype), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", jnp.bfloat16, np.float32])
def test_weights_are_cast_while_loading(tmp_path, dtype):
    source = sources.write_source(tmp_path / "hf", dtype="float32")
    convert_checkpoint(source, tmp_path / "ours")
    model = load(tmp_path / "ours", dtype)
    assert model.dtype == jnp.dtype(dtype)
    assert_same_weights(source, model, dtype)


def test_tied_checkpoint_may_repeat_its_embedding(tmp_path):
    source = sources.write_source(tmp_path / "hf", tied=True)

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    changed = sources.change_weights(shutil.copytree(source, tmp_path / "changed"), repeat)
    convert_checkpoint(changed, tmp_path / "ours")
    assert_same_weights(source, load(tmp_path / "ours"))


def test_large_parameters_are_cut_into_pieces(tmp_path, monkeypatch):
    source = sources.write_source(tmp_path / "hf", inner=104)
    whole = convert_checkpoint(source, tmp_path / "whole")
    # Smaller than every matrix, so that layers, rows and columns are written piece by piece; the
    # last block of rows is shorter than the others.
    monkeypatch.setattr(convert.streaming, "PIECE_BYTES", 3000)
    cut = convert_checkpoint(source, tmp_path / "cut")
    # Pieces of whole inner chunks.
    monkeypatch.setattr(convert.streaming, "LEAST_INNER_BYTES", 1000)
    inner = convert_checkpoint(source, tmp_path / "inner")
    assert inner.fingerprint == cut.fingerprint == whole.fingerprint
    assert_same_weights(source, load(tmp_path / "cut"))
    assert_same_weights(source, load(tmp_path / "inner"))
    embedding = tmp_path / "cut/parameters/language_model.embed_tokens.embedding"
    assert len([file for file in embedding.rglob("*") if file.is_file()]) > 10


def test_plain_orbax_reads_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(convert.streaming, "LEAST_INNER_BYTES", 1000)
    source = sources.write_source(tmp_path / "hf")
    convert_checkpoint(source, tmp_path / "ours")
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "ours/parameters")
    model = load(tmp_path / "ours", "bfloat16")
    count = 0
    for path, variable in nnx.to_flat_state(nnx.state(model.module)):
        node = tree
        for name in path:
            node = node[str(name)]
        assert node.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(node, np.asarray(variable.get_value()))
        count += 1
    flat = nnx.to_flat_state(nnx.state(model.module))
    assert count == len(flat)


def test_fingerprint_distinguishes_weights(tmp_path):
    source = sources.write_source(tmp_path / "hf")
    before = convert_checkpoint(source, tmp_path / "before")
    wide = convert_checkpoint(source, tmp_path / "wide", dtype="float32")

    def touch(tensors):
        tensors["model.norm.weight"][0] += 1

    sources.change_weights(source, touch)
    after = convert_checkpoint(source, tmp_path / "after")
    assert before.fingerprint == wide.fingerprint != after.fingerprint
    assert len(before.fingerprint) == 64


@pytest.mark.slow
def test_destination_is_self_contained(tmp_path):
    source = sources.write_source(tmp_path / "hf")
    convert_checkpoint(source, tmp_path / "ours")
    copied = {
        file.name
        for file in source.iterdir()
        if file.suffix != ".safetensors" and file.name != sources.INDEX
    }
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= copied
    for name in copied:
        assert (tmp_path / "ours" / name).read_bytes() == (source / name).read_bytes()
    manifest = json.loads((tmp_path / "ours/bsjax.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["family"] == "qwen2_vl"
    assert manifest["source"]["dtypes"] == ["BF16"]

    shutil.rmtree(source)
    model = load(tmp_path / "ours")
    assert model.tokenizer.encode("word7 <image>") == [7, sources.IMAGE]
    assert "<image>" in model.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}], tokenize=False
    )
    assert model.image_processor.patch_size == 4
    assert model.generation_config.eos_token_id == 255


def test_image_settings_of_newer_checkpoints_are_read(tmp_path):
    source = sources.write_source(tmp_path / "hf")
    settings = json.loads((source / "preprocessor_config.json").read_text())
    (source / "preprocessor_config.json").unlink()
    (source / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    convert_checkpoint(source, tmp_path / "ours")
    assert load(tmp_path / "ours").image_processor.patch_size == 4


@pytest.mark.slow
def test_the_command_line_does_not_need_torch(tmp_path):
    source = sources.write_source(tmp_path / "hf")
    # A module that is None in sys.modules cannot be imported.
    program = (
        "import runpy, sys; sys.modules |= dict.fromkeys(('torch', 'torchvision')); "
        "runpy.run_module('convert', run_name='__main__')"
    )
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(tmp_path / "ours")],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert f"written to   {tmp_path / 'ours'}" in done.stdout
    assert f"bsjax generate {tmp_path / 'ours'}" in done.stdout
    assert "converting" not in done.stderr
    assert_same_weights(source, load(tmp_path / "ours"))
