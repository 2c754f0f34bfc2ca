"""Conversations that run together are answered as each of them alone."""

import threading

import numpy as np
import pytest

import bsjax
from bsjax import CapacityError, GenerationError, MessageError, Profile
from bsjax.runtime import batch
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.memory import check_memory
from bsjax.runtime.programs import programs_of
from bsjax.runtime.shared_prefixes import common_tokens, shared_prefixes
from tests.support.messages import asked

WORDS = " Which of these pictures is brighter, and why?".split()


@pytest.fixture
def loaded(request, tiny_model):
    name, category = request.param
    if name == "gemma3":
        model, words = request.getfixturevalue("gemma3"), [f"word{n}" for n in range(3, 9)]
    else:
        model, words = tiny_model, WORDS
    return model, words, category and Profile.uniform(category, model)


def models_and_profiles(*ids):
    # The random Gemma 3 is made with torch.
    return pytest.mark.parametrize(
        "loaded",
        [
            pytest.param(
                (name, category or None),
                id="-".join(filter(None, (name, category))),
                marks=pytest.mark.parity if name == "gemma3" else (),
            )
            for name, _, category in (each.partition("-") for each in ids)
        ],
        indirect=True,
    )


THREE = models_and_profiles("qwen2_5_vl", "qwen2_5_vl-INTRA_IMAGE_SINK", "gemma3-INTRA_IMAGE_SINK")
TWO = models_and_profiles("qwen2_5_vl-INTRA_IMAGE_SINK", "gemma3")


