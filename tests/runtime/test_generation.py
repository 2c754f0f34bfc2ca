"""`forward`, `generate` and `stream` equal transformers and keep their documented promises."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import bsjax
from bsjax import (
    BackendError,
    CapacityError,
    CheckpointError,
    GenerationError,
    HeadCategory,
    MessageError,
    Profile,
    ProfileError,
)
from bsjax.models.pixels import pixel_values_of
from bsjax.runtime.programs import programs_of
from tests.support.paths import ROOT


def conversation(images, question="Which picture is brighter?"):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def photographs():
    from PIL import Image

    generator = np.random.default_rng(0)
    sizes = ((56, 84), (140, 56), (28, 28), (84, 112), (61, 93))
    pixels = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [Image.fromarray(array) for array in pixels]


@pytest.fixture(scope="module")
def torch_answers(tiny_source, tiny_model, photographs):
    """Logits and greedy tokens of transformers, in float32, for a prompt of several images."""
    import torch
    from transformers import AutoModelForImageTextToText

    def answer(images, new_tokens):
        prompt = tiny_model.prompt(conversation(images))
        token_ids = torch.tensor(prompt.token_ids[None].astype(np.int64))
        arguments = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
        if images:
            arguments |= {
                "pixel_values": torch.tensor(pixel_values_of(prompt.pixels, frames=2)),
                "image_grid_thw": torch.tensor(prompt.grid_thw.astype(np.int64)),
                "mm_token_type_ids": (token_ids == tiny_model.config.image_token_id).int(),
            }
        with torch.no_grad():
            logits = model(**arguments).logits[0].numpy()
            tokens = model.generate(
                **arguments,
                max_new_tokens=new_tokens,
                do_sample=False,
                temperature=None,
                top_k=None,
                top_p=None,
            )
        return logits, tuple(tokens[0, token_ids.shape[1] :].tolist())

    model = AutoModelForImageTextToText.from_pretrained(tiny_source, dtype=torch.float32).eval()
    return answer


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_logits_and_greedy_tokens_equal_transformers(tiny_model, photographs, torch_answers, count):
    images = photographs[:count]
    wanted_logits, wanted_tokens = torch_answers(images, 32)
    logits = bsjax.forward(tiny_model, conversation(images))
    assert logits.dtype == np.float32 and logits.shape == wanted_logits.shape
    assert np.abs(logits - wanted_logits).max() < 1e-4 * np.abs(wanted_logits).max()
    result = bsjax.generate(tiny_model, conversation(images), max_new_tokens=32)
    assert result.token_ids == wanted_tokens


@pytest.mark.parametrize("category", HeadCategory)
def test_sparse_prefill_equals_the_masked_reference(tiny_model, photographs, category):
    profile = Profile.uniform(category, tiny_model)
    sparse, reference = (
        bsjax.forward(tiny_model, conversation(photographs), profile=profile, backend=backend)
        for backend in ("xla", "reference")
    )
    np.testing.assert_allclose(sparse, reference, atol=1e-4 * np.abs(reference).max())
    dense = bsjax.forward(tiny_model, conversation(photographs))
    differs = np.abs(sparse - dense).max() > 1e-3 * np.abs(dense).max()
    assert differs == (category is not HeadCategory.DENSE)


def test_mixed_heads_with_learned_sinks(tiny_model, photographs):
    uniform = Profile.uniform("dense", tiny_model, sinks=bsjax.Sinks(first=1, offsets=(3,)))
    generator = np.random.default_rng(0)
    profile = dataclasses.replace(
        uniform,
        categories=generator.integers(0, 4, uniform.categories.shape).astype(np.int8),
        is_uniform=False,
    )
    sparse, reference = (
        bsjax.forward(tiny_model, conversation(photographs), profile=profile, backend=backend)
        for backend in ("xla", "reference")
    )
    np.testing.assert_allclose(sparse, reference, atol=1e-4 * np.abs(reference).max())


@pytest.mark.slow
def test_a_batch_equals_single_runs(tiny_model, photographs):
    conversations = [
        conversation(photographs[:2]),
        conversation([], "Hello"),
        conversation(photographs[1:4], "Count them."),
    ]
    batch = bsjax.generate(tiny_model, conversations, max_new_tokens=9, temperature=0.9, seed=5)
    for together, messages in zip(batch, conversations, strict=True):
        alone = bsjax.generate(tiny_model, messages, max_new_tokens=9, temperature=0.9, seed=5)
        assert (together.token_ids, together.text) == (alone.token_ids, alone.text)
    logits = bsjax.forward(tiny_model, conversations[:2])
    np.testing.assert_array_equal(logits[1], bsjax.forward(tiny_model, conversations[1]))


def test_streamed_pieces_add_up_to_the_answer(tiny_model, photographs):
    messages = conversation(photographs[:2])
    options = {"max_new_tokens": 24, "temperature": 1.5, "seed": 2}
    whole = bsjax.generate(tiny_model, messages, **options)
    pieces, token_ids = [], []

    def receive(piece, token_id):
        pieces.append(piece)
        token_ids.append(token_id)

    streamed = bsjax.generate(tiny_model, messages, stream=receive, **options)
    decoded = tiny_model.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    assert "".join(pieces) == whole.text == streamed.text == decoded
    assert tuple(token_ids) == whole.token_ids == streamed.token_ids
    assert "".join(bsjax.stream(tiny_model, messages, **options)) == whole.text


def test_pieces_hold_only_whole_characters(tiny_model):
    from bsjax.runtime.results import IncrementalText

    text = "Où? 日本語 🙂 end"
    token_ids = tiny_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(token_ids) > len(text), "some characters take several tokens"
    growing = IncrementalText(tiny_model.tokenizer)
    pieces = [
        growing.add(token_id, last=index == len(token_ids) - 1)
        for index, token_id in enumerate(token_ids)
    ]
    assert "".join(pieces) == growing.whole == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.slow
def test_an_answer_ends_at_the_generation_configs_end_token(tiny_model, photographs):
    messages = conversation(photographs[:1])
    free = bsjax.generate(tiny_model, messages, max_new_tokens=40)
    assert free.finish_reason == "length" and len(free.token_ids) == 40
    # The first token that did not occur before becomes the end-of-sequence token.
    position = next(i for i in range(1, 40) if free.token_ids[i] not in free.token_ids[:i])
    config = type(tiny_model.generation_config)(eos_token_id=[free.token_ids[position], 3])
    ended = bsjax.generate(
        dataclasses.replace(tiny_model, generation_config=config), messages, max_new_tokens=40
    )
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: position + 1]


def test_drawing_depends_only_on_the_seed(tiny_model, photographs):
    messages = conversation(photographs[:1])

    def draw(**options):
        return bsjax.generate(tiny_model, messages, max_new_tokens=12, **options).token_ids

    assert draw(temperature=1.0, seed=1) == draw(temperature=1.0, seed=1)
    assert draw(temperature=1.0, seed=1) != draw(temperature=1.0, seed=2)
    assert draw(temperature=1.0, top_k=1, seed=3) == draw()
    assert draw(temperature=1.0, top_p=1e-6, seed=3) == draw()


@pytest.mark.slow
def test_another_template_in_the_same_buckets_compiles_nothing(tiny_model, photographs):
    events = []
    profile = Profile.uniform("intra_image_sink", tiny_model)
    options = {"max_new_tokens": 5, "profile": profile}
    question = "Which of these pictures is the brightest, and which is the darkest one of them?"
    first = bsjax.generate(tiny_model, conversation(photographs[:4], question), **options)
    count = programs_of(tiny_model).compilations

    def listen(event, duration, **_):
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        reordered = [photographs[3], photographs[0], photographs[1], photographs[2]]
        second = bsjax.generate(tiny_model, conversation(reordered, question + "!"), **options)
        bsjax.generate(
            tiny_model, conversation(reordered, question), temperature=0.5, top_k=3, **options
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert second.stats.image_tokens != first.stats.image_tokens
    assert events == [] and programs_of(tiny_model).compilations == count
    assert second.stats.compile_seconds == 0.0


def test_stats_count_visible_pairs(tiny_model, photographs):
    text = tiny_model.config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    profile = Profile.uniform("sink", tiny_model)
    stats = bsjax.generate(
        tiny_model, conversation(photographs), profile=profile, max_new_tokens=2
    ).stats
    tokens = stats.prompt_tokens
    # In the last layer only the last token has a query.
    pairs = (text.num_hidden_layers - 1) * tokens * (tokens + 1) // 2 + tokens
    assert stats.attention_flops_dense == 4 * head_dim * text.num_attention_heads * pairs
    assert 0 < stats.attention_flops_sparse < stats.attention_flops_dense
    assert len(stats.image_tokens) == 5 and sum(stats.image_tokens) < tokens
    assert min(stats.vision_seconds, stats.prefill_seconds, stats.decode_seconds) > 0


def test_a_prompt_longer_than_the_positions_is_refused(tiny_model):
    limit = tiny_model.config.text_config.max_position_embeddings
    with pytest.raises(CapacityError, match=f"the model has {limit}"):
        bsjax.generate(tiny_model, conversation([], "Hi"), max_new_tokens=limit)


def test_a_prompt_that_does_not_fit_is_refused_before_it_runs(tiny_model, photographs, monkeypatch):
    monkeypatch.setattr("bsjax.runtime.kept_cache.bytes_available", lambda *_: 2**20)
    with pytest.raises(CapacityError, match=r"2 images of 6, 10 tokens.*max_pixels"):
        bsjax.generate(tiny_model, conversation(photographs[:2]), max_new_tokens=3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_new_tokens": 0}, GenerationError, "at least 1"),
        ({"temperature": -1.0}, GenerationError, "temperature"),
        ({"temperature": float("nan")}, GenerationError, "temperature"),
        ({"top_k": 0}, GenerationError, "top_k"),
        ({"top_p": 0.0}, GenerationError, "top_p"),
        ({"top_p": 1.5}, GenerationError, "top_p"),
        ({"seed": -1}, GenerationError, "seed"),
        ({"backend": "triton"}, BackendError, "triton"),
        ({"profile": "no-such-profile"}, ProfileError, "no-such-profile"),
    ],
)
def test_arguments_out_of_range_are_refused(tiny_model, options, error, words):
    with pytest.raises(error, match=words):
        bsjax.generate(tiny_model, conversation([], "Hi"), **options)


def test_empty_and_malformed_messages_are_refused(tiny_model):
    with pytest.raises(MessageError, match="empty"):
        bsjax.generate(tiny_model, [])
    with pytest.raises(MessageError, match="empty"):
        bsjax.forward(tiny_model, [[]])
    with pytest.raises(GenerationError, match="do not pass a batch"):
        batch = [conversation([], "Hi")] * 2
        bsjax.generate(tiny_model, batch, stream=lambda piece, token_id: None)
    profile = Profile.uniform("sink", family="qwen2_vl", layers=3, heads=2)
    with pytest.raises(ProfileError):
        bsjax.generate(tiny_model, conversation([], "Hi"), profile=profile)


def test_a_chat_template_file_takes_precedence_over_the_tokenizers(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "older")
    template = tiny_checkpoint / "chat_template.jinja"
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": "As the file says:" + template.read_text()})
    )
    model = bsjax.load(folder)
    rendered = model.tokenizer.apply_chat_template(conversation([], "Hi"), tokenize=False)
    assert rendered.startswith("As the file says:")
    (folder / "chat_template.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"chat_template\.json"):
        bsjax.load(folder)


@pytest.mark.slow
def test_programs_are_kept_in_the_users_cache_folder(tiny_checkpoint, tmp_path):
    environment = {
        name: os.environ[name] for name in os.environ if "COMPILATION_CACHE" not in name
    } | {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    code = """if True:
        import sys
        sys.modules["torch"] = None  # it takes seconds to import
        import bsjax
        messages = [{"role": "user", "content": "Hi"}]
        bsjax.generate(bsjax.load(sys.argv[1]), messages, max_new_tokens=2)
    """
    subprocess.run(
        [sys.executable, "-c", code, str(tiny_checkpoint)],
        env=environment,
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert any((tmp_path / "bsjax" / "compiled").iterdir())
