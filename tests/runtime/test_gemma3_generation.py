"""`bsjax.generate` and `bsjax.forward` with Gemma 3: answers, crops, FLOPs by kind, cache."""

import numpy as np
import pytest
import transformers
from PIL import Image

import bsjax
from bsjax import HeadCategory, Profile, Template
from bsjax.cli import build_parser, main
from bsjax.cli.mask import template_and_visibility
from bsjax.masks.query_rows import visible_pairs
from bsjax.masks.visibility import PADDING_POSITION, Visibility
from bsjax.models.cache import PADDING_ROW
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.programs import programs_of
from convert.conversion import convert_checkpoint
from tests.support import convert_sources as sources
from tests.support.chunks import prefill_of
from tests.support.parity import torch
from tests.support.small_models import reference_inputs

pytestmark = [pytest.mark.parity, pytest.mark.slow]

NEW_TOKENS = 32


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def conversation(**options):
    pictures = [picture(40, 50), picture(512, 256, seed=1)]
    parts = [{"type": "image", "image": item, **options} for item in pictures]
    question = {"type": "text", "text": " word3 word4 word5"}
    return [{"role": "user", "content": [parts[0], question, parts[1], question]}]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A Hugging Face checkpoint with layers of both kinds, and the same checkpoint converted."""
    folder = tmp_path_factory.mktemp("gemma3")
    source = sources.write_source(folder / "hf", "gemma3", tied=True, layers=4)
    convert_checkpoint(source, folder / "ours", dtype="float32")
    return source, folder / "ours"


@pytest.fixture(scope="module")
def model(checkpoints):
    return bsjax.load(checkpoints[1], "float32")


@pytest.mark.parametrize("crops", [False, True])
def test_answers_are_those_of_transformers(checkpoints, model, crops):
    messages = conversation(do_pan_and_scan=crops)
    result = bsjax.generate(model, messages, max_new_tokens=NEW_TOKENS)
    reference = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        checkpoints[0], dtype=torch.float32
    )
    prompt = model.prompt(messages)
    assert result.stats.image_tokens == prompt.image_tokens == (16,) * (4 if crops else 2)
    inputs = reference_inputs(reference, prompt)
    with torch.no_grad():
        expected = reference(**inputs).logits[0].numpy()
    logits = bsjax.forward(model, messages)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    generated = reference.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert list(result.token_ids) == generated[0, len(prompt.token_ids) :].tolist()


def test_float16_is_refused(checkpoints):
    """Published models overflow in float16 and would generate padding only."""
    with pytest.raises(bsjax.CheckpointError, match="cannot run in float16.*bfloat16"):
        bsjax.load(checkpoints[1], "float16")


def test_flops_are_counted_for_each_kind_of_layer(model):
    messages = conversation()
    profile = Profile.uniform(HeadCategory.INTRA_IMAGE, model)
    result = bsjax.generate(model, messages, profile=profile, max_new_tokens=2)
    prompt = model.prompt(messages)
    template = Template.from_tokens(
        prompt.token_ids, model.config.image_token_id, image_tokens=prompt.image_tokens
    )
    local, everywhere = result.stats.attention_flops_per_kind
    assert (local.visibility.window, local.layers) == (12, 3)
    assert (everywhere.visibility.window, everywhere.layers) == (None, 1)
    for kind in (local, everywhere):
        assert kind.visibility.bidirectional_images
        # The last layer is local. There only the last token has a query, and sees its window.
        whole_layers, last = (2, 12) if kind is local else (1, 0)
        for flops, category in (
            (kind.dense, HeadCategory.DENSE),
            (kind.sparse, HeadCategory.INTRA_IMAGE),
        ):
            pairs = visible_pairs(template, category.groups, kind.visibility)
            assert flops == 4 * 16 * 4 * (whole_layers * pairs + last)
    assert result.stats.attention_flops_sparse == local.sparse + everywhere.sparse
    assert result.stats.attention_flops_dense == local.dense + everywhere.dense
    # Because of their window, local layers save a smaller share.
    assert everywhere.sparse / everywhere.dense < local.sparse / local.dense < 1


def prefilled(model, profile=None, new_tokens=2):
    inputs = prepare_inputs(
        model.architecture,
        model.prompt(conversation()),
        profile,
        backend="xla",
        new_tokens=new_tokens,
    )
    return prefill_of(programs_of(model), inputs, new_tokens=new_tokens)


def test_kinds_of_layers_run_the_same_rows(model):
    for chunk in prefilled(model, Profile.uniform(HeadCategory.SINK, model)).chunks:
        local, everywhere = (rows.schedule for rows in chunk.arguments.cached_rows)
        np.testing.assert_array_equal(local.queries.position, everywhere.queries.position)
        position = chunk.position[: chunk.tokens]
        np.testing.assert_array_equal(local.queries.position[: chunk.tokens], position)
        assert np.any(np.diff(position) < 0), "packed"
        assert (local.visibility.window, everywhere.visibility.window) == (12, None)


def test_local_layers_cache_only_their_window(model):
    cache = prefilled(model).carried.cache
    assert cache.of_local.k.shape == (3, 11, 2, 16)
    assert cache.of_global.k.shape[0] == 1 and cache.of_global.k.shape[1] >= 64


def test_a_ring_holds_the_last_positions_at_their_remainders(model):
    """Wherever chunks end, and wherever in a chunk the row of a position is."""
    prefill = prefilled(model, Profile.uniform(HeadCategory.SINK, model))
    ring = np.full(11, -1)
    for chunk in prefill.chunks:
        (part,) = chunk.parts
        local, _ = chunk.arguments.cached_rows
        known = np.concatenate([ring, local.schedule.queries.position])
        before = np.arange(max(0, part.start - 11), part.start)
        np.testing.assert_array_equal(ring[before % 11], before)
        keys = known[local.key_rows]
        real = local.schedule.keys.position != PADDING_POSITION
        np.testing.assert_array_equal(keys[real], local.schedule.keys.position[real])
        for first, rows in zip(*local.runs, strict=True):
            kept = np.flatnonzero(rows != PADDING_ROW)
            ring[first + kept] = chunk.position[rows[kept]]
    last = np.arange(max(0, part.end - 11), part.end)
    np.testing.assert_array_equal(ring[last % 11], last)


def test_command_line_adds_crops(checkpoints, tmp_path, capsys):
    path = tmp_path / "long.png"
    picture(512, 256).save(path)
    arguments = ["generate", str(checkpoints[1]), "word1", str(path), "--max-new-tokens", "2"]
    assert main([*arguments, "--pan-and-scan", "--uniform", "sink"]) == 0
    figures = capsys.readouterr().err
    assert "(images: 16, 16, 16)" in figures
    assert "in 3 layers with a window of 12" in figures and "in 1 global layer)" in figures
    assert main([*arguments, "--max-pixels", "1000"]) == 2
    assert "Gemma 3 scales all images to one size" in capsys.readouterr().err


def test_mask_of_a_prompt_is_that_of_the_requested_layer(checkpoints, tmp_path, capsys):
    path = tmp_path / "picture.png"
    picture(40, 40).save(path)
    arguments = ["mask", str(checkpoints[1]), "word1", str(path), "--category", "dense"]
    assert main([*arguments, "--output", str(tmp_path / "mask.png")]) == 0
    assert "1 image, DENSE: 100.0%" in capsys.readouterr().out
    options = build_parser().parse_args(arguments)
    template, visibility = template_and_visibility(options)
    assert visibility == Visibility(True, None) and template.image_tokens == (16,)
    for layer, window in enumerate((12, 12, None, 12)):
        options = build_parser().parse_args([*arguments, "--layer", str(layer)])
        assert template_and_visibility(options)[1] == Visibility(True, window)
    assert main([*arguments, "--layer", "0", "--output", str(tmp_path / "local.png")]) == 0
    assert "DENSE: 100.0% of the dense attention in a window of 12" in capsys.readouterr().out
    assert main([*arguments, "--layer", "4"]) == 2
    assert "--layer must be from 0 to 3, got 4" in capsys.readouterr().err
    assert main([*arguments, "--window", "4"]) == 2
    assert "Choose a layer with --layer" in capsys.readouterr().err


def test_mask_draws_segments_with_a_window(tmp_path, capsys):
    arguments = ["mask", "--segments", "text:4,image:8,text:4", "--output", str(tmp_path / "a.png")]
    assert main([*arguments, "--category", "dense", "--window", "3"]) == 0
    assert "in a window of 3" in capsys.readouterr().out
    options = build_parser().parse_args([*arguments, "--window", "3", "--bidirectional-images"])
    template, visibility = template_and_visibility(options)
    assert template.image_tokens == (8,) and visibility == Visibility(True, 3)
    assert main([*arguments, "--layer", "0"]) == 2
    assert "need a checkpoint, not --segments" in capsys.readouterr().err
