"""Configurations that describe no model are refused at once, by `convert` and by `load`."""

import json
import shutil
import time

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import convert.conversion
import convert.trial
from bsjax.checkpoint.loading import load
from bsjax.errors import CheckpointError
from convert.__main__ import main
from convert.conversion import prepare
from tests.support.fuzzing import FUZZ, LONG, check_message, damaged

NAN = float("nan")

# The trial prompt takes most of an example's time, and the other files are read for it alone.
SETTINGS = ("config.json", *(("preprocessor_config.json", "generation_config.json") * LONG))

# File, path of the field, value, words of the message.
ABSURD = [
    ("config.json", "text_config.num_hidden_layers", 10**9, "num_hidden_layers 1000000000"),
    ("config.json", "text_config.num_hidden_layers", 10**400, "num_hidden_layers 1000"),
    ("config.json", "text_config.num_hidden_layers", 0, "from 1 to 1,024"),
    ("config.json", "text_config.num_hidden_layers", -4, "num_hidden_layers -4"),
    ("config.json", "num_hidden_layers", 10**9, "num_hidden_layers 1000000000"),
    ("config.json", "vision_config.depth", 10**9, "depth 1000000000"),
    ("config.json", "vision_config.depth", True, "depth True"),
    ("config.json", "text_config.hidden_size", 10**12, "hidden_size"),
    ("config.json", "text_config.vocab_size", 10**12, "vocab_size"),
    ("config.json", "text_config.num_attention_heads", 2**31, "num_attention_heads"),
    ("config.json", "vision_config.num_heads", 0, "num_heads 0"),
    ("config.json", "vision_config.patch_size", 10**9, "patch_size"),
    ("config.json", "vision_config.spatial_merge_size", 0, "spatial_merge_size 0"),
    ("config.json", "vision_config.temporal_patch_size", -1, "temporal_patch_size -1"),
    ("config.json", "vision_config.window_size", 0, "window_size 0"),
    ("config.json", "text_config.rms_norm_eps", NAN, "rms_norm_eps nan"),
    ("config.json", "text_config.rms_norm_eps", -1e-6, "rms_norm_eps -1e-06"),
    ("config.json", "text_config.rms_norm_eps", float("inf"), "rms_norm_eps inf"),
    ("config.json", "text_config.rope_parameters.rope_theta", NAN, "rope_theta nan"),
    ("config.json", "text_config.rope_parameters.rope_theta", -1e4, "rope_theta -10000.0"),
    ("config.json", "text_config.rope_parameters.rope_theta", 1e-300, "rope_theta 1e-300"),
    ("config.json", "text_config.rope_parameters.rope_theta", "x", "rope_theta 'x'"),
    ("config.json", "vision_config.rope_parameters.rope_theta", 0, "rope_theta 0"),
    ("config.json", "text_config.rope_parameters.mrope_section", [-8, 20, 20], "mrope_section"),
    ("config.json", "text_config.rope_parameters.mrope_section", [NAN, 12, 12], "mrope_section"),
    ("config.json", "text_config.rope_parameters.mrope_section", [31], "mrope_section [31]"),
    ("config.json", "text_config.layer_types", ["full_attention"] * 10**5, "100,000 entries"),
    ("preprocessor_config.json", "image_std", [0.5, 0, 0.5], "image_std 0"),
    ("preprocessor_config.json", "image_std", [0.5, NAN, 0.5], "image_std nan"),
    ("preprocessor_config.json", "image_mean", [0.5, NAN, 0.5], "image_mean"),
    ("preprocessor_config.json", "rescale_factor", 0, "rescale_factor 0"),
    ("preprocessor_config.json", "patch_size", 0, "patch_size 0"),
    ("preprocessor_config.json", "merge_size", 10**9, "merge_size"),
    ("preprocessor_config.json", "size.shortest_edge", 10**12, "shortest_edge"),
    ("preprocessor_config.json", "size.longest_edge", -1, "longest_edge -1"),
]  # fmt: skip
BOTH = pytest.mark.parametrize("file, field, value, words", ABSURD)


def change(folder, file, field, value):
    document = json.loads((folder / file).read_text())
    *path, last = field.split(".")
    parent = document
    for name in path:
        parent = parent[name]
    parent[last] = value
    (folder / file).write_text(json.dumps(document))


def refused(action, folder):
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        action(folder)
    assert time.process_time() - started < 5
    check_message(caught.value)
    return str(caught.value)


@pytest.fixture
def source(tiny_source, tmp_path):
    return shutil.copytree(tiny_source, tmp_path / "hf")


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, tmp_path_factory):
    return shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("absurd") / "ours")


@BOTH
def test_convert_refuses(source, file, field, value, words):
    change(source, file, field, value)
    message = refused(prepare, source)
    assert words in message


@BOTH
def test_load_refuses(converted, file, field, value, words):
    text = (converted / file).read_text()
    try:
        change(converted, file, field, value)
        assert words in refused(load, converted)
    finally:
        (converted / file).write_text(text)


