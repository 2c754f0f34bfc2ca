"""A session answers as calls without one do, and computes only what its cache does not hold."""

import copy
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import bsjax
from bsjax import CapacityError, GenerationError, Profile, SessionError
from bsjax.runtime import session_file
from bsjax.runtime.programs import size_in_bytes
from bsjax.runtime.sizes import cache_rows
from tests.support.histories import History, picture
from tests.support.paths import ROOT

WORDS = "which picture is brighter than the first one and why not".split()
STEPS = int(os.environ.get("HISTORY_STEPS", "6"))
"""Steps of each random history. The long run: HISTORY_STEPS=200 pytest -k histories."""


@pytest.fixture
def loaded(request, tiny_model):
    name, category = request.param
    if name == "gemma3":
        model, words = request.getfixturevalue("gemma3"), [f" word{n}" for n in range(3, 9)]
    else:
        model, words = tiny_model, WORDS
    return model, words, category and Profile.uniform(category, model)


FAMILIES = pytest.mark.parametrize(
    "loaded",
    [
        # The random Gemma 3 is made with torch.
        pytest.param((name, category), id="-".join(filter(None, (name, category))), marks=marks)
        for name, marks in (("qwen2_5_vl", ()), ("gemma3", pytest.mark.parity))
        for category in (None, "INTRA_IMAGE_SINK")
    ],
    indirect=True,
)


