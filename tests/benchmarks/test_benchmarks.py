"""The benchmarks measure what they say, and wrong or missing variants stay in the table."""

import functools
import json
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention, variants
from benchmarks.attention_arrays import random_arrays
from benchmarks.dense_rows import (
    dense_rows,
    greatest_error,
    greatest_lse_error,
    sampled_positions,
    tolerance,
)
from benchmarks.device_timing import repeated
from benchmarks.measure import interleaved_samples, markdown_table
from benchmarks.variants import NotAvailable, wanted_rows
from benchmarks.workloads import (
    MASK_NAMES,
    MIXES,
    SHAPES,
    AttentionShape,
    Workload,
    head_mix,
    prompt_template,
)
from bsjax import HeadCategory, Image, Template, Text
from bsjax.attention import GPU_KERNELS, ragged_attention
from bsjax.gpu.configurations import compiling_for
from bsjax.masks.schedule import build_schedule, category_tables
from bsjax.masks.visibility import CAUSAL, TokenInfo, Visibility
from tests.support.gpu_compiler import require_gpu_compiler
from tests.support.parity import torch
from tests.support.paths import ROOT
from tests.support.templates import visible_matrix
from tests.support.triton_interpreter import require_triton_compiler
from tools import gpu_cases, gpu_check, gpu_comparisons, gpu_templates, tune
from tools.gpu_targets import compile_for

TINY = AttentionShape("tiny", 4, 2, 16, "float32", image_tokens=(60,))
WINDOWED = replace(TINY, name="tiny-window", visibility=Visibility(True, 70))


class TestWorkloads:
    @pytest.mark.parametrize("tokens", attention.GPU_TOKENS)
    @pytest.mark.parametrize("image_tokens", [256, 400, 1000, 1800])
    def test_templates_have_exactly_the_tokens_asked_for(self, tokens, image_tokens):
        template = prompt_template(tokens, image_tokens)
        assert template.tokens == tokens
        assert set(template.image_tokens[:-1]) == {image_tokens}
        text = int((template.image < 0).sum())
        assert 8 <= text / template.num_images <= 14

    def test_mixes_of_many_heads_cut_what_they_say(self):
        workload = Workload(SHAPES["qwen2.5-vl-7b"], 36 * 1024, 400)
        dense = workload.pairs[HeadCategory.DENSE]
        for cut in MIXES.values():
            for heads, room in ((28, 0.5 / 28), (28 * 28, 0.5 / 28**2)):
                mix = head_mix(workload.pairs, heads, cut)
                seen = sum(workload.pairs[category] for category in mix)
                assert len(mix) == heads
                assert abs(1 - seen / (heads * dense) - cut) <= room

    def test_masks_with_the_same_heads_become_one(self):
        workload = Workload(SHAPES["gemma-3-4b-global"], 4096, 256)
        masks = workload.masks()
        assert len({mask.categories for mask in masks}) == len(masks) < len(MASK_NAMES)
        assert {name for mask in masks for name in mask.name.split(" = ")} == set(MASK_NAMES)
        assert masks[0].is_dense and not any(mask.is_dense for mask in masks[1:])

    def test_pairs_are_those_of_the_predicate(self):
        workload = Workload(WINDOWED, 200, 60)
        mask = workload.masks(["ideal 1.8x"])[0]
        counted = sum(
            visible_matrix(workload.template, category.groups, Visibility(True, 70)).sum()
            for category in mask.categories
        )
        assert workload.visible_pairs(mask) == counted