@pytest.mark.parametrize("layers", [5, 1000])
@pytest.mark.parametrize("field", ["text_config.num_hidden_layers", "vision_config.depth"])
def test_layers_are_compared_with_the_tensors_names(source, field, layers):
    if "text" in field:
        change(source, "config.json", "text_config.layer_types", ["full_attention"] * layers)
    change(source, "config.json", field, layers)
    message = refused(prepare, source)
    assert f"describes {layers} layers" in message and "tensors are those of 4" in message


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "generation_config.json",
             "tokenizer_config.json", "tokenizer.json", "chat_template.json", "bsjax.json"]
)  # fmt: skip
@pytest.mark.parametrize("text", ['{"a": ' + "[" * 10**5, '{"a": ' * 300 + "1" + "}" * 300, ""])
def test_nested_and_empty_files_are_refused(converted, name, text):
    file = converted / name
    before = file.read_text() if file.exists() else None
    try:
        file.write_text(text)
        assert name.split(".")[0].split("_")[0] in refused(load, converted)
    finally:
        file.unlink()
        if before is not None:
            file.write_text(before)


DESCRIPTION = {
    "format_version": [[1], "1", None, 2.5, {}],
    "family": [1, None, ["qwen2_5_vl"], {}],
    "dtype": ["int8", 1, None, ["bfloat16"], {}],
    "fingerprint": [1, None, "", "0" * 63, "x" * 64, ["0" * 64]],
    "files": ["config.json", 1, None, [1], [None], ["lost"], ["x" * 5000], ["\0"], [["x"]]],
}


@pytest.mark.parametrize(
    "field, value", [(field, value) for field, values in DESCRIPTION.items() for value in values]
)
def test_descriptions_of_wrong_types_are_refused(converted, field, value):
    file = converted / "bsjax.json"
    text = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(text) | {field: value}))
        refused(load, converted)
    finally:
        file.write_text(text)


@pytest.fixture(scope="module")
def fuzzed(tiny_source, tmp_path_factory):
    return shutil.copytree(tiny_source, tmp_path_factory.mktemp("fuzzed") / "hf")


def planned(source):
    """Where each parameter comes from."""
    return {
        parameter.rule.target: (parameter.shape, [entry.key for entry in parameter.tensors])
        for parameter in prepare(source).plan
    }


@pytest.fixture(scope="module")
def right_plan(tiny_source):
    plan = planned(tiny_source)
    with pytest.MonkeyPatch.context() as patch:
        if LONG:
            # What a damaged file does not change would take nearly all of the time.
            for module, name, key in (
                (convert.conversion, "read_config", contents("config.json")),
                (convert.conversion, "abstract_module", described),
                (convert.trial, "read_processor", contents(*SETTINGS[:2])),
                (convert.trial, "feature_shape", traced),
            ):
                patch.setattr(module, name, not_twice(getattr(module, name), key))
        else:
            patch.setattr(convert.conversion, "try_prompt", lambda folder, module: None)
        yield plan


def not_twice(function, key):
    """`function`, but its last result if it is called again with arguments of the same key."""
    last = []

    def call(*arguments):
        if not last or last[0] != key(*arguments):
            last[:] = key(*arguments), function(*arguments)
        return last[1]

    return call


def contents(*names):
    return lambda folder: [(folder / name).read_bytes() for name in names]


def described(architecture):
    return architecture.config.to_json_string(use_diff=False), architecture.dtype


def traced(module, pixels, plan):
    leaves, structure = jax.tree.flatten(plan)
    return module, pixels.values.shape, structure, [jax.typeof(leaf) for leaf in leaves]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@FUZZ
@given(data=st.data())
def test_fuzzed_settings_give_the_plan_of_the_tensors_or_are_refused(
    data, name, tiny_source, fuzzed, right_plan
):
    shutil.copyfile(tiny_source / name, fuzzed / name)
    document = json.loads((tiny_source / name).read_text())
    (fuzzed / name).write_text(data.draw(damaged(document)))
    started = time.process_time()
    try:
        assert planned(fuzzed) == right_plan
    except CheckpointError as error:
        check_message(error)
    finally:
        shutil.copyfile(tiny_source / name, fuzzed / name)
    assert time.process_time() - started < 10


def test_weights_that_are_finite_but_compute_nan_are_refused(tiny_source, tmp_path, capsys):
    source = shutil.copytree(tiny_source, tmp_path / "hf")
    content = bytearray((source / "model.safetensors").read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start, end = header["model.norm.weight"]["data_offsets"]
    # 3e38 in bfloat16: the largest power of two that is finite.
    content[8 + length + start : 8 + length + end] = b"\x00\x7f" * ((end - start) // 2)
    (source / "model.safetensors").write_bytes(content)
    assert main([str(source), str(tmp_path / "ours"), "--quiet"]) == 2
    message = capsys.readouterr().err
    assert "computes NaN or infinity" in message and message.count("\n") == 1
    assert not list(tmp_path.glob("ours*"))