def user(*parts):
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def assert_close(ours, expected):
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.slow
@FAMILIES
def test_random_histories_are_answered_as_by_plain_calls(loaded):
    model, words, profile = loaded
    random = np.random.default_rng(len(words))
    history = History(random, words)
    session = bsjax.Session(model, profile=profile, max_tokens=1024)
    # Of an answer of one token, nothing is in the cache, so that the next turn continues it.
    step = history.change(session.generate(history.messages, max_new_tokens=1).text, "ask")
    assert session.forward(history.messages)[1] > 0, "tokens are used again"
    for _ in range(STEPS):
        messages = history.messages
        new_tokens = int(random.choice([1, 5]))
        plain = bsjax.generate(model, messages, profile=profile, max_new_tokens=new_tokens)
        match random.integers(4):
            case 0:
                logits, first = session.forward(messages)
                expected = bsjax.forward(model, messages, profile=profile)
                assert first + len(logits) == len(expected)
                assert_close(logits, expected[first:])
            case 1:
                # Abandoned after some pieces.
                pieces = session.stream(messages, max_new_tokens=new_tokens)
                some = "".join(itertools.islice(pieces, int(random.integers(0, 4))))
                pieces.close()
                assert plain.text.startswith(some)
            case _:
                answer = session.generate(messages, max_new_tokens=new_tokens)
                assert answer.token_ids == plain.token_ids, step
        step = history.change(plain.text)
    logits, _ = session.forward(messages)
    assert_close(logits[-1:], bsjax.forward(model, messages, profile=profile)[-1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "loaded",
    [
        ("qwen2_5_vl", "INTRA_IMAGE_SINK"),
        pytest.param(("gemma3", None), marks=pytest.mark.parity),
    ],
    indirect=True,
)
def test_several_conversations_are_kept_apart(loaded):
    """Of three conversations in turn, a session with room for two drops one now and then."""
    model, words, profile = loaded
    random = np.random.default_rng(len(words) + 1)
    histories = [History(random, words, most_turns=3) for _ in range(3)]
    session = bsjax.Session(model, profile=profile, max_tokens=1024, conversations=2)
    for _ in range(STEPS):
        history = histories[random.choice(3, p=[0.5, 0.4, 0.1])]
        messages = history.messages
        plain = bsjax.generate(model, messages, profile=profile, max_new_tokens=3)
        answer = session.generate(messages, max_new_tokens=3)
        assert answer.token_ids == plain.token_ids
        history.change(plain.text)


def test_the_conversation_that_was_used_least_recently_is_dropped(tiny_model, tmp_path):
    session = bsjax.Session(tiny_model, max_tokens=512, conversations=2)
    first, second, third = ([user(picture(number), "Why? " * 5)] for number in (0, 1, 3))
    image_tokens = {}

    def reused(messages):
        result = session.generate(messages, max_new_tokens=2)
        image_tokens.setdefault(id(messages), result.prompt_tokens)
        return result.stats.reused_tokens

    before_images = reused(first) or reused(second)
    assert reused(first) == image_tokens[id(first)] - 1, "both are kept"
    assert reused(third) == before_images, "nothing but the template's beginning"
    assert reused(first) == image_tokens[id(first)] - 1
    session.save(tmp_path / "session")
    session = bsjax.Session.load(tmp_path / "session", tiny_model)
    assert reused(third) == image_tokens[id(third)] - 1, "both are saved"
    assert reused(second) == before_images, "it was dropped for the third"
    # A prompt that leaves a conversation before its last question leaves it as it is.
    longer = [*third, assistant("Because."), user("Oh?")]
    other = [*third, assistant("Why not."), user("Oh?")]
    assert reused(longer) == image_tokens[id(third)]
    assert image_tokens[id(third)] <= reused(other) < image_tokens[id(longer)] - 1
    assert reused(longer) == image_tokens[id(longer)] - 1
    session.clear()
    assert session.tokens == 0 and reused(longer) == 0


@FAMILIES
def test_a_follow_up_runs_only_what_is_new(loaded):
    model, words, profile = loaded
    session = bsjax.Session(model, profile=profile, max_tokens=1024)
    messages = [user(picture(0), picture(1), picture(3), " ".join(words))]
    first = session.generate(messages, max_new_tokens=1)
    assert first.stats.reused_tokens == 0 and session.tokens == first.prompt_tokens
    messages += [assistant(words[0]), user(picture(2), words[1])]
    second = session.generate(messages, max_new_tokens=6)
    plain = bsjax.generate(model, messages, profile=profile, max_new_tokens=6)
    assert second.token_ids == plain.token_ids
    assert second.stats.reused_tokens == first.prompt_tokens
    # The images of the first turn do not run again.
    assert second.stats.attention_flops_dense < plain.stats.attention_flops_dense
    assert second.stats.image_tokens == plain.stats.image_tokens
    assert second.prompt_tokens == plain.prompt_tokens
    assert session.tokens == second.prompt_tokens + 5


@FAMILIES
def test_the_same_prompt_again_runs_its_last_token(loaded):
    model, words, profile = loaded
    session = bsjax.Session(model, profile=profile, max_tokens=1024)
    messages = [user(picture(0), picture(1), " ".join(words))]
    first = session.generate(messages, max_new_tokens=4)
    again = session.generate(messages, max_new_tokens=4)
    assert again.token_ids == first.token_ids
    # Gemma 3's window of 12 tokens has moved on.
    moved_on = model.config.model_type == "gemma3"
    assert again.stats.reused_tokens == (0 if moved_on else first.prompt_tokens - 1)


def test_an_image_with_other_pixels_is_another_image(tiny_model):
    session = bsjax.Session(tiny_model)
    first = [user("See:", picture(0), picture(1), "Which is brighter?")]
    other = [user("See:", picture(0), picture(5), "Which is brighter?")]
    session.generate(first, max_new_tokens=2)
    answer = session.generate(other, max_new_tokens=6)
    template = tiny_model.family.template(tiny_model.prompt(other), tiny_model.config, None)
    assert answer.stats.reused_tokens == template.image_first[1]
    assert answer.token_ids == bsjax.generate(tiny_model, other, max_new_tokens=6).token_ids


def test_a_session_refuses_what_does_not_fit_and_keeps_what_it_has(tiny_model):
    session = bsjax.Session(tiny_model, max_tokens=64)
    messages = [user(picture(2), "Why?")]
    first = session.generate(messages, max_new_tokens=2)
    held = session.tokens
    with pytest.raises(CapacityError, match="room for 64: raise its max_tokens"):
        session.generate([user(picture(2), "Why? " * 60)])
    with pytest.raises(bsjax.MessageError):
        session.generate([{"role": "user", "content": [{"type": "image", "image": "missing.png"}]}])
    assert session.tokens == held
    assert session.generate(messages, max_new_tokens=2).stats.reused_tokens > 0
    assert session.generate(messages, max_new_tokens=2).token_ids == first.token_ids
    session.clear()
    assert session.tokens == 0
    assert session.generate(messages, max_new_tokens=2).stats.reused_tokens == 0


def test_one_call_at_a_time(tiny_model):
    session = bsjax.Session(tiny_model)
    pieces = session.stream([user("Why?")], max_new_tokens=8)
    next(pieces)
    with pytest.raises(GenerationError, match="close its stream"):
        session.generate([user("Why?")])
    pieces.close()
    session.generate([user("Why?")], max_new_tokens=2)


def test_a_call_that_fails_half_way_leaves_nothing(tiny_model, monkeypatch):
    session = bsjax.Session(tiny_model)
    messages = [user(picture(0), "Why?")]
    session.generate(messages, max_new_tokens=2)

    def fail(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("bsjax.runtime.decoding.Decoding.run", fail)
        session.generate([user(picture(0), "Why not?")], max_new_tokens=3)
    answer = session.generate([user(picture(0), "Why not?")], max_new_tokens=3)
    plain = bsjax.generate(tiny_model, [user(picture(0), "Why not?")], max_new_tokens=3)
    assert answer.token_ids == plain.token_ids


def test_an_interrupt_before_tokens_are_counted_leaves_nothing(tiny_model, monkeypatch):
    """The cache then holds tokens that the call does not know of."""
    session = bsjax.Session(tiny_model)

    def interrupt(chosen):
        raise KeyboardInterrupt

    pieces = session.stream([user("Why?")], max_new_tokens=9)
    next(pieces)
    monkeypatch.setattr("bsjax.runtime.generation.tokens_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    assert session.tokens == 0


def test_a_stream_function_that_fails_ends_the_call(tiny_model):
    session = bsjax.Session(tiny_model)
    messages = [user(picture(0), "Why?")]

    def fail(piece, token_id):
        raise ValueError("no more")

    # Whoever keeps the error, as an interactive interpreter does, keeps the frames of the call.
    with pytest.raises(ValueError, match="no more") as kept:
        session.generate(messages, max_new_tokens=4, stream=fail)
    answer = session.generate(messages, max_new_tokens=4)
    assert answer.token_ids == bsjax.generate(tiny_model, messages, max_new_tokens=4).token_ids
    assert kept.value is not None


@pytest.mark.slow
@pytest.mark.parity
def test_what_follows_an_image_token_in_an_answer_leaves_no_trace(gemma3):
    """It has taken rows of the window, but the conversation goes on without it."""
    image_token = gemma3.config.image_token_index
    messages = [user(" ".join(f"word{n}" for n in range(3, 30)))]
    for seed in range(400):
        session = bsjax.Session(gemma3, max_tokens=256)
        answer = session.generate(messages, max_new_tokens=12, temperature=20.0, seed=seed)
        if image_token in answer.token_ids[1:8]:
            break
    kept = answer.token_ids[: answer.token_ids.index(image_token)]
    said = " ".join(f"word{token}" for token in kept)
    messages += [assistant(f" {said}"), user(" word9 word7")]
    logits, first = session.forward(messages)
    assert_close(logits, bsjax.forward(gemma3, messages)[first:])


@pytest.mark.slow
@pytest.mark.parity
def test_a_turn_that_a_stop_text_ends_is_cheap_to_follow(gemma3):
    """Decoding goes on for some tokens, which take rows of the window of 12."""
    options = {"max_new_tokens": 60, "temperature": 20.0, "seed": 1}
    messages = [user(" ".join(f"word{n}" for n in range(3, 30)))]
    words = bsjax.generate(gemma3, messages, **options).text.split()
    assert len(words) == 60 and len(set(itertools.pairwise(words))) == 59
    # Words of the answer before the stop text; tokens of it that are used again.
    for before, kept in ((0, 0), (1, 0), (15, 0), (17, 16), (19, 16), (35, 32)):
        for stream in (None, lambda piece, token_id: None):
            stop = " ".join(words[before : before + 2])
            session = bsjax.Session(gemma3, max_tokens=256)
            first = session.generate(messages, stop=stop, stream=stream, **options)
            assert first.text.split() == words[:before]
            said = [*messages, assistant(f" {first.text}"), user(" word9 word7")]
            follow_up = session.generate(said, max_new_tokens=6)
            assert follow_up.token_ids == bsjax.generate(gemma3, said, max_new_tokens=6).token_ids
            assert follow_up.stats.reused_tokens == first.prompt_tokens + kept


def test_bad_arguments_of_sessions_are_refused(tiny_model, annotations_unchecked):
    limit = tiny_model.config.text_config.max_position_embeddings
    with pytest.raises(CapacityError, match=f"has {limit} positions. Lower it to {limit}"):
        bsjax.Session(tiny_model, max_tokens=limit + 1)
    for arguments in ({"max_tokens": 1}, {"max_tokens": 2.5}, {"max_tokens": None}):
        with pytest.raises(GenerationError, match="max_tokens"):
            bsjax.Session(tiny_model, **arguments)
    for conversations in (0, 1.5, True, None, 10**9):
        with pytest.raises(GenerationError, match="conversations must be"):
            bsjax.Session(tiny_model, conversations=conversations)
    with pytest.raises(GenerationError, match=r"bsjax\.load"):
        bsjax.Session("checkpoint")
    session = bsjax.Session(tiny_model)
    with pytest.raises(GenerationError, match="a session takes one conversation"):
        session.generate([[user("Why?")]])
    with pytest.raises(GenerationError, match="stream must be a function"):
        session.generate([user("Why?")], stream=3)


@FAMILIES
def test_moving_rows_counts_as_memory_and_a_refusal_leaves_the_cache(loaded, monkeypatch):
    model, words, profile = loaded
    session = bsjax.Session(model, profile=profile, max_tokens=1500)
    empty_cache = partial(model.module.language_model.empty_cache, cache_rows(1500))
    seen = []

    def check(inputs, stages, *_):
        seen.append([stage.name for stage in stages])
        moving = next((stage for stage in stages if stage.name == "moving kept rows"), None)
        if moving is not None and len(seen) == 3:
            # The cache is an argument, and is changed in place.
            assert moving.peak > size_in_bytes(jax.eval_shape(empty_cache))
            raise CapacityError("too little memory")

    monkeypatch.setattr("bsjax.runtime.generation.check_memory", check)
    messages = []
    for turn in range(3):
        messages += [user(picture(turn), words[0]), assistant(words[1])]
        if turn < 2:
            session.generate(messages[:-1], max_new_tokens=1)
    before = session.tokens
    # Two spans with images are in the cache. In front of a third, they become one.
    if profile is not None:
        with pytest.raises(CapacityError, match="too little memory"):
            session.generate(messages[:-1], max_new_tokens=4)
        assert session.tokens == before
    answer = session.generate(messages[:-1], max_new_tokens=4)
    assert ("moving kept rows" in seen[-1]) == (profile is not None)
    assert answer.stats.reused_tokens == before
    plain = bsjax.generate(model, messages[:-1], profile=profile, max_new_tokens=4)
    assert answer.token_ids == plain.token_ids


_EXIT = """
import sys
sys.modules["torch"] = None  # it takes seconds to import
from bsjax.cli.imports import import_jax
import_jax(devices=True)
import bsjax
from bsjax.runtime import kept_cache

model = bsjax.load(sys.argv[1])
messages = [{"role": "user", "content": "Why?"}]
session = bsjax.Session(model, max_tokens=256)
streams = [bsjax.stream(model, messages), session.stream(messages)]
batch = bsjax.generate_iter(model, [messages] * 3, max_new_tokens=4)
print([bool(next(each)) for each in (*streams, batch)])
def put(*_):
    raise RuntimeError("a real error")

kept_cache.KeptCache.put = put
"""


@pytest.mark.slow
def test_streams_that_are_open_when_the_interpreter_exits(tiny_checkpoint):
    """They end without a word, but an error while one of them ends is shown."""
    command = [sys.executable, "-c", _EXIT, str(tiny_checkpoint)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[True, True, True]\n")
    assert done.stderr.endswith("RuntimeError: a real error\n")
    assert done.stderr.count("Traceback") == 1


@FAMILIES
def test_a_saved_session_goes_on_in_another(loaded, tmp_path):
    model, words, profile = loaded
    session = bsjax.Session(model, profile=profile, max_tokens=512)
    messages = [user(picture(0), picture(1), " ".join(words))]
    first = session.generate(messages, max_new_tokens=1)
    path = tmp_path / "conversation.session"
    session.save(path)
    messages += [assistant(words[0]), user(picture(2), words[1])]
    expected = session.generate(messages, max_new_tokens=6)
    other = bsjax.Session.load(path, model, profile=profile)
    assert (other.max_tokens, other.tokens) == (512, first.prompt_tokens)
    answer = other.generate(messages, max_new_tokens=6)
    assert answer.token_ids == expected.token_ids
    assert answer.stats.reused_tokens == first.prompt_tokens
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o077 == 0, "others cannot read a conversation"


def test_files_that_are_not_of_this_session_are_refused(tiny_model, tmp_path):
    session = bsjax.Session(tiny_model, max_tokens=512)
    path = tmp_path / "session"
    session.save(path)
    assert bsjax.Session.load(path, tiny_model).tokens == 0
    session.generate([user(picture(2), "Why?")], max_new_tokens=2)
    session.save(path)
    whole = path.read_bytes()
    profile = Profile.uniform("sink", tiny_model)
    with pytest.raises(SessionError, match="saved with another profile"):
        bsjax.Session.load(path, tiny_model, profile=profile)
    other = dataclasses.replace(tiny_model, fingerprint="0" * 64)
    with pytest.raises(SessionError, match="saved with another checkpoint"):
        bsjax.Session.load(path, other)
    settings = copy.deepcopy(tiny_model.image_processor)
    settings.image_mean = [0.5, 0.5, 0.6]
    config = copy.deepcopy(tiny_model.config)
    config.text_config.rms_norm_eps = 1e-4
    for change in ({"image_processor": settings}, {"config": config}):
        with pytest.raises(SessionError, match="saved with another settings"):
            bsjax.Session.load(path, dataclasses.replace(tiny_model, **change))
    with pytest.raises(SessionError, match="There is no session file"):
        bsjax.Session.load(tmp_path / "missing", tiny_model)
    with pytest.raises(SessionError, match="cannot be written"):
        session.save(tmp_path / "missing" / "session")
    damaged = bytearray(whole)
    damaged[-5] ^= 1
    for content in (damaged, whole[:100], whole[:-1], b"", b"{}", whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(SessionError, match="damaged"):
            bsjax.Session.load(path, tiny_model)


@pytest.mark.slow
def test_a_session_in_16_bits_is_saved_exactly(tiny_checkpoint, tmp_path):
    model = bsjax.load(tiny_checkpoint, "bfloat16")
    session = bsjax.Session(model, max_tokens=512)
    session.generate([user(picture(2), "Why?")], max_new_tokens=2)
    session.save(tmp_path / "session")
    other = bsjax.Session.load(tmp_path / "session", model)
    other.save(tmp_path / "again")
    assert (tmp_path / "session").read_bytes() == (tmp_path / "again").read_bytes()


def test_session_files_that_were_made_by_hand_are_refused(tiny_model, tmp_path):
    """With a checksum that matches."""
    session = bsjax.Session(tiny_model, max_tokens=512)
    session.generate([user(picture(2), "Why?")], max_new_tokens=2)
    path = tmp_path / "session"
    session.save(path)
    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["bsjax"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def refused(described, *, of_session=None, **changed):
        changed = {f"0.{name}": value for name, value in changed.items()}
        own = {name: value for name, value in (arrays | changed).items() if value is not None}
        (conversation,) = header["session"]["conversations"]
        described = {"conversations": [conversation | described]} | (of_session or {})
        described = header["session"] | described
        digest = session_file.content_digest(own, described)
        content = json.dumps(header | {"session": described, "sha256": digest})
        save_file(own, path, metadata={"bsjax": content})
        with pytest.raises(SessionError, match="damaged|max_tokens|conversations"):
            bsjax.Session.load(path, tiny_model)

    for max_tokens in (-1, 10**30, "8", None, 3):
        refused({}, of_session={"max_tokens": max_tokens})
    for conversations in (None, [None], [{}, {}], {}, 3):
        refused({}, of_session={"conversations": conversations})
    for most in (0, 10**9, "1", None):
        refused({}, of_session={"most": most})
    for prompt_tokens in (0, -1, 10**6, "3", None, 1.0):
        refused({"prompt_tokens": prompt_tokens})
    for span_starts in ([], [1], [0, 0], [0, 10**6], [0, "1"], None, [[0]]):
        refused({"span_starts": span_starts})
    refused({"images": []})
    ids, cache = arrays["0.token_ids"], arrays["0.cache.0"]
    for changed in (ids[:-1], ids.astype(np.float32), ids[None], np.zeros(0, np.int32)):
        refused({}, token_ids=changed)
    for name in ("image", "sink", "cache.0", "cache.1"):
        refused({}, **{name: None})
        refused({}, **{name: arrays[f"0.{name}"][:1]})
    refused({}, **{"cache.0": np.ascontiguousarray(cache[..., 1:])})
    refused({}, image=np.full_like(arrays["0.image"], 7))


@pytest.mark.slow
@pytest.mark.parametrize("category", [None, "INTRA_IMAGE_SINK"])
def test_after_warmup_no_turn_compiles(tiny_model, category):
    profile = category and Profile.uniform(category, tiny_model)
    bsjax.warmup(tiny_model, profile=profile, max_tokens=1500)
    session = bsjax.Session(tiny_model, profile=profile, max_tokens=1500)
    messages = []
    for turn in range(24):
        messages.append(user(picture(turn), "Why?"))
        answer = session.generate(messages, max_new_tokens=2)
        # Not even the first turn, and the first one that moves rows.
        assert answer.stats.compiled_programs == 0, turn
        messages.append(assistant(" yes"))
    plain = bsjax.generate(tiny_model, messages[:-1], profile=profile, max_new_tokens=2)
    assert answer.token_ids == plain.token_ids
    assert answer.stats.reused_tokens > plain.prompt_tokens / 2
