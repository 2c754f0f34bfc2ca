"""`make gpu-check` runs the same cases for both kernels, and says what it leaves out."""

import json
import math
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from benchmarks import attention, predictions
from benchmarks.kernels import problem_of
from benchmarks.variants import NotAvailable, variants
from benchmarks.workloads import SHAPES, Workload
from bsjax import HeadCategory
from bsjax.attention import backends
from tests.support.parity import torch
from tests.support.triton_interpreter import interpreted, require_triton
from tools import gpu_cases, gpu_check, gpu_gradients
from tools.speed import comparison

BOTH = ("pallas", "triton")


def names(cases):
    return [case.name for case in cases]


class TestCases:
    def test_both_kernels_run_one_list(self):
        cases = names(gpu_cases.all_cases(BOTH, BOTH))
        assert len(set(cases)) == len(cases)
        of_pallas, of_triton = (
            [name.removeprefix(f"{kernel}: ") for name in cases if name.startswith(kernel)]
            for kernel in BOTH
        )
        assert of_pallas == of_triton and len(of_pallas) + len(of_triton) == len(cases)
        assert names(gpu_cases.all_cases(["triton"], [])) == [
            f"triton: {name}" for name in of_triton if not name.startswith("gradients")
        ]

    def test_cases_of_gradients_have_everything_that_kernels_distinguish(self):
        cases = gpu_cases.gradient_cases()
        for factor, levels in (
            ("head_dim", gpu_cases.HEAD_DIMS),
            ("dtype", gpu_cases.DTYPES),
            ("visibility", gpu_cases.LEVELS["visibility"]),
        ):
            assert {getattr(case, factor) for case in cases} == set(levels), factor
        assert {case.group for case in cases} > {1, 7}
        heads = {category for case in cases for category in case.mask().categories}
        assert heads == set(HeadCategory)

    def test_gradients_of_some_keys_are_added_up(self):
        split = []
        for case in gpu_cases.gradient_cases():
            tiles = case.mask().schedule.transposed.tiles
            first = tiles.first_key[0][tiles.keys[0] > 0]
            split.append(len(set(first.tolist())) < first.size)
        assert any(split) and not all(split)

    def test_wrong_gradients_fail(self, monkeypatch):
        generator = np.random.default_rng(0)
        exact = [generator.standard_normal((9, heads, 16), np.float32) for heads in (2, 1, 1)]

        def gradients(*arrays, wrong, backend):
            found = [array.copy() for array in exact]
            if backend != "xla":
                found[1][4, 0] *= wrong
            return found

        case = gpu_gradients.GradientCase(16, "bfloat16", template="small", kv_heads=1)
        for wrong, passed in ((1.0, True), (1.01, True), (1.5, False), (math.nan, False)):
            monkeypatch.setattr(gpu_gradients, "gradients", partial(gradients, wrong=wrong))
            of_q, of_k, of_v = case.run("triton")
            assert of_q.passed and of_v.passed and of_k.passed == passed
            assert of_k.name == "gradient of k"

    def test_errors_of_rows_whose_gradients_cancel_are_relative_to_others(self):
        wanted = np.ones((4, 1, 2))
        wanted[0] = 1e-9
        found = wanted + 0.01
        error = gpu_gradients.greatest_gradient_error(found, wanted)
        assert 0.01 < error < 0.0125
        assert gpu_gradients.greatest_gradient_error(0 * wanted, 0 * wanted) == 0


