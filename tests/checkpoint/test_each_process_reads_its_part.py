"""Of a model that is divided among processes, each reads what its own devices need."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
import tensorstore
from flax import nnx
from jax.sharding import NamedSharding

import bsjax
import convert.streaming
from bsjax.checkpoint import restoring
from bsjax.checkpoint.folder import PARAMETERS
from bsjax.checkpoint.loading import placed_module
from bsjax.checkpoint.restoring import restore_parameters
from bsjax.errors import CheckpointError
from bsjax.models.collectives import TENSOR
from convert.conversion import convert_checkpoint

UP = f"{PARAMETERS}/language_model.layers.mlp.up_proj.kernel"
TENSORS = 4


@pytest.fixture(scope="module")
def folder(tiny_source, tmp_path_factory):
    """The checkpoint in inner chunks that are as small as a few channels or a head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert.streaming, "LEAST_INNER_BYTES", 512)
        folder = tmp_path_factory.mktemp("parts") / "ours"
        convert_checkpoint(tiny_source, folder)
    return folder


def bytes_read() -> int:
    """What tensorstore has read from files so far."""
    (metric,) = tensorstore.experimental_collect_matching_metrics(
        "/tensorstore/kvstore/file/bytes_read", True
    )
    return metric["values"][0]["value"]


def restored_by_process(process, folder, model, monkeypatch):
    """What one of two processes restores, and the bytes that it reads.

    This process has all devices, and is shown half of them. Of each parameter, it returns the part
    of the first device.
    """
    own = model.mesh.local_devices[process * TENSORS // 2 : (process + 1) * TENSORS // 2]
    _, placements = placed_module(model.architecture, model.mesh, model.head_order)

    def indices(sharding: NamedSharding, shape: tuple[int, ...]) -> dict:
        of_all = sharding.devices_indices_map(shape)
        return {device: of_all[device] for device in own}

    def first(
        shape: tuple[int, ...], sharding: NamedSharding, arrays: list[jax.Array]
    ) -> jax.Array:
        assert len(arrays) == len(own)
        return arrays[0]

    with monkeypatch.context() as patch:
        patch.setattr(NamedSharding, "addressable_devices_indices_map", indices)
        patch.setattr(restoring.jax, "make_array_from_single_device_arrays", first)
        before = bytes_read()
        arrays = restore_parameters(folder / PARAMETERS, placements, "bfloat16")
    return arrays, placements, bytes_read() - before


@pytest.mark.slow
@pytest.mark.parametrize("is_dealt", [False, True])
def test_a_process_of_two_reads_half_of_what_is_divided(
    folder, tiny_checkpoint, monkeypatch, is_dealt
):
    categories = np.random.default_rng(0).integers(0, 4, (4, 4)) if is_dealt else None
    # From a checkpoint whose chunks are whole parameters.
    whole = bsjax.load(tiny_checkpoint, mesh=bsjax.mesh(tensor=TENSORS), head_categories=categories)
    assert (whole.head_order is not None) == is_dealt
    parameters = nnx.to_flat_state(nnx.state(whole.module))
    for process in range(2):
        arrays, placements, count = restored_by_process(process, folder, whole, monkeypatch)
        needed = 0
        for path, variable in parameters:
            path = tuple(map(str, path))
            placement, leaf = placements[path], variable.get_value()
            stored = 2 * math.prod(placement.stored_shape)
            needed += stored // 2 if TENSOR in leaf.sharding.spec else stored
            part = leaf.addressable_shards[process * TENSORS // 2].data
            np.testing.assert_array_equal(np.asarray(arrays[path]), np.asarray(part))
        # Checksums, indices, and biases, which are too small to be cut, are a few percent.
        assert needed <= count < 1.05 * needed


def test_damage_is_found_in_what_is_read(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = max((copy / UP).rglob("*"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    for place in (0, len(content) // 2, len(content) - 8):  # The last one is in the index.
        damaged = bytearray(content)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="up_proj.kernel .* is missing or damaged"):
            bsjax.load(copy)
    file.unlink()
    with pytest.raises(CheckpointError, match="up_proj.kernel .* is missing or damaged"):
        bsjax.load(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda codec: codec["configuration"]["chunk_shape"].append(1),
        lambda codec: codec["configuration"].update(chunk_shape=[1, 256, 7]),
        lambda codec: codec["configuration"]["codecs"].pop(),
        lambda codec: codec["configuration"]["index_codecs"].pop(),
        lambda codec: codec["configuration"].update(index_location="start"),
    ],
)
def test_another_description_of_inner_chunks_is_refused(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / UP / "zarr.json"
    described = json.loads(file.read_text())
    (codec,) = described["codecs"]
    change(codec)
    file.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="not describe an array as the converter writes it"):
        bsjax.load(copy)
