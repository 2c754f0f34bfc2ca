"""`tools.tune` times the kernel of either package, and writes that package's table."""

import json
import shutil

import pytest

from tests.support.parity import torch
from tests.support.triton_interpreter import interpreted, require_triton
from tools import tune
from tools.configuration_table import read_table, table_of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "JAX finds no GPU"),
        (["--kernel", "triton"], "NVIDIA GPU"),
        (["--interpret", "--write-table"], "needs times of a GPU"),
        (["--kernel", "xla"], "invalid choice"),
    ],
)
def test_what_cannot_be_tuned_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tune.parse(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_fastest_go_into_the_table_of_their_kernel(tmp_path, monkeypatch):
    def copy_of(kernel):
        return tmp_path / f"{kernel}.json"

    for kernel in ("pallas", "triton"):
        shutil.copy(table_of(kernel), copy_of(kernel))
    monkeypatch.setattr(tune, "table_of", copy_of)
    configuration = {"block_q": 32, "block_kv": 16, "num_warps": 4, "num_stages": 2}
    slower = configuration | {"block_q": 64}
    result = {
        "head_dim": 128,
        "dtype": "bfloat16",
        "kind": "dense",
        "entries": [
            {"configuration": slower, "median_seconds": 2.0},
            {"configuration": configuration, "median_seconds": 1.0},
            {"configuration": configuration, "problem": "it does not compile"},
        ],
    }
    assert tune.write_fastest("triton", [result]) == copy_of("triton")
    assert read_table(copy_of("pallas")) == read_table(table_of("pallas"))
    changed = [
        entry
        for entry in read_table(copy_of("triton"))
        if entry not in read_table(table_of("triton"))
    ]
    (entry,) = changed
    assert entry["basis"] == "measured" and entry["heads"] == "dense"
    assert {field: entry[field] for field in configuration} == configuration


@pytest.mark.slow
def test_configurations_of_triton_are_timed(tmp_path):
    require_triton()
    if torch is None:
        pytest.skip("Triton's interpreter needs torch")
    options = ["--kernel", "triton", "--head-dims", "16", "--dtypes", "float32", "--heads", "1"]
    options += ["1", "--tokens", "64", "--image-tokens", "20", "--rounds", "1", "--interpret"]
    options += ["--blocks-q", "16", "--blocks-kv", "16", "24", "--warps", "4", "--stages", "1"]
    options += ["--kinds", "sparse", "--output", str(tmp_path)]
    assert interpreted("tools.tune:main", options) == 0
    record = json.loads((tmp_path / "tune_triton.json").read_text())
    right, refused = record["results"][0]["entries"]
    assert record["kernel"] == "triton"
    assert right["problem"] is None and right["median_seconds"] > 0
    assert "power of two" in refused["problem"]