class TestKernels:
    def test_a_kernel_that_cannot_run_says_why(self, monkeypatch):
        assert problem_of("pallas") is None
        assert "needs an NVIDIA GPU" in (problem_of("triton") or "")
        monkeypatch.setattr(backends, "_has_pallas", lambda: False)
        assert "has no Pallas for Triton any more" in (problem_of("pallas") or "")

    def test_without_any_kernel_nothing_passes(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(backends, "_has_pallas", lambda: False)
        assert gpu_check.main(["--interpret", "--output", str(tmp_path)]) == 2
        printed = capsys.readouterr()
        assert "Left out: the kernels of pallas" in printed.out
        assert "Left out: the kernels of triton" in printed.out
        assert "Nothing was checked" in printed.err and not list(tmp_path.iterdir())

    def test_gradients_are_checked_where_kernels_compute_them(self, monkeypatch, capsys):
        found = {"pallas": None, "triton": None}
        monkeypatch.setattr(gpu_check, "problem_of", found.__getitem__)
        assert gpu_check.usable(BOTH, on_gpu=True) == (["pallas", "triton"],) * 2
        assert gpu_check.usable(["pallas"], on_gpu=True) == (["pallas"],) * 2
        assert gpu_check.usable(BOTH, on_gpu=False) == (["pallas", "triton"], ["triton"])
        assert capsys.readouterr().out == ""
        found["triton"] = "It is not installed."
        assert gpu_check.usable(BOTH, on_gpu=True) == (["pallas"], [])
        assert capsys.readouterr().out.splitlines() == [
            "Left out: the kernels of triton. It is not installed.",
            "Left out: gradients, whose kernels are those of triton.",
        ]
        found.update(pallas="It is gone.", triton=None)
        assert gpu_check.usable(BOTH, on_gpu=True) == (["triton"], ["triton"])

    @pytest.mark.slow
    def test_small_cases_of_triton_run_in_its_interpreter(self, tmp_path):
        require_triton()
        if torch is None:
            pytest.skip("Triton's interpreter needs torch")
        options = ["--interpret", "--kernel", "triton", "--no-benchmark", "--output", str(tmp_path)]
        for only, compared in (
            ("decode", {"output", "log-sum-exp"}),
            ("gradients", {f"gradient of {name}" for name in "qkv"}),
        ):
            assert interpreted("tools.gpu_check:main", [*options, "--only", only]) == 0
            record = json.loads((tmp_path / "gpu_check.json").read_text())
            (case,) = record["records"]
            assert case["name"].startswith(f"triton: {only}") and case["passed"]
            assert {each["name"] for each in case["comparisons"]} == compared
            assert record["gradients_of"] == ["triton"]


class TestBenchmarks:
    def run(self, monkeypatch, left, statuses=(0, 0)):
        """The options of the benchmarks that run on a GPU with so many seconds left."""
        remaining, calls = list(statuses), []

        def main(options):
            calls.append(options)
            return remaining.pop(0)

        monkeypatch.setattr(attention, "main", main)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(gpu_check.time, "monotonic", lambda: 0.0)
        right = gpu_check.run_benchmarks(BOTH, gpu_check.Path("folder"), left)
        monkeypatch.undo()
        return right, [attention.parse(options) for options in calls]

    def test_both_kernels_are_timed_and_a_longer_prompt(self, monkeypatch):
        right, (quick, long) = self.run(monkeypatch, 300.0)
        assert right and quick.kernel == long.kernel == ["pallas", "triton"]
        assert quick.quick and quick.time_limit <= 150 and "DENSE" in quick.categories
        (workload,) = attention.chosen_workloads(long)
        assert (workload.tokens, workload.image_tokens) == (75 * 1024, 400)
        assert long.categories == ["DENSE", "INTRA_IMAGE_SINK"] and long.time_limit <= 90
        # Neither replaces the other's results.
        assert long.output != quick.output
        assert not self.run(monkeypatch, 300.0, (1, 0))[0]
        assert not self.run(monkeypatch, 300.0, (0, 1))[0]

    def test_without_time_the_longer_prompt_is_left_out(self, monkeypatch, capsys):
        right, (quick,) = self.run(monkeypatch, 20.0)
        assert right and quick.time_limit == 20
        assert "Left out, no time: python3 -m benchmarks.attention" in capsys.readouterr().out

    def test_a_kernel_that_cannot_run_stays_in_the_table(self):
        workload = Workload(SHAPES["small"], 256, 60)
        masks = workload.masks(["SINK"])
        chosen = variants(workload, masks, backends=["triton", "xla"], torch=False)
        ours = [each for each in chosen if each.name.startswith("bsjax")]
        assert [each.name for each in ours] == ["bsjax, triton"] * 2 + ["bsjax, xla"] * 2
        with pytest.raises(NotAvailable, match="NVIDIA GPU"):
            ours[0].prepare(None)

    def test_the_kernel_of_auto_is_the_default(self):
        assert attention.parse([]).kernel == ["xla"]
        assert attention.parse(["--kernel", "pallas", "triton"]).kernel == ["pallas", "triton"]
        with pytest.raises(SystemExit):
            attention.parse(["--kernel", "cuda"])

    def test_predictions_are_printed_or_left_to_other_machines(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(comparison, "gpu_in_use", lambda: "h200")
        monkeypatch.setattr(comparison, "beside", lambda result, gpu: f"{result} on {gpu}")
        path = tmp_path / "results.json"
        predictions.print_predictions("first", path, later=False)
        assert capsys.readouterr().out == "\nfirst on h200\n"
        predictions.print_predictions("first", path, later=True)
        printed = capsys.readouterr().out
        assert "first" not in printed and f"tools.speed_model --beside {path}" in printed
        monkeypatch.setattr(comparison, "gpu_in_use", lambda: None)
        predictions.print_predictions("first", path, later=True)
        assert capsys.readouterr().out == "\nfirst on None\n"

    def test_the_predictions_of_gpu_check_are_always_printed(self, monkeypatch):
        _, runs = self.run(monkeypatch, 300.0)
        for options in runs:
            tokens = 36 * 1024 if options.quick else options.tokens[0]
            workload = Workload(SHAPES["qwen2.5-vl-7b"], tokens, 400)
            seconds = predictions.seconds_for_predictions(workload, options)
            assert seconds is not None and 0 < seconds < 15
            longer = replace(workload, tokens=40 * tokens)
            assert predictions.seconds_for_predictions(longer, options) is None

    def test_a_benchmark_on_a_gpu_ends_with_the_model(self, monkeypatch, capsys, tmp_path):
        def run_workload(workload, options, deadline):
            masks = workload.masks(options.categories)
            return {
                "shape": {"name": workload.shape.name},
                "tokens": workload.tokens,
                "image_tokens": workload.image_tokens,
                "masks": {
                    mask.name: {"categories": [each.name for each in mask.categories]}
                    for mask in masks
                },
                "rows": [
                    {"variant": f"bsjax, {kernel}", "mask": mask.name, "median_seconds": 1e-3}
                    | {"problem": None}
                    for kernel in options.kernel
                    for mask in masks
                ],
            }

        monkeypatch.setattr(attention, "run_workload", run_workload)
        monkeypatch.setattr(attention, "render", lambda result: "the table")
        monkeypatch.setattr(comparison, "gpu_in_use", lambda: "h100")
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        options = ["--shapes", "qwen2.5-vl-7b", "--tokens", "2K", "--images", "400", "--kernel"]
        options += [*BOTH, "--categories", "DENSE", "SINK", "--output", str(tmp_path)]
        assert attention.main(options) == 0
        printed = capsys.readouterr().out
        order = ["the table", "MODEL beside measurement", "Triton / Pallas, DENSE: measured 1.00"]
        places = [printed.index(each) for each in [*order, comparison.falsifiers()]]
        assert places == sorted(places)
        assert printed.count("| pallas |") == printed.count("| triton |") == 2