def picture(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    height, width = generator.integers(30, 120, 2)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def random_conversation(generator, words) -> list:
    """Some text and up to three images, in any order."""
    parts = [" ".join(generator.choice(words, generator.integers(1, 12)))]
    for _ in range(generator.integers(0, 4)):
        parts.insert(generator.integers(0, len(parts) + 1), picture(generator.integers(0, 99)))
    return asked(*parts)


def outcome(result):
    return result.token_ids, result.text, result.finish_reason, result.prompt_tokens


def scores_of(result):
    return np.asarray([each.log_probability for each in result.log_probabilities])


@pytest.mark.slow
@THREE
def test_a_batch_is_answered_as_single_calls(loaded):
    """In any order, with any neighbours, greedy and drawn, with fewer sequences than prompts."""
    model, words, profile = loaded
    generator = np.random.default_rng(5)
    conversations = [random_conversation(generator, words) for _ in range(6)]
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    for options in ({}, drawn) if profile else (drawn,):
        options |= {"profile": profile, "max_new_tokens": 9, "log_probabilities": 3}
        alone = [bsjax.generate(model, each, **options) for each in conversations]
        together = bsjax.generate(model, conversations, **options)
        assert list(map(outcome, together)) == list(map(outcome, alone))
        for ours, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(scores_of(ours), scores_of(expected), rtol=1e-4, atol=1e-5)
            for one, other in zip(ours.log_probabilities, expected.log_probabilities, strict=True):
                assert [token for token, _ in one.top] == [token for token, _ in other.top]
        if "seed" not in options:
            continue
        order = generator.permutation(6)[:4]
        some = bsjax.generate(model, [conversations[index] for index in order], **options)
        assert list(map(outcome, some)) == [outcome(alone[index]) for index in order]


@pytest.mark.slow
@TWO
def test_sequences_are_used_again(loaded, monkeypatch):
    """More prompts than sequences, and answers of unequal lengths."""
    model, words, profile = loaded
    monkeypatch.setattr(batch, "most_sequences", lambda: 4)
    generator = np.random.default_rng(8)
    conversations = [random_conversation(generator, words) for _ in range(9)]
    options = {"profile": profile, "max_new_tokens": 20, "temperature": 1.5}
    # Answers end at a letter that comes sooner or later.
    options["stop"] = "e" if words is WORDS else "5"
    alone = [bsjax.generate(model, each, **options) for each in conversations]
    assert len({len(result.token_ids) for result in alone}) > 3
    found = dict(bsjax.generate_iter(model, iter(conversations), **options))
    assert [outcome(found[number]) for number in range(9)] == list(map(outcome, alone))


@pytest.mark.slow
@TWO
def test_what_prompts_begin_with_runs_once(loaded):
    model, words, profile = loaded
    document = [
        " ".join(words * 3),
        picture(1),
        " ".join(words * 2),
        picture(2),
        " ".join(words * 15),
    ]
    other = [" ".join(words * 3), picture(3), " ".join(words * 25), picture(4)]
    conversations = [
        asked(*(document if number % 3 else other), f"{words[number % 5]} {number}")
        for number in range(10)
    ]
    options = {"profile": profile, "max_new_tokens": 6}
    alone = [bsjax.generate(model, each, **options) for each in conversations]
    together = bsjax.generate(model, conversations, **options)
    assert list(map(outcome, together)) == list(map(outcome, alone))
    reused = [result.stats.reused_tokens for result in together]
    # The first to use a prefix has it in its statistics.
    assert sorted(reused)[:2] == [0, 0] and min(sorted(reused)[2:]) > 64
    assert len(set(reused)) == 3
    for result, single in zip(together, alone, strict=True):
        whole, part = single.stats.attention_flops_dense, result.stats.attention_flops_dense
        assert part == whole if not result.stats.reused_tokens else part < whole


@pytest.mark.slow
def test_n_answers_share_their_prompt(tiny_model):
    options = {"temperature": 1.2, "max_new_tokens": 5, "seed": 3}
    conversation = asked(picture(0), picture(1), "Why? " * 60)
    several = bsjax.generate(tiny_model, conversation, n=4, **options)
    for copy, result in enumerate(several):
        alone = bsjax.generate(tiny_model, conversation, **(options | {"seed": 3 + copy}))
        assert outcome(result) == outcome(alone)
    assert len({result.token_ids for result in several}) > 1
    tokens = several[0].prompt_tokens
    assert sorted(result.stats.reused_tokens for result in several) == [0] + 3 * [tokens - 1]
    batch_of_two = bsjax.generate(tiny_model, [asked("Why?"), conversation], n=4, **options)
    assert list(map(outcome, batch_of_two[1])) == list(map(outcome, several))
    assert bsjax.generate(tiny_model, asked("Why?"), n=1)[0].text


def test_bad_conversations_are_named_or_returned(tiny_model, annotations_unchecked):
    limit = tiny_model.config.text_config.max_position_embeddings
    bad_form = [{"role": "user"}]
    bad_image = asked(np.zeros((4, 4), np.uint8) + np.nan, "Why?")
    too_long = asked("word " * limit)
    good = asked("Why?")
    for bad, error in (
        (bad_form, MessageError),
        (bad_image, MessageError),
        (too_long, CapacityError),
        ("Why?", MessageError),
        ([], MessageError),
    ):
        for number, conversations in enumerate(([bad, good], [good, bad])):
            with pytest.raises(error, match=rf"^conversations\[{number}\]: "):
                bsjax.generate(tiny_model, conversations, max_new_tokens=2)
    outcomes = bsjax.generate(
        tiny_model, [bad_image, good, bad_form, too_long], max_new_tokens=2, return_errors=True
    )
    kinds = [MessageError, bsjax.Result, MessageError, CapacityError]
    assert list(map(type, outcomes)) == kinds
    assert str(outcomes[3]).startswith("conversations[3]: ")
    assert outcome(outcomes[1]) == outcome(bsjax.generate(tiny_model, good, max_new_tokens=2))
    found = dict(
        bsjax.generate_iter(tiny_model, [bad_form, good], max_new_tokens=2, return_errors=True)
    )
    assert list(map(type, (found[0], found[1]))) == [MessageError, bsjax.Result]
    with pytest.raises(MessageError, match=r"^conversations\[0\]: "):
        list(bsjax.generate_iter(tiny_model, [bad_form, good], max_new_tokens=2))


def test_bad_arguments_of_batches_are_refused(tiny_model, annotations_unchecked):
    good = asked("Why?")
    for options, message in (
        ({"n": 0}, "n must be"),
        ({"n": 2}, "without a temperature"),
        ({"n": 2, "temperature": 1.0, "seed": 2**32 - 1}, "seeds must be below"),
        ({"n": 1, "stream": print}, "stream needs"),
        ({"log_probabilities": 21}, "log_probabilities must be"),
        ({"log_probabilities": True}, "log_probabilities must be"),
        ({"return_errors": "yes"}, "return_errors must be"),
    ):
        with pytest.raises(GenerationError, match=message):
            bsjax.generate(tiny_model, good, **options)
    for conversations in (None, 3, "Why?", {"role": "user"}):
        with pytest.raises(GenerationError, match="conversations must be an iterable"):
            bsjax.generate_iter(tiny_model, conversations)
    assert list(bsjax.generate_iter(tiny_model, [])) == []


def test_what_does_not_fit_together_runs_in_fewer_sequences(tiny_model, monkeypatch):
    conversations = [asked(f"Why {number}?") for number in range(4)]
    expected = bsjax.generate(tiny_model, conversations, max_new_tokens=2)
    layouts = []
    original = batch.Decoding.__init__

    def recording(self, programs, layout, *arguments):
        layouts.append(layout.sequences)
        original(self, programs, layout, *arguments)

    monkeypatch.setattr(batch.Decoding, "__init__", recording)
    available = 60 * 2**20
    monkeypatch.setattr(batch, "bytes_available", lambda *_: available)
    fewer = bsjax.generate(tiny_model, conversations, max_new_tokens=2)
    assert list(map(outcome, fewer)) == list(map(outcome, expected))
    assert layouts[-1] == 2
    available = 2**10
    outcomes = bsjax.generate(tiny_model, conversations, max_new_tokens=2, return_errors=True)
    assert {type(each) for each in outcomes} == {CapacityError}


def test_common_tokens_end_before_images_that_differ(tiny_model):
    def inputs(*parts):
        prompt = tiny_model.prompt(asked(*parts))
        return prepare_inputs(tiny_model.architecture, prompt, None, backend="xla")

    base = inputs("Look: ", picture(1), "Why?" * 40, picture(2), "So?")
    same = inputs("Look: ", picture(1), "Why?" * 40, picture(2), "No?")
    differs = inputs("Look: ", picture(1), "Why?" * 40, picture(3), "So?")
    first, second = base.template.image_first.tolist()
    assert common_tokens(base, same) > second + base.template.image_tokens[1]
    assert common_tokens(base, differs) == second
    assert common_tokens(base, inputs("Look: ", picture(2), "Why?")) == first
    assert common_tokens(base, base) == base.tokens - 1
    (shared,) = shared_prefixes([same, inputs("No."), base, base, base, differs, same, same])
    assert shared.members == (0, 2, 3, 4, 5, 6, 7)
    assert shared.tokens == common_tokens(base, differs)


@pytest.mark.slow
def test_what_does_not_fit_beside_others_runs_alone(tiny_model, monkeypatch):
    """Its neighbours are answered, and so is it if it fits alone."""
    large = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    conversations = [asked(f"Why {number}?") for number in range(4)]
    conversations.insert(1, asked(large, "Why?"))
    expected = bsjax.generate(tiny_model, conversations, max_new_tokens=2)
    peaks = []

    def recording(inputs, stages, available, *others):
        of_vision = [stage.peak for stage in stages if stage.name == "vision"]
        peaks.extend([max(of_vision)] if of_vision else [])
        check_memory(inputs, stages, available)

    monkeypatch.setattr(batch, "check_memory", recording)
    bsjax.generate(tiny_model, conversations[1:2], max_new_tokens=2)
    alone = max(peaks)
    monkeypatch.setattr(batch, "bytes_available", lambda *_: alone)
    outcomes = bsjax.generate(tiny_model, conversations, max_new_tokens=2)
    assert list(map(outcome, outcomes)) == list(map(outcome, expected))
    assert max(peaks) > alone == peaks[-1], "refused beside the others, it ran alone"
    monkeypatch.setattr(batch, "bytes_available", lambda *_: alone - 1)
    outcomes = bsjax.generate(tiny_model, conversations, max_new_tokens=2, return_errors=True)
    assert [type(each) for each in outcomes] == [
        CapacityError if number == 1 else bsjax.Result for number in range(5)
    ]


def test_returned_errors_keep_nothing_alive(tiny_model):
    outcomes = bsjax.generate(
        tiny_model, [[{"role": "user"}], asked("Why?")], max_new_tokens=2, return_errors=True
    )
    error = outcomes[0]
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


@pytest.mark.slow
def test_a_long_prefix_is_found_beside_a_short_one(tiny_model, monkeypatch):
    """Conversations that come later are compared with each other as well."""
    monkeypatch.setattr(batch, "most_sequences", lambda: 4)
    system = "Be brief, and look at everything. " * 5
    short = [asked(f"{system}{number} Why?") for number in range(12)]
    long = [asked(system + "A story. " * 80, f"{number} What?") for number in range(8)]
    conversations = [*short, *long]
    results = bsjax.generate(tiny_model, conversations, max_new_tokens=2)
    assert all(result.stats.reused_tokens > 0 for result in results[1:12])
    assert sum(result.stats.reused_tokens > 500 for result in results[12:]) >= 6
    alone = bsjax.generate(tiny_model, conversations[-1], max_new_tokens=2)
    assert outcome(results[-1]) == outcome(alone)


def test_what_others_compile_is_in_no_answer(tiny_model):
    """Neither what the caller compiles between two answers or tokens, nor another thread."""
    programs, sizes = programs_of(tiny_model), iter(range(1, 9))

    def compile_another(*_):
        programs.get(twice, (np.zeros(next(sizes), np.float32),))

    conversations = [asked("Why? " * length) for length in (1, 2, 3)]

    def compiled():
        for _, result in bsjax.generate_iter(tiny_model, conversations, max_new_tokens=2):
            assert isinstance(result, bsjax.Result)
            yield result.stats.compiled_programs, result.stats.compile_seconds > 0

    list(compiled())
    bsjax.generate(tiny_model, conversations[0], max_new_tokens=2)
    before = programs.compilations
    for counted in compiled():
        assert counted == (0, False)
        compile_another()
        thread = threading.Thread(target=compile_another)
        thread.start()
        thread.join()
    result = bsjax.generate(tiny_model, conversations[0], max_new_tokens=2, stream=compile_another)
    assert (result.stats.compiled_programs, result.stats.compile_seconds) == (0, 0.0)
    assert programs.compilations == before + 8


def twice(module, values):
    return 2 * values
