"""Scores are transformers' log-softmax at the tokens of the answer, whatever the chunks."""

import numpy as np
import pytest
from PIL import Image

import bsjax
from bsjax import CapacityError, GenerationError, MessageError, Profile, Score
from bsjax.runtime.chunks import CacheLayout, PlacedPrompt
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.prefill import SCORED_ROWS
from bsjax.runtime.programs import programs_of
from bsjax.runtime.scoring import AnswerScoring
from bsjax.runtime.sizes import Sizes, cache_rows
from convert.conversion import convert_checkpoint
from tests.support import convert_sources as sources
from tests.support.parity import torch
from tests.support.small_models import reference_inputs

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "gemma3", "gemma3_text")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A random model of a family and its reference, made when they are first asked for."""
    import transformers

    made = {}

    def pair(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            source = sources.write_source(folder / "hf", family, tied=True, layers=4)
            convert_checkpoint(source, folder / "ours", dtype="float32")
            create = (
                transformers.AutoModelForCausalLM
                if family == "gemma3_text"
                else transformers.AutoModelForImageTextToText
            )
            reference = create.from_pretrained(source, dtype=torch.float32).eval()
            made[family] = bsjax.load(folder / "ours", "float32"), reference
        return made[family]

    return pair


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def question(images: int = 0, words: str = " word3 word4 word5"):
    parts = [{"type": "image", "image": picture(seed)} for seed in range(images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]


def answered(asked, answer: str):
    return [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def words(count: int, seed: int = 0) -> str:
    numbers = np.random.default_rng(seed).integers(1, 250, count)
    return "".join(f" word{number}" for number in numbers)


def expected(model, reference, messages, first):
    """Log-probabilities of the tokens from `first` on, and whether each is the likeliest one."""
    prompt = model.prompt(messages, continue_final_message=True)
    with torch.no_grad():
        logits = reference(**reference_inputs(reference, prompt)).logits[0]
    logits = torch.tensor(model.family.reference_logits(logits.numpy(), model.config))
    rows = torch.log_softmax(logits.double(), dim=-1).numpy()[first - 1 : -1]
    token_ids = prompt.token_ids[first:]
    assert rows.shape[0] == token_ids.size
    return rows[np.arange(token_ids.size), token_ids], rows.argmax(axis=1) == token_ids


def assert_scores(score, model, reference, messages):
    prompt = model.prompt(messages, continue_final_message=True)
    scores, likeliest = expected(model, reference, messages, score.prompt_tokens)
    assert score.token_ids == tuple(prompt.token_ids[score.prompt_tokens :].tolist())
    np.testing.assert_allclose(score.log_probabilities, scores, atol=1e-4 * np.abs(scores).max())
    assert score.log_probability == pytest.approx(scores.sum(), rel=1e-4)
    assert score.is_greedy == likeliest.all()


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers(pairs, family):
    model, reference = pairs(family)
    asked = question(images=0 if family == "gemma3_text" else 2)
    messages = answered(asked, words(7))
    score = bsjax.score(model, messages)
    assert len(score.token_ids) == 7
    assert score.prompt_tokens == model.prompt(asked).token_ids.size
    assert_scores(score, model, reference, messages)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
@pytest.mark.parametrize("chunks", [(16, 32), (256,)], ids=str)
def test_scores_do_not_depend_on_chunks(pairs, family, chunks, monkeypatch):
    """The answer is in many chunks, or all of its rows are in one: more than run at a time."""
    model, reference = pairs(family)
    messages = answered(question(images=2), words(SCORED_ROWS + 30, seed=1))
    sizes = Sizes(chunks, (64, 128))
    for module in ("prefill", "scoring", "images"):
        monkeypatch.setattr(f"bsjax.runtime.{module}.sizes_in_use", lambda: sizes)
    assert_scores(bsjax.score(model, messages), model, reference, messages)


@pytest.mark.parity
def test_the_likeliest_token_is_greedy_and_others_are_not(pairs):
    model, reference = pairs("qwen2_vl")
    seen = set()
    for seed in range(4):
        asked = question(words=words(6, seed))
        with torch.no_grad():
            inputs = reference_inputs(reference, model.prompt(asked))
            ranked = reference(**inputs).logits[0, -1].argsort(descending=True).tolist()
        likeliest, other = (token for token in (ranked[0], ranked[1]))
        for token, is_greedy in ((likeliest, True), (other, False)):
            if token < 250:
                score = bsjax.score(model, answered(asked, f" word{token}"))
                assert (score.token_ids, score.is_greedy) == ((token,), is_greedy)
                seen.add(is_greedy)
    assert seen == {True, False}


@pytest.mark.parity
def test_sparse_heads_change_scores_as_in_the_reference(pairs):
    model, _ = pairs("qwen2_vl")
    messages = answered(question(images=3), words(5))
    profile = Profile.uniform("SINK", model)
    scores = {
        backend: np.array(
            bsjax.score(model, messages, profile=profile, backend=backend).log_probabilities
        )
        for backend in ("xla", "reference")
    }
    np.testing.assert_allclose(scores["xla"], scores["reference"], atol=1e-4)
    dense = np.array(bsjax.score(model, messages).log_probabilities)
    assert np.abs(dense - scores["xla"]).max() > 1e-3


def assert_same(scores, expected):
    for score, other in zip(scores, expected, strict=True):
        assert score.token_ids == other.token_ids and score.is_greedy == other.is_greedy
        np.testing.assert_allclose(score.log_probabilities, other.log_probabilities, atol=1e-5)


def test_a_batch_is_a_list_of_scores(tiny_model):
    asked = [{"role": "user", "content": "Is it a cat?"}]
    batch = [answered(asked, answer) for answer in ("yes", "no, a dog")]
    scores = bsjax.score(tiny_model, batch)
    assert_same(scores, [bsjax.score(tiny_model, messages) for messages in batch])
    assert all(type(score) is Score for score in scores)
    assert tiny_model.tokenizer.decode(scores[1].token_ids) == "no, a dog"
    with pytest.raises(MessageError, match=r"^conversations\[1\]: messages\[0\], the last"):
        bsjax.score(tiny_model, [batch[0], asked])


def test_no_logits_leave_the_device(tiny_model):
    messages = answered([{"role": "user", "content": "Is it a cat?"}], "yes")
    prompt, first = tiny_model.answered_prompt(messages, tiny_model.options(None, None, None))
    inputs = prepare_inputs(tiny_model.architecture, prompt, None, backend="xla")
    placed, layout = PlacedPrompt(inputs), CacheLayout(cache_rows(inputs.tokens))
    scoring = AnswerScoring(programs_of(tiny_model), placed, first, layout, "xla")
    for stage in scoring.stages:
        results, _ = stage.program.output
        assert {result.shape for result in results} == {(SCORED_ROWS,)}


def test_sessions_and_batches_run_a_question_once_for_all_its_answers(tiny_model, monkeypatch):
    asked = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture(0)},
                {"type": "text", "text": "Is it a cat or a dog?"},
            ],
        },
    ]
    answers = [answered(asked, answer) for answer in ("a cat", "a dog", "a cat", "neither of them")]
    plain = [bsjax.score(tiny_model, messages) for messages in answers]
    ran = []
    original = AnswerScoring.__init__

    def recording(self, programs, prompt, *arguments):
        ran.append(prompt.end - prompt.reuse.start)
        original(self, programs, prompt, *arguments)

    monkeypatch.setattr(AnswerScoring, "__init__", recording)
    session = bsjax.Session(tiny_model, max_tokens=512)
    scores = [session.score(messages) for messages in answers]
    assert_same(scores, plain)
    assert ran[0] == session.tokens - len(scores[3].token_ids) + len(scores[0].token_ids)
    # The last token of the question runs again, because it predicts the first of the answer.
    assert ran[1:] == [1 + len(score.token_ids) for score in scores[1:]]
    by_session, ran[:] = ran[:], []
    assert_same(bsjax.score(tiny_model, answers), plain)
    assert ran == by_session
    assert session.generate(asked, max_new_tokens=3).token_ids == (
        bsjax.generate(tiny_model, asked, max_new_tokens=3).token_ids
    )
    with pytest.raises(CapacityError, match="room for 512"):
        session.score(answered(asked, "a " * 600))


def test_bad_calls_are_refused(tiny_model, monkeypatch, annotations_unchecked):
    messages = answered([{"role": "user", "content": "Is it?"}], "yes")
    with pytest.raises(GenerationError, match=r"bsjax\.load"):
        bsjax.score("some/folder", messages)
    with pytest.raises(MessageError, match="max_pixels must be at least 1"):
        bsjax.score(tiny_model, messages, max_pixels=0)
    monkeypatch.setattr("bsjax.runtime.kept_cache.bytes_available", lambda *_: 2**20)
    with pytest.raises(CapacityError, match="memory"):
        bsjax.score(tiny_model, messages)


def test_rows_of_logits_have_their_tokens(tiny_model):
    messages = answered(
        [{"role": "user", "content": [{"type": "image", "image": picture(0)}]}], "a cat"
    )
    prompt = tiny_model.prompt(messages, continue_final_message=True)
    logits, token_ids = bsjax.forward(
        tiny_model, messages, return_token_ids=True, continue_final_message=True
    )
    np.testing.assert_array_equal(token_ids, prompt.token_ids)
    assert logits.shape[0] == token_ids.size
    (pair,) = bsjax.forward(
        tiny_model, [messages], return_token_ids=True, continue_final_message=True
    )
    np.testing.assert_array_equal(pair[1], prompt.token_ids)
    session = bsjax.Session(tiny_model, max_tokens=512)
    session.score(messages)
    rows, first, of_rows = session.forward(
        messages, return_token_ids=True, continue_final_message=True
    )
    assert first > 0 and rows.shape[0] == of_rows.size
    np.testing.assert_array_equal(of_rows, prompt.token_ids[first:])
    assert len(session.forward(messages)) == 2


def test_answers_continue_the_last_message(tiny_model):
    asked = [{"role": "user", "content": "Count to ten."}]
    whole = bsjax.generate(tiny_model, asked, max_new_tokens=12)
    half = tiny_model.tokenizer.decode(whole.token_ids[:6])
    begun = answered(asked, half)
    prompt = tiny_model.prompt(begun, continue_final_message=True)
    again = tuple(prompt.token_ids[-6:].tolist()) == whole.token_ids[:6]
    assert again, "these tokens are what their text is tokenized to"
    options = {"max_new_tokens": 6, "continue_final_message": True}
    rest = bsjax.generate(tiny_model, begun, **options)
    assert rest.token_ids == whole.token_ids[6:]
    assert "".join(bsjax.stream(tiny_model, begun, **options)) == rest.text
    session = bsjax.Session(tiny_model)
    session.generate(asked, max_new_tokens=6)
    continued = session.generate(begun, **options)
    assert continued.token_ids == rest.token_ids
    assert continued.stats.reused_tokens == prompt.token_ids.size - 1
    assert "".join(session.stream(begun, **options)) == rest.text
    with pytest.raises(MessageError, match="the last message, has the role 'user'"):
        bsjax.generate(tiny_model, asked, continue_final_message=True)
