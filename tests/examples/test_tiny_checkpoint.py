"""The committed checkpoint is what its script makes, and it answers as in transformers."""

import json

import numpy as np
import pytest
import transformers
from sklearn.datasets import load_sample_images

import bsjax
from bsjax.models.pixels import pixel_values_of
from tests.support.parity import torch


@pytest.fixture(scope="module")
def messages() -> list[dict]:
    temple, flower = load_sample_images().images
    content = [{"type": "image", "image": array} for array in (temple, flower[:140, :300])]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]


@pytest.mark.slow
@pytest.mark.parity
def test_it_answers_as_in_transformers(tiny_source, tiny_model, messages):
    model = tiny_model
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny_source, dtype=torch.float32
    )
    prompt = model.prompt(messages)
    token_ids = torch.from_numpy(prompt.token_ids.astype(np.int64))[None]
    inputs = {
        "input_ids": token_ids,
        "attention_mask": torch.ones_like(token_ids),
        "mm_token_type_ids": (token_ids == model.config.image_token_id).int(),
        "pixel_values": torch.from_numpy(pixel_values_of(prompt.pixels, frames=2)),
        "image_grid_thw": torch.from_numpy(prompt.grid_thw.astype(np.int64)),
    }
    with torch.no_grad():
        expected_logits = theirs(**inputs).logits[0].numpy()
        expected = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)[0].numpy()
    logits = bsjax.forward(model, messages)
    assert np.abs(logits - expected_logits).max() < 1e-4 * np.abs(expected_logits).max()
    result = bsjax.generate(model, messages, max_new_tokens=24)
    assert list(result.token_ids) == expected[token_ids.shape[1] :].tolist()
    assert result.text, "the demo would have nothing to show"


@pytest.mark.parity
def test_the_script_makes_the_same_files(tiny_source, tmp_path):
    from examples import make_tiny_checkpoint

    make_tiny_checkpoint.main(tmp_path)
    committed = sorted(file.name for file in tiny_source.iterdir())
    assert committed == sorted(file.name for file in tmp_path.iterdir())
    for name in committed:
        ours, again = (tiny_source / name).read_bytes(), (tmp_path / name).read_bytes()
        if name.endswith("config.json"):
            ours, again = (json.loads(text) for text in (ours, again))
            for document in (ours, again):
                document.pop("transformers_version", None)
        assert ours == again, name


def test_it_is_small(tiny_source):
    assert sum(file.stat().st_size for file in tiny_source.iterdir()) < 5e6
