"""Predictions beside measurements, the GPUs that have some, and the command line of the model."""

import json

import pytest

from benchmarks.workloads import SHAPES, Workload
from tools import speed_model
from tools.gpu_targets import TARGETS
from tools.speed import comparison, rates
from tools.speed.kernels import GPUS, PACKAGES, compiled_for
from tools.speed.whole import predict_whole


def benchmark_result(seconds):
    """What `benchmarks.attention` would write, with the median seconds of (variant, mask)."""
    workload = Workload(SHAPES["qwen2.5-vl-7b"], 4096, 400)
    masks = workload.masks(["DENSE", "SINK"])
    result = {
        "shape": {"name": "qwen2.5-vl-7b"},
        "tokens": workload.tokens,
        "image_tokens": workload.image_tokens,
        "masks": {
            mask.name: {"categories": [each.name for each in mask.categories]} for mask in masks
        },
        "rows": [
            {"variant": variant, "mask": mask, "median_seconds": median}
            for (variant, mask), median in seconds.items()
        ],
    }
    result["rows"].append({"variant": "bsjax, triton", "mask": "SINK", "problem": "not run"})
    return workload, masks, result


def test_predictions_stand_beside_measurements():
    workload, masks, result = benchmark_result(
        {
            ("bsjax, pallas", "DENSE"): 4e-3,
            ("bsjax, pallas", "SINK"): 1e-3,
            ("bsjax, triton", "DENSE"): 3e-3,
            ("cuDNN", "DENSE"): 5e-3,
        }
    )
    text = comparison.beside(result, "h200")
    dense, sink, triton = (line for line in text.splitlines() if line.startswith(("| p", "| t")))
    predicted = [predict_whole(workload, mask, "pallas", "h200").seconds for mask in masks]
    of_triton = predict_whole(workload, masks[0], "triton", "h200").seconds
    assert "MODEL" in text and "pallas" in dense and "triton" in triton
    assert f"{4e-3 / predicted[0]:.2f}" in dense and "4.000" in dense
    assert "4.00" in sink and f"{predicted[0] / predicted[1]:.2f}" in sink
    assert f"{3e-3 / of_triton:.2f}" in triton
    # What the second falsifier needs.
    ratio = f"Triton / Pallas, DENSE: measured 0.75, MODEL {of_triton / predicted[0]:.2f}"
    assert ratio in text


def test_where_there_is_no_prediction_a_line_says_so():
    _, _, result = benchmark_result({("bsjax, xla", "DENSE"): 4e-3})
    assert comparison.beside(result, None) == "MODEL: no prediction for this GPU."
    assert "nothing to compare" in comparison.beside(result, "h200")
    small = {"shape": {"name": "small"}, "tokens": 4096, "image_tokens": 400, "rows": []}
    assert "no prediction for small" in comparison.beside(small, "h200")
    _, _, one = benchmark_result({("bsjax, triton", "DENSE"): 4e-3})
    # DENSE runs even if it is not among the masks that were asked for.
    del one["masks"]["DENSE"]
    text = comparison.beside(one, "h200")
    assert "| triton | DENSE |" in text and "Triton / Pallas" not in text


def test_gpus_are_known_by_name_and_multiprocessors():
    for gpu, target in TARGETS.items():
        assert comparison.gpu_of(target.device_kind, target.cores) == gpu
    assert comparison.gpu_of("NVIDIA A100-SXM4-40GB", 108) == "a100-40gb"
    assert comparison.gpu_of("NVIDIA GH200 480GB") == "gh200"
    # Another product of that name, or a part of one.
    assert comparison.gpu_of("NVIDIA A100-SXM4-80GB", 42) is None
    assert comparison.gpu_of("NVIDIA A100-SXM4-80GB MIG 3g.40gb") is None
    assert comparison.gpu_of("NVIDIA H20") is comparison.gpu_of("cpu") is None
    assert comparison.gpu_in_use() is None


def test_relatives_run_the_kernels_of_their_chip_at_their_own_rates():
    for gpu, relative in rates.RELATIVES.items():
        own, chip = rates.rates_of(gpu), rates.rates_of(relative.of)
        assert compiled_for(gpu) in GPUS and own.tensor == chip.tensor
        peak = own.clock * own.tensor * own.multiprocessors
        assert peak == pytest.approx(relative.all_tensor)
        # Neither can be clocked higher than the fastest product with this chip.
        assert own.clock <= 1.001 * chip.clock
    workload = Workload(SHAPES["qwen2.5-vl-7b"], 8192, 400)
    (dense,) = workload.masks(["DENSE"])
    seconds = {
        gpu: predict_whole(workload, dense, "pallas", gpu).seconds
        for gpu in ("a100", "a100-40gb", "h100", "h100-nvl", "h100-pcie", "gh200")
    }
    assert seconds["a100-40gb"] == pytest.approx(seconds["a100"], rel=0.02)
    assert seconds["gh200"] == pytest.approx(seconds["h100"], rel=0.02)
    assert seconds["h100"] < seconds["h100-nvl"] < seconds["h100-pcie"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "small"], "invalid choice: 'small'"),
        (["--tokens", "0"], "'0' is not a whole number above 0"),
        (["--tokens", "36", "-5"], "'-5' is not a whole number above 0"),
        (["--images", "0"], "'0' is not a whole number above 0"),
        (["--tokens", "4", "--images", "99999"], "4096 tokens has no room for an image of 99999"),
        (["--shape", "gemma-3-4b-local", "--images", "400"], "has 256 tokens, not 400"),
        (["--page", "--gpu", "a100"], "--page and --gpu exclude each other"),
        (["--page", "--chunks"], "--page and --chunks exclude each other"),
        (["--beside", "nothing.json"], "cannot read nothing.json: No such file or directory"),
        (["--beside", "pyproject.toml"], "is not a result of benchmarks.attention: it is damaged"),
    ],
)
def test_what_cannot_be_predicted_is_refused_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        speed_model.parse(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_all_shapes_that_are_offered_have_predictions(capsys):
    for name, shape in SHAPES.items():
        if comparison.is_modelled(shape):
            assert speed_model.main(["--shape", name, "--tokens", "2", "--heads", "SINK"]) == 0
            printed = capsys.readouterr().out
            assert f"{name} on h200, images of {shape.image_tokens[0]} tokens" in printed
            assert "at once" in printed and printed.count("| 2K ") == 2 * len(PACKAGES)


def test_results_of_a_benchmark_are_compared_later(tmp_path, capsys):
    _, _, result = benchmark_result({("bsjax, pallas", "DENSE"): 4e-3})
    environment = {"device": "NVIDIA H200", "multiprocessors": 132}
    path = tmp_path / "attention.json"
    path.write_text(json.dumps({"environment": environment, "workloads": [result]}))
    assert speed_model.main(["--beside", str(path)]) == 0
    printed = capsys.readouterr().out
    assert comparison.beside(result, "h200") in printed and comparison.falsifiers() in printed
