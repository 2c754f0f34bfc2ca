"""What the checkpoint's generation config says is drawn from as in transformers, or refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import GenerationConfig

import bsjax
from bsjax import GenerationError
from bsjax.runtime.choice import Choice
from bsjax.runtime.sampling import filtered, penalized
from tests.support.refusals import refused

MESSAGES = [{"role": "user", "content": "Which picture is brighter?"}]
END = {"eos_token_id": [777, 775], "pad_token_id": 775}

PUBLISHED = {
    "Qwen2-VL": {"do_sample": True, "top_k": 1, "top_p": 0.001, "temperature": 0.01},
    "Qwen2.5-VL": {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6},
    "Gemma 3": {"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"},
}


def with_config(model, **settings):
    return dataclasses.replace(model, generation_config=GenerationConfig(**END, **settings))


@pytest.fixture(scope="module")
def reference(tiny_source):
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(tiny_source, dtype=torch.float32)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("settings", "given"),
    [
        *((settings, {}) for settings in PUBLISHED.values()),
        ({}, {}),
        ({"do_sample": True}, {}),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": 0.3}, {}),
        ({"do_sample": True, "temperature": 1.7, "top_p": 0.4, "repetition_penalty": 0.8}, {}),
        ({"do_sample": False, "temperature": 0.3, "top_k": 2, "repetition_penalty": 1.4}, {}),
        (PUBLISHED["Qwen2-VL"], {"temperature": 0.9, "top_k": 9, "top_p": 0.9}),
        (PUBLISHED["Qwen2.5-VL"], {"temperature": 2.0, "repetition_penalty": 1.0}),
        (PUBLISHED["Gemma 3"], {"top_p": 0.2, "min_p": 0.05}),
        ({"do_sample": False, "top_p": 0.7}, {"temperature": 0.8}),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_what_transformers_draws_from(
    tiny_model, reference, monkeypatch, settings, given
):
    import torch

    config = GenerationConfig(**END, **settings)
    monkeypatch.setattr(reference, "generation_config", config)
    prompt = tiny_model.prompt(MESSAGES).token_ids
    token_ids = torch.tensor(prompt[None].astype(np.int64))
    made = reference.generate(
        input_ids=token_ids,
        attention_mask=torch.ones_like(token_ids),
        mm_token_type_ids=torch.zeros_like(token_ids).int(),
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        # In transformers, a temperature alone does not ask for draws.
        **({"do_sample": True} | given if "temperature" in given else given),
    )
    expected, logits = made.scores[0][0].numpy(), made.logits[0][0].numpy()

    sampling = Choice(**given).completed(config).sampling(seed=0)
    occurred = np.zeros(logits.size, bool)
    occurred[prompt] = True
    ours = np.asarray(penalized(jnp.asarray(logits), sampling, jnp.asarray(occurred)))
    assert (sampling.temperature > 0) == bool(settings.get("do_sample") or "temperature" in given)
    if sampling.temperature > 0:
        tokens, scores = filtered(jnp.asarray(ours), sampling)
        ours = np.empty(logits.size, np.float32)
        ours[np.asarray(tokens)] = scores
    differ = np.isneginf(ours) != np.isneginf(expected)
    # Where a sum of probabilities comes out at the threshold, rounding decides.
    assert differ.sum() <= 1
    np.testing.assert_allclose(ours[~differ], expected[~differ], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_only_calls_that_ask_for_it_use_the_config(tiny_model):
    settings = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
    model = with_config(tiny_model, do_sample=True, max_new_tokens=5, **settings)
    greedy = bsjax.generate(tiny_model, MESSAGES, max_new_tokens=5)
    drawn = bsjax.generate(tiny_model, MESSAGES, max_new_tokens=5, seed=3, **settings)
    assert drawn.token_ids != greedy.token_ids
    assert bsjax.generate(model, MESSAGES, max_new_tokens=5).token_ids == greedy.token_ids
    asked = {"use_generation_config": True, "seed": 3}
    assert bsjax.generate(model, MESSAGES, **asked).token_ids == drawn.token_ids
    assert "".join(bsjax.stream(model, MESSAGES, **asked)) == drawn.text
    session = bsjax.Session(model)
    assert session.generate(MESSAGES, **asked).token_ids == drawn.token_ids
    assert "".join(session.stream(MESSAGES, **asked)) == drawn.text
    longer = bsjax.generate(
        model, MESSAGES, max_new_tokens=7, temperature=0.0, repetition_penalty=1.0, **asked
    )
    assert longer.token_ids[:5] == greedy.token_ids and len(longer.token_ids) == 7


def test_stop_strings_of_the_config_end_answers(tiny_model):
    whole = bsjax.generate(tiny_model, MESSAGES, max_new_tokens=12).text
    stop = whole[4:6]
    model = with_config(tiny_model, stop_strings=[stop])
    answer = bsjax.generate(model, MESSAGES, max_new_tokens=12, use_generation_config=True)
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"no_repeat_ngram_size": 3},
        {"bad_words_ids": [[3, 4]]},
        {"suppress_tokens": [5]},
        {"begin_suppress_tokens": [5]},
        {"sequence_bias": [[[3], -1.0]]},
        {"forced_eos_token_id": 7},
        {"min_new_tokens": 3},
        {"min_length": 30},
        {"encoder_repetition_penalty": 1.2},
        {"exponential_decay_length_penalty": (5, 1.1)},
        {"guidance_scale": 1.5},
        {"penalty_alpha": 0.6},
        {"do_sample": True, "num_return_sequences": 2},
        {"max_time": 2.0},
        {"do_sample": True, "typical_p": 0.9},
        {"do_sample": True, "epsilon_cutoff": 0.1},
    ],
    ids=str,
)
def test_settings_that_would_change_the_answer_are_refused_by_name(tiny_model, settings):
    model = with_config(tiny_model, **settings)
    name = list(settings)[-1]
    words = f"The checkpoint's generation config sets {name} to"
    asked = {"use_generation_config": True, "max_new_tokens": 2}
    refused(lambda: bsjax.generate(model, MESSAGES, **asked), GenerationError, words)
    refused(lambda: bsjax.stream(model, MESSAGES, **asked), GenerationError, words)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0, "guidance_scale": 1.0},
        {"min_length": 0, "num_return_sequences": 1, "length_penalty": 2.0, "use_cache": False},
        # Not applied to the likeliest token.
        {"do_sample": False, "typical_p": 0.9, "epsilon_cutoff": 0.1},
        # Not a setting of transformers, which ignores it.
        {"chat_format": "chatml"},
    ],
    ids=str,
)
def test_settings_without_effect_are_accepted(settings):
    config = GenerationConfig(**END, **settings)
    assert Choice().completed(config).sampling(seed=0).temperature == 0


def test_a_length_with_the_prompt_gives_way_to_the_number_of_new_tokens():
    config = GenerationConfig(**END, max_length=100)
    with pytest.raises(GenerationError, match="sets max_length to 100.*give max_new_tokens"):
        Choice().completed(config)
    assert Choice(max_new_tokens=5).completed(config).new_tokens() == 5


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": "hot"},
        {"do_sample": "yes"},
        {"do_sample": True, "top_k": -3},
        {"top_p": 7.0},
        {"max_new_tokens": "many"},
        {"stop_strings": [""]},
    ],
    ids=str,
)
def test_invalid_settings_name_the_config(settings):
    config = GenerationConfig(**END)
    vars(config).update(settings)
    name = {"stop_strings": "stop"}.get(list(settings)[-1], list(settings)[-1])
    with pytest.raises(GenerationError, match=f"^The checkpoint's generation config: {name} must"):
        Choice().completed(config)


@pytest.mark.usefixtures("annotations_unchecked")
def test_bad_arguments_stay_the_callers(tiny_model):
    model = with_config(tiny_model, do_sample=True)
    for value in (None, "checkpoint", 1):
        refused(
            lambda value=value: bsjax.generate(model, MESSAGES, use_generation_config=value),
            GenerationError,
            "use_generation_config must be True or False",
        )
    with pytest.raises(GenerationError, match="^temperature must be a number"):
        bsjax.generate(model, MESSAGES, temperature=np.ones(2), use_generation_config=True)