class TestDenseRows:
    TEMPLATE = Template.from_segments([Text(5), Image(40), Text(2), Image(30), Text(9)])
    CATEGORIES = (0, 1, 2, 3)

    def float64(self, q, k, v, visibility):
        q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
        out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
        for head, category in enumerate(self.CATEGORIES):
            seen = visible_matrix(self.TEMPLATE, HeadCategory(category).groups, visibility)
            scores = np.where(seen, q[:, head] @ k[:, head // 2].T * 0.25, -np.inf)
            some = seen.any(axis=1)
            lse[some, head] = np.logaddexp.reduce(scores[some], axis=1)
            out[some, head] = np.exp(scores[some] - lse[some, head, None]) @ v[:, head // 2]
        return out, lse

    @pytest.mark.parametrize("visibility", [CAUSAL, Visibility(True, 9)])
    def test_expected_rows_are_the_softmax_under_the_predicate(self, visibility):
        generator = np.random.default_rng(0)
        q, k, v = (
            generator.standard_normal((self.TEMPLATE.tokens, heads, 16), np.float32)
            for heads in (4, 2, 2)
        )
        info = self.TEMPLATE.info
        rows = np.array([0, 3, 5, 6, 44, 47, 60, 85])
        groups = np.asarray([HeadCategory(c).groups for c in self.CATEGORIES], np.int32)
        out, lse = dense_rows(
            q[rows], k, v, TokenInfo(*(p[rows] for p in info)), info, groups, visibility, scale=0.25
        )
        wanted, wanted_lse = self.float64(q, k, v, visibility)
        if visibility.window:
            assert np.isneginf(wanted_lse[rows]).any(), "some rows should see nothing"
        assert greatest_error(out, wanted[rows]) < 3e-6
        assert greatest_lse_error(lse, wanted_lse[rows]) < 3e-6

    def test_error_measures_find_wrong_values(self):
        wanted = np.random.default_rng(0).standard_normal((6, 2, 8))
        wanted[5] = 0
        assert greatest_error(wanted, wanted) == 0
        assert greatest_error(1.01 * wanted, wanted) == pytest.approx(0.01)
        swapped = wanted[[1, 0, 2, 3, 4, 5]]
        assert greatest_error(swapped, wanted) > 0.5
        for place, value in (((2, 1, 3), np.nan), ((2, 1, 3), np.inf), ((5, 0, 0), 1e-9)):
            broken = wanted.copy()
            broken[place] = value
            assert greatest_error(broken, wanted) == np.inf
        lse = np.array([[1.0, -np.inf]])
        assert greatest_lse_error(lse, lse) == 0
        assert greatest_lse_error(np.array([[1.0, -5.0]]), lse) == np.inf
        assert greatest_lse_error(np.array([[np.nan, -np.inf]]), lse) == np.inf

    def test_sampled_positions_hold_all_kinds_of_tokens(self):
        template = prompt_template(36 * 1024, 400)
        positions = sampled_positions(template, 64)
        image, sink = template.image[positions], template.sink[positions]
        for kind in (image < 0, sink, (image >= 0) & ~sink):
            assert 10 <= kind.sum() <= 30
        assert positions[0] == 0 and positions[-1] == template.tokens - 1


class TestTiming:
    def test_a_loop_returns_what_one_iteration_returns(self):
        value = jnp.arange(8.0)
        looped = jax.jit(repeated(lambda x, y: x * y + 1, 5))
        np.testing.assert_array_equal(looped(value, value), value * value + 1)

    @pytest.mark.parametrize("backend", GPU_KERNELS)
    def test_a_gpu_runs_only_the_kernel_in_every_iteration(self, backend):
        require_gpu_compiler()
        if backend == "triton":
            require_triton_compiler()
        template = prompt_template(2048, 400)
        schedule = build_schedule(template, category_tables([1]), block_q=128, block_kv=64)
        attend = functools.partial(ragged_attention, scale=0.1, backend=backend)
        q = jax.ShapeDtypeStruct((2048, 4, 128), jnp.bfloat16)
        arguments = (q, q, q, schedule, np.ones(4, np.int32))
        with compiling_for("sm_90"):
            program = compile_for(repeated(attend, 16), arguments).as_text()
        loop = next(line for line in program.splitlines() if " while(" in line)
        # With a known trip count, the device need not ask the host before every iteration.
        assert '"known_trip_count":{"n":"15"}' in loop
        body = program.split(f"{loop.split('body=')[1].split(',')[0]} (")[1].split("\n}")[0]
        assert body.count("custom-call(") == 1, "the kernel is not in the loop"
        assert "bf16[2048,4,128]{2,1,0} copy(" not in program
        assert "bf16[2048,4,128]{2,1,0} fusion(" not in program

    def test_rounds_are_interleaved_and_end_at_the_deadline(self):
        seen = []
        samplers = {name: lambda name=name: seen.append(name) or 1.0 for name in "ab"}
        samples = interleaved_samples(samplers, 2)
        assert seen == list("abab") and samples == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
        assert interleaved_samples(samplers, 5, deadline=0)["a"] == [1.0]


@pytest.mark.slow
@pytest.mark.parity
class TestFlexAttention:
    """The FlexAttention that bsjax is compared with computes the same masks (here uncompiled)."""

    @pytest.mark.parametrize("shape", [TINY, WINDOWED], ids=lambda shape: shape.name)
    @pytest.mark.parametrize("packed", [False, True], ids=["prompt order", "packed order"])
    @pytest.mark.parametrize("name", ["DENSE", "INTRA_IMAGE", "ideal 1.8x"])
    def test_masks_are_those_of_bsjax(self, shape, packed, name):
        from benchmarks import torch_variants

        workload = Workload(shape, 300, 60)
        mask = workload.masks([name])[0]
        order = torch_variants.row_order(workload, packed=packed)
        arrays = random_arrays(workload)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.comp")
            prepared = torch_variants.prepare_flex(
                arrays, workload, mask, packed=packed, compiled=False
            )
            rows = np.arange(300)
            out = prepared.rows(rows)
        wanted = wanted_rows(workload, mask, arrays, order, rows)
        assert greatest_error(out, wanted) <= tolerance("float32")

    def test_blocks_hold_all_visible_pairs_and_full_blocks_no_others(self):
        from benchmarks import torch_variants

        workload = Workload(replace(TINY, q_heads=4), 900, 200)
        mask = workload.masks(["ideal 1.8x"])[0]
        order = workload.template.packed_order
        blocks = torch_variants.build_block_mask(workload, mask, "cpu", packed=True)
        full = 0
        for head, category in enumerate(mask.categories):
            seen = visible_matrix(workload.template, category.groups)
            seen = np.pad(seen[np.ix_(order, order)], (0, -900 % 128))
            count = seen.reshape(8, 128, 8, 128).sum(axis=(1, 3))
            for kinds, indices, wanted in (
                (blocks.kv_num_blocks, blocks.kv_indices, (count > 0) & (count < 128**2)),
                (blocks.full_kv_num_blocks, blocks.full_kv_indices, count == 128**2),
            ):
                for row in range(8):
                    chosen = indices[0, head, row, : kinds[0, head, row]].tolist()
                    assert chosen == np.flatnonzero(wanted[row]).tolist()
            full += int((count == 128**2).sum())
        assert full > 0, "the example should have full blocks"


class TestAttentionBenchmark:
    def run(self, folder: Path, *options: str) -> dict:
        arguments = ["--tokens", "256", "--images", "60", "--rounds", "1", "--shapes", "small"]
        assert attention.main([*arguments, *options, "--output", str(folder)]) == 0
        return json.loads((folder / "attention_on_cpu.json").read_text())

    @pytest.mark.slow
    def test_broken_variants_stay_in_the_table(self, tmp_path, capsys, monkeypatch):
        real = variants.variants

        def with_broken_ones(workload, masks, **options):
            chosen = real(workload, masks, **options)
            ours = next(variant for variant in chosen if variant.name == "bsjax, xla")

            def fails(arrays):
                raise MemoryError("out of memory\nand more")

            def is_absent(arrays):
                raise NotAvailable("it is not installed")

            def is_wrong(arrays):
                prepared = ours.prepare(arrays)
                return replace(prepared, attend=lambda *a: 1.05 * prepared.attend(*a))

            return [
                *chosen,
                replace(ours, name="broken", prepare=fails),
                replace(ours, name="absent", prepare=is_absent),
                replace(ours, name="inaccurate", prepare=is_wrong),
            ]

        monkeypatch.setattr(attention, "variants", with_broken_ones)
        result = self.run(tmp_path, "--categories", "SINK", "ideal 1.8x", "--plot")
        printed = capsys.readouterr().out

        (workload,) = result["workloads"]
        rows = {(row["variant"], row["mask"]): row for row in workload["rows"]}
        dense = 256 * 257 // 2
        mix = workload["masks"]["ideal 1.8x"]
        assert mix["ideal_speedup"] == pytest.approx(8 * dense / mix["visible_pairs"])
        for name, mask in (
            ("jax.nn, XLA", "DENSE"),
            *([("torch SDPA", "DENSE")] if torch else []),
            ("bsjax, xla", "DENSE"),
            ("bsjax, xla", "SINK"),
            ("bsjax, xla", "ideal 1.8x"),
        ):
            row = rows[name, mask]
            assert row["problem"] is None and len(row["seconds"]) == 1
            assert row["error"] <= workload["tolerance"]
            assert row["visible_flops_per_second"] * row["median_seconds"] == pytest.approx(
                4 * 64 * 8 * dense / row["ideal_speedup"]
            )
            assert f"| {name} " in printed
        ratio = rows["bsjax, xla", "DENSE"]["seconds"][0] / rows["bsjax, xla", "SINK"]["seconds"][0]
        assert rows["bsjax, xla", "SINK"]["own_dense_speedup_over_ideal"] == pytest.approx(
            ratio / rows["bsjax, xla", "SINK"]["ideal_speedup"]
        )
        for name, reason in (
            ("broken", "failed: MemoryError: out of memory"),
            ("absent", "not run: it is not installed"),
            ("inaccurate", "wrong: error 5"),
        ):
            assert rows[name, "DENSE"]["problem"].startswith(reason)
            assert rows[name, "DENSE"]["seconds"] == []
            assert f"{name}, DENSE: {reason}" in printed
        assert workload["matrix_rate"]["flops_per_second"] > 0
        assert workload["copy_bandwidth"]["bytes_per_second"] > 0
        assert result["not_run"] == [] and result["environment"]["device"] == "cpu"
        assert (tmp_path / "attention_on_cpu.png").stat().st_size > 1000

    def test_the_time_limit_skips_workloads_and_names_them(self, tmp_path, capsys):
        assert attention.main(["--time-limit", "0", "--output", str(tmp_path)]) == 1
        printed = capsys.readouterr()
        assert "small, 4096 tokens, images of 400" in printed.out
        assert "time limit is too short" in printed.err
        assert not list(tmp_path.iterdir())

    def test_options_choose_tokens_and_masks(self):
        options = attention.parse(["--tokens", "36K", "100", "--quick"])
        assert options.tokens == [36 * 1024]
        assert set(options.categories) < set(MASK_NAMES)
        sizes = [workload.tokens for workload in attention.chosen_workloads(attention.parse([]))]
        assert sizes == sorted(sizes)
        with pytest.raises(SystemExit):
            attention.parse(["--tokens", "many"])

    def test_tables_are_markdown(self):
        assert markdown_table(("a", "b"), [("x", "1"), ("long", "22")]).splitlines() == [
            "| a    |  b |",
            "| ---- | -: |",
            "| x    |  1 |",
            "| long | 22 |",
        ]


class TestGpuCheck:
    def test_covering_cases_are_a_smallest_covering_set(self):
        cases = gpu_cases.covering_cases()
        pairs = {(case.head_dim, case.dtype) for case in cases}
        assert len(pairs) == len(cases) == len(gpu_cases.HEAD_DIMS) * len(gpu_cases.DTYPES)
        for factor, levels in gpu_cases.LEVELS.items():
            assert {getattr(case, factor) for case in cases} == set(levels), factor
        for case in cases:
            # One launch has every category, if it has enough heads.
            assert case.categories == tuple(HeadCategory)

    def test_random_templates_have_what_could_break_kernels(self):
        templates = [gpu_templates.random_template(seed) for seed in range(1, 41)]
        assert all(0 < template.tokens <= gpu_templates.FUZZED_TOKENS for template in templates)
        assert any(1 in template.image_tokens for template in templates)
        assert len({template.tokens for template in templates}) > 20

    @pytest.mark.slow
    def test_runs_with_nothing_but_jax_and_numpy(self, tmp_path):
        absent = ("jaxtyping", "flax", "transformers", "rich", "pytest", "torch", "matplotlib")
        absent += ("triton", "jax_triton")
        program = (
            "import sys\n"
            f"sys.modules.update(dict.fromkeys({absent!r}))\n"
            "from tools.gpu_check import main\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        options = ["--interpret", "--no-benchmark", "--only", "segments", "--output", str(tmp_path)]
        process = subprocess.run(
            [sys.executable, "-c", program, *options],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        assert "Left out: the kernels of triton. The backend triton needs" in process.stdout
        assert "Left out: gradients" in process.stdout
        record = json.loads((tmp_path / "gpu_check.json").read_text())
        assert record["kernels"] == ["pallas"] and record["gradients_of"] == []
        assert record["failed"] == 0 and record["cases"] == 1
        assert {"output", "padding rows", "not finite"} == {
            each["name"] for each in record["records"][0]["comparisons"]
        }

    @pytest.mark.slow
    def test_a_prefill_case_makes_all_comparisons(self):
        cases = gpu_cases.small_cases(["pallas"], [])
        prefill, decode = (case for case in cases if "float32" in case.name)
        assert all(each.passed for each in decode.run())
        comparisons = {each.name: each for each in prefill.run()}
        assert all(each.passed for each in comparisons.values())
        assert {"output", "log-sum-exp", "padding rows that see keys"} <= set(comparisons)

    def test_a_wrong_kernel_fails(self, tmp_path, capsys, monkeypatch):
        def wrong(q, *rest, **options):
            return q.at[0].set(0.5) if hasattr(q, "at") else q

        monkeypatch.setattr(gpu_comparisons, "attend", wrong)
        options = ["--interpret", "--no-benchmark", "--only", "segments"]
        assert gpu_check.main([*options, "--output", str(tmp_path)]) == 1
        printed = capsys.readouterr().out
        assert "FAIL pallas: segments" in printed and "0 of 1 cases passed" in printed

    def test_cases_not_reached_fail(self, tmp_path):
        options = ["--interpret", "--no-benchmark", "--time-limit", "-1"]
        assert gpu_check.main([*options, "--output", str(tmp_path)]) == 1

    def test_without_a_gpu_nothing_passes(self, tmp_path, capsys):
        assert gpu_check.main(["--output", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "JAX finds no GPU" in error and "--interpret" in error
        assert not list(tmp_path.iterdir())


class TestExitStatus:
    def test_only_our_own_failures_count(self):
        row = {"variant": "bsjax, triton", "problem": "wrong: error 5.0e-02, 3.1e-05 allowed"}
        assert attention.ours_is_broken(row)
        assert attention.ours_is_broken(row | {"problem": "failed: XlaRuntimeError"})
        assert not attention.ours_is_broken(row | {"problem": "not run, out of time"})
        assert not attention.ours_is_broken(row | {"problem": None})
        assert not attention.ours_is_broken(row | {"variant": "torch SDPA"})


class TestTune:
    def test_the_grid_leaves_out_what_cannot_fit_into_registers(self):
        options = tune.parse(["--interpret"])
        grid = tune.grid(options, 128)
        assert (64, 64, 4, 3) in grid and (128, 64, 8, 3) in grid
        assert not any(each.block_q == 256 and each.num_warps == 4 for each in grid)

    @pytest.mark.slow
    def test_valid_configurations_are_timed_and_others_reported(self, tmp_path, capsys):
        options = ["--head-dims", "16", "--dtypes", "float32", "--kinds", "sparse", "--heads", "2"]
        options += ["1", "--tokens", "128", "--image-tokens", "40", "--rounds", "1", "--interpret"]
        options += ["--blocks-q", "16", "--blocks-kv", "16", "24", "--warps", "4", "--stages", "1"]
        assert tune.main([*options, "--output", str(tmp_path)]) == 0
        (result,) = json.loads((tmp_path / "tune_pallas.json").read_text())["results"]
        right, refused = result["entries"]
        assert right["problem"] is None and right["median_seconds"] > 0
        assert "power of two" in refused["problem"]
        assert "1 of 2 configurations ran" in capsys.readouterr().out
        best = tune.fastest(result)
        assert best is not None
        assert (best["width"], best["bytes"], best["heads"]) == (64, 4, "sparse")
        assert (best["block_q"], best["num_warps"], best["basis"]) == (16, 4, "measured")


@pytest.mark.slow
class TestTimeToFirstToken:
    @pytest.mark.parity
    @pytest.mark.parametrize(("size", "image_tokens"), [("tiny", 12), ("tiny-gemma-3", 4)])
    def test_transformers_chooses_the_same_token(self, size, image_tokens, tmp_path, capsys):
        from benchmarks import ttft

        options = ["--size", size, "--images", "2", "--image-size", "112", "84", "--rounds", "1"]
        options += ["--jpeg", "560", "420", "--cuts", "1", "--output", str(tmp_path)]
        assert ttft.main(options) == 0
        result = json.loads((tmp_path / f"ttft_{size}_2x560x420_cpu.json").read_text())
        assert result["same_first_token_as_transformers"] is True
        assert (result["images"], result["tokens_per_image"]) == (2, image_tokens)
        dense, mixed, reference = result["rows"]
        assert dense["attention_flops_over_dense"] == 1 > mixed["attention_flops_over_dense"]
        # Those of the last layer are DENSE, as in a profile.
        assert mixed["heads"] == "2 DENSE + 1 INTRA_IMAGE + 1 INTRA_IMAGE_SINK"
        for row in (dense, mixed, reference):
            (sample,) = row["seconds"]
            parts = sample["host"] + sample["vision"] + sample["prefill"]
            assert sample["total"] == pytest.approx(parts)
        assert "transformers on torch" in capsys.readouterr().out

    def test_the_host_makes_the_bytes_that_pillow_makes(self, tmp_path, capsys, monkeypatch):
        from benchmarks import host

        monkeypatch.delitem(host.TARGETS, "an H200")  # A process less.
        options = ["--size", "tiny", "--images", "2", "--jpeg", "560", "420", "--rounds", "2"]
        assert host.main([*options, "--max-pixels", "50176", "--output", str(tmp_path)]) == 0
        result = json.loads((tmp_path / "host.json").read_text())
        width, height = result["image_size"]
        assert width * height <= 50176 and result["pixel_bytes"] == 2 * 3 * width * height
        assert result["tokens_per_image"] == width * height // 28**2
        assert not result["rounds_agree"], "two rounds are too few"
        for sample in result["seconds"]["bsjax"]:
            parts = sample["prompt"] + sample["schedules"] + sample["images"]
            assert 0 < parts <= sample["total"]
        for of_device in result["peaks"].values():
            assert of_device["pixel_bytes"] == result["pixel_bytes"]
            assert 0 < of_device["idle_bytes"] <= of_device["peak_bytes"]
        assert "2 rounds, which DO NOT AGREE" in capsys.readouterr().out

    def test_random_weights_have_the_published_shapes(self):
        from flax import nnx

        from benchmarks.random_models import model_config, random_module
        from bsjax.models import FAMILIES

        # The smallest published model: tracing even this one takes seconds.
        config = model_config("qwen2-vl-2b")
        build = FAMILIES[config.model_type].build
        module = nnx.eval_shape(lambda: build(config, jnp.bfloat16))
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)))
        assert count == 2_208_985_600
        module = random_module(model_config("tiny"), jnp.bfloat16)
        for leaf in jax.tree.leaves(nnx.state(module)):
            assert leaf.dtype == jnp.bfloat16
            values = np.asarray(leaf, np.float32)
            assert np.isfinite(values).all() and values.std() > 0


@pytest.mark.slow
def test_second_turns_are_answered_alike_with_and_without_a_session(tmp_path, capsys):
    from benchmarks import sessions

    options = ["--size", "tiny", "--tokens", "60", "--image-size", "112", "84", "--rounds", "1"]
    assert sessions.main([*options, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "sessions_tiny_cpu.json").read_text())
    assert [row["heads"] for row in result["rows"]] == ["dense", "sparse"]
    for row in result["rows"]:
        assert row["first"]["reused_tokens"] == 0
        for turn in ("question", "image"):
            assert row[turn]["same_token"] is True
            assert row[turn]["reused_tokens"] >= row["first"]["prompt_tokens"] - 3
    assert len(re.findall(r"\| +yes \|", capsys.readouterr().out)) == 4


@pytest.mark.slow
@pytest.mark.parity
def test_a_batch_gives_the_answers_of_single_calls_and_of_transformers(tmp_path, capsys):
    from benchmarks import batches

    options = ["--size", "tiny", "--short", "4", "--long", "2", "--long-tokens", "150"]
    options += ["--image-size", "56", "56", "--new-tokens", "4", "--rounds", "1", "--no-cold"]
    assert batches.main([*options, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "batches_tiny_cpu.json").read_text())
    assert [row["workload"] for row in result["rows"]] == 3 * ["short"] + 3 * ["long"]
    for row in result["rows"]:
        assert row["same_answers_as_one_by_one"] == row["prompts"], row["variant"]
        assert row["new_tokens"] == 4 * row["prompts"]
    assert "transformers, batch" in capsys.readouterr().out


@pytest.mark.slow
def test_models_on_several_devices_choose_the_same_token(tmp_path, monkeypatch):
    from benchmarks import devices, random_models

    def with_a_key_head_per_device():
        config = create()
        config.text_config.num_key_value_heads = 2
        return config

    create = random_models.SIZES["tiny"]
    monkeypatch.setitem(random_models.SIZES, "tiny", with_a_key_head_per_device)
    options = ["--size", "tiny", "--tokens", "60", "--image-size", "112", "84", "--rounds", "1"]
    assert devices.main([*options, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "devices_tiny_1x2_cpu.json").read_text())
    assert [row["heads"] for row in result["rows"]] == ["dense", "sparse"]
    for row in result["rows"]:
        assert row["same_token"] and 30 < row["tokens"] <= 60
        assert len(row["seconds"]["several"]) == 1 and row["times_as_fast"] > 0
