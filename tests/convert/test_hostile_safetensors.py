"""Safetensors files that the safetensors library rejects, or that readers read differently.

They are refused in one line, whatever their headers hold.
"""

import contextlib
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from bsjax.errors import CheckpointError
from convert.__main__ import main
from convert.safetensors_file import TensorReader, read_header
from tests.support.fuzzing import FUZZ, check_message, damaged

DATA = bytes(range(64))


def tensor(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def written(file, header, data=DATA):
    """Writes a safetensors file with a header given as an object or as text."""
    text = header if isinstance(header, str) else json.dumps(header)
    content = text.encode("utf-8", "surrogatepass")
    file.write_bytes(len(content).to_bytes(8, "little") + content + data)
    return file


ONE = tensor([16], [0, 64])
TWICE = f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(tensor([4, 4], [0, 64]))}}}'

REFUSED = {
    "two tensors of the same bytes": ({"a": ONE, "b": ONE}, "invalid offset"),
    "tensors that overlap": ({"a": tensor([12], [0, 48]), "b": tensor([8], [32, 64])}, "invalid"),
    "bytes between tensors": ({"a": tensor([4], [0, 16]), "b": tensor([4], [48, 64])}, "invalid"),
    "bytes after the last": ({"a": tensor([8], [0, 32])}, "not fully covered"),
    "bytes beyond the end": ({"a": tensor([32], [0, 128])}, "not fully covered"),
    "fractions": ({"a": tensor([8.7, 2], [0, 64])}, "floating point"),
    "texts": ({"a": tensor(["16"], [0, 64])}, "string"),
    "truth values": ({"a": tensor([True, 16], [0, 64])}, "boolean"),
    "below zero": ({"a": tensor([-4, -4], [0, 64])}, "integer `-4`"),
    "infinite": ('{"a": {"dtype": "F32", "shape": [Infinity, 1], "data_offsets": [0, 64]}}', ""),
    "not a number": ('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 64]}}', ""),
    "too many bytes for the shape": ({"a": tensor([4, 3], [0, 64])}, "invalid shape"),
    "more elements than there are numbers": ({"a": tensor([2**62] * 3, [0, 64])}, "overflow"),
    "an unknown dtype": ({"a": tensor([16], [0, 64], "F33")}, "F33"),
    "one name twice": (TWICE, "`a` appears twice"),
    "no entry": ({"a": 1}, "invalid type"),
    "no object": ("[]", "invalid type"),
    "no JSON": ("not a header at all", "invalid JSON"),
    "nested": ("[" * 100_000, "invalid"),
    "a lone surrogate": ('{"\\ud800": ' + json.dumps(ONE) + "}", "invalid JSON"),
    "metadata that is not text": ({"__metadata__": {"a": 1}, "b": ONE}, "expected a string"),
}


@pytest.mark.parametrize("header, words", REFUSED.values(), ids=REFUSED)
def test_headers_are_refused_in_one_line(tmp_path, header, words):
    file = written(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    check_message(caught.value)
    assert words in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, (10**6).to_bytes(8, "little")])
def test_files_without_a_header_are_refused(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated, damaged or another file"):
        read_header(file)


def test_headers_of_many_megabytes_are_refused_unread(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((2**25).to_bytes(8, "little"))
    with file.open("r+b") as stream:
        stream.truncate(2**26)  # Takes no space on the disk.
    with pytest.raises(CheckpointError, match="a header of 33,554,432 bytes"):
        read_header(file)


@pytest.mark.parametrize("axes", [70, 100_000])
def test_tensors_of_more_axes_than_arrays_have(tiny_source, tmp_path, capsys, axes):
    source = shutil.copytree(tiny_source, tmp_path / "hf")
    content = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = "model.norm.weight"
    header[name]["shape"] = [1] * axes + header[name]["shape"]
    written(source / "model.safetensors", header, content[8 + length :])
    assert main([str(source), str(tmp_path / "ours"), "--quiet"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and name in message and "wrong shape" in message


VALID = {
    "__metadata__": {"format": "pt"},
    "a.weight": tensor([4, 2], [0, 32]),
    "b.weight": tensor([2, 4], [32, 48], "BF16"),
    "c": tensor([], [48, 52]),
    "empty": tensor([0, 7], [52, 52]),
    "d": tensor([2, 3], [52, 64], "F16"),
}


@FUZZ
@given(header=damaged(VALID), data=st.sampled_from([DATA, DATA, DATA, b"", DATA + b"\0"]))
def test_fuzzed_headers_are_read_as_the_library_reads_them_or_refused(
    header, data, tmp_path_factory
):
    file = written(tmp_path_factory.getbasetemp() / "fuzzed.safetensors", header, data)
    try:
        entries = read_header(file)
    except CheckpointError as error:
        check_message(error)
        # What the library accepts is refused only for what readers treat differently.
        with contextlib.suppress(SafetensorError), safe_open(file, framework="numpy"):
            assert any(words in str(error) for words in ("twice", "nested deeper", "no array can"))
        return
    with safe_open(file, framework="numpy") as library, TensorReader() as reader:
        assert entries.keys() == set(library.keys())
        for name, entry in entries.items():
            stored = library.get_slice(name)
            assert (entry.dtype, list(entry.shape)) == (stored.get_dtype(), stored.get_shape())
            if entry.dtype in ("F32", "F16"):
                read = reader.read(entry)
                assert read.tobytes() == library.get_tensor(name).tobytes()
