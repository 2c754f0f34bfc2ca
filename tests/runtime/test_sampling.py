"""Tokens are chosen from what transformers' processors leave; stop texts end answers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bsjax
from bsjax import GenerationError
from bsjax.runtime import prefill
from bsjax.runtime.results import IncrementalText, checked_stop
from bsjax.runtime.sampling import Sampling, choose, filtered, penalized, stacked

VOCABULARY = 40


def text_of(answer: str):
    return [{"role": "user", "content": answer}]


@pytest.mark.parity
@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.1, 3.0),
    top_k=st.none() | st.integers(1, VOCABULARY + 3),
    top_p=st.none() | st.floats(0.05, 0.99),
    min_p=st.none() | st.floats(0.0, 1.0),
    penalty=st.none() | st.floats(0.5, 2.0),
)
def test_scores_are_those_of_transformers(seed, temperature, top_k, top_p, min_p, penalty):
    import torch
    from transformers import generation

    random = np.random.default_rng(seed)
    logits = random.normal(scale=3, size=VOCABULARY).astype(np.float32)
    prompt = random.integers(0, VOCABULARY, 12)
    occurred = np.zeros(VOCABULARY, bool)
    occurred[prompt] = True
    sampling = Sampling.checked(
        temperature, top_k, top_p, 0, min_p=min_p, repetition_penalty=penalty
    )
    after_penalty = penalized(jnp.asarray(logits), sampling, jnp.asarray(occurred))
    tokens, scores = filtered(after_penalty, sampling)
    ours = np.empty(VOCABULARY, np.float32)
    ours[np.asarray(tokens)] = scores

    processors = generation.LogitsProcessorList()
    if penalty is not None:
        processors.append(generation.RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(generation.TemperatureLogitsWarper(temperature))
    if top_k is not None:
        processors.append(generation.TopKLogitsWarper(top_k))
    if top_p is not None:
        processors.append(generation.TopPLogitsWarper(top_p))
    if min_p is not None:
        processors.append(generation.MinPLogitsWarper(min_p))
    expected = processors(torch.tensor(prompt[None]), torch.tensor(logits[None]))[0].numpy()
    differ = np.isneginf(ours) != np.isneginf(expected)
    # Where a sum of probabilities comes out at the threshold, rounding decides.
    assert differ.sum() <= 1
    np.testing.assert_allclose(ours[~differ], expected[~differ], rtol=1e-5, atol=1e-5)


def test_greedy_answers_heed_the_penalty():
    """Each sequence is chosen for with its own settings."""
    logits = jnp.asarray([[1.0, 3.0, 2.9, -1.0]] * 2)
    occurred = jnp.asarray([[False, True, False, True]] * 2)
    both = stacked(
        [
            Sampling.checked(0.0, None, None, 0, repetition_penalty=penalty)
            for penalty in (None, 1.2)
        ]
    )
    chosen = choose(logits, both, jnp.zeros(2, jnp.int32), occurred, jnp.asarray(True))
    assert chosen.token.tolist() == [1, 2]
    # Log-probabilities are the model's own.
    expected = jax.nn.log_softmax(logits[0])
    np.testing.assert_allclose(chosen.log_probability, expected[jnp.asarray([1, 2])], rtol=1e-6)
    assert chosen.top_tokens[0].tolist() == [1, 2, 0, 3]
    np.testing.assert_allclose(chosen.top_log_probabilities[1], np.sort(expected)[::-1], rtol=1e-6)


def test_draws_depend_on_nothing_but_seed_and_step():
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, VOCABULARY)).astype(np.float32)
    occurred = np.zeros((6, VOCABULARY), bool)
    each = [Sampling.checked(1.0 * (n != 4), 9, 0.9, n % 3) for n in range(6)]
    steps = np.arange(6, dtype=np.int32) % 2

    def tokens(rows):
        rows = np.asarray(rows)
        arguments = (
            logits[rows],
            stacked([each[n] for n in rows]),
            steps[rows],
            occurred[rows],
            False,
        )
        chosen = choose(*jax.tree.map(jnp.asarray, arguments))
        return dict(zip(rows.tolist(), chosen.token.tolist(), strict=True))

    together = tokens(range(6))
    assert tokens([5, 2, 0]) == {n: together[n] for n in (5, 2, 0)}
    assert all(tokens([n]) == {n: together[n]} for n in range(6))
    assert together[4] == logits[4].argmax()


def test_image_tokens_may_be_beyond_the_vocabulary(tiny_model, annotations_unchecked):
    vocabulary = tiny_model.module.language_model.embed_tokens.num_embeddings
    inputs = SimpleNamespace(token_ids=np.asarray([3, vocabulary, 5], np.int32))
    occurred = prefill.occurring_tokens(tiny_model.module, inputs)
    assert np.flatnonzero(occurred).tolist() == [3, 5]


@pytest.mark.slow
@pytest.mark.parity
def test_penalized_answers_are_those_of_transformers(tiny_source, tiny_model):
    import torch
    from transformers import AutoModelForImageTextToText

    reference = AutoModelForImageTextToText.from_pretrained(tiny_source, dtype=torch.float32)
    messages = text_of("Which picture is brighter?")
    token_ids = torch.tensor(tiny_model.prompt(messages).token_ids[None].astype(np.int64))
    expected = reference.generate(
        input_ids=token_ids,
        attention_mask=torch.ones_like(token_ids),
        mm_token_type_ids=torch.zeros_like(token_ids).int(),
        do_sample=False,
        max_new_tokens=24,
        repetition_penalty=1.3,
    )[0, token_ids.shape[1] :].tolist()
    answer = bsjax.generate(tiny_model, messages, max_new_tokens=24, repetition_penalty=1.3)
    assert list(answer.token_ids) == expected
    plain = bsjax.generate(tiny_model, messages, max_new_tokens=24)
    assert plain.token_ids != answer.token_ids
    session = bsjax.Session(tiny_model)
    again = session.generate(messages, max_new_tokens=24, repetition_penalty=1.3)
    assert list(again.token_ids) == expected


def test_min_p_of_one_is_greedy(tiny_model):
    messages = text_of("Why?")
    drawn = bsjax.generate(tiny_model, messages, max_new_tokens=6, temperature=1.5, min_p=1.0)
    assert drawn.token_ids == bsjax.generate(tiny_model, messages, max_new_tokens=6).token_ids


@pytest.mark.slow
def test_an_answer_ends_before_a_stop_text(tiny_model):
    messages = text_of("Why?")
    whole = bsjax.generate(tiny_model, messages, max_new_tokens=20)
    half = len(whole.text) // 2
    stop = whole.text[half : half + 3]
    cut = whole.text[: whole.text.index(stop)]
    for stops in (stop, [stop], ["never there", stop]):
        answer = bsjax.generate(tiny_model, messages, max_new_tokens=20, stop=stops)
        assert (answer.text, answer.finish_reason) == (cut, "stop")
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        assert stop in tiny_model.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert "".join(bsjax.stream(tiny_model, messages, max_new_tokens=20, stop=stop)) == cut
    session = bsjax.Session(tiny_model)
    assert session.generate(messages, max_new_tokens=20, stop=stop).text == cut
    again = session.generate(messages, max_new_tokens=20)
    assert again.token_ids == whole.token_ids


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, token_ids, skip_special_tokens):
        return "".join(map(chr, token_ids))


@given(
    text=st.text("ab", max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_pieces_end_before_the_first_stop_text(text, stop):
    growing = IncrementalText(Letters(), stop)
    pieces = []
    for index, letter in enumerate(text):
        pieces.append(growing.add(ord(letter), last=index == len(text) - 1))
        if growing.stopped:
            break
    # The first one to be complete ends the answer; of several, the one that begins first.
    complete = min((text.find(one) + len(one) for one in stop if one in text), default=None)
    if complete is None:
        expected = text
    else:
        expected = text[: min(text.find(one) for one in stop if one in text[:complete])]
    assert "".join(pieces) == growing.whole == expected
    assert growing.stopped == (complete is not None)


@pytest.mark.parametrize("stop", ["", [""], [3], 3, {"a"}, ["a"] * 65, "a" * 1001, [None]])
def test_bad_stop_texts_are_refused(stop):
    with pytest.raises(GenerationError, match="stop must be a text"):
        checked_stop(stop)


@pytest.mark.parametrize(
    "options",
    [{"min_p": 1.5}, {"min_p": -0.1}, {"min_p": "a"}, {"repetition_penalty": 0}]
    + [{"repetition_penalty": value} for value in (-1, float("nan"), float("inf"), "x", 1e-300)],
)
def test_bad_settings_are_refused(tiny_model, options, annotations_unchecked):
    with pytest.raises(GenerationError, match=next(iter(options))):
        bsjax.generate(tiny_model, text_of("Why?"), **options)


def test_draws_depend_on_the_step():
    drawn = stacked([Sampling.checked(1.0, None, None, 5)] * 8)
    none = jnp.zeros((8, 50), bool)
    steps = jnp.arange(8, dtype=jnp.int32)
    chosen = choose(jnp.zeros((8, 50)), drawn, steps, none, jnp.asarray(False))
    assert len(set(chosen.token.tolist())) > 3
    assert jax.tree.leaves(drawn)[3].tolist() == [5] * 8
