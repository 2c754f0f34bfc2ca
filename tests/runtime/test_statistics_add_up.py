"""Statistics leave nothing out: the seconds add up to what the caller waits, within 3 %."""

import time
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

import bsjax
from bsjax.runtime import batch
from bsjax.runtime.results import Stats

SHARE = 0.97
PARTS = [
    field.name
    for field in fields(Stats)
    if field.name.endswith("_seconds")
    and field.name not in ("first_token_seconds", "decode_seconds")
]

pytestmark = pytest.mark.slow


def asked(images, question):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def parts_of(stats):
    return {part: getattr(stats, part) for part in PARTS}


def check_first_token(stats):
    """The parts add up to the time to the first token."""
    assert sum(parts_of(stats).values()) == pytest.approx(stats.first_token_seconds, rel=1e-6)


def check_shares(shares):
    # The machine may do something else between two parts.
    assert max(shares) > SHARE and max(shares) <= 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    paths = []
    for number in range(3):
        pixels = random.integers(0, 256, (200, 300, 3), np.uint8)
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_of_one_conversation(tiny_checkpoint, files):
    model = bsjax.load(tiny_checkpoint)
    shares = []
    for number in range(6):
        began = time.perf_counter()
        stats = bsjax.generate(model, asked(files, "Which?"), max_new_tokens=1).stats
        waited = time.perf_counter() - began
        check_first_token(stats)
        seconds = parts_of(stats)
        compiling = seconds.pop("compile_seconds")
        assert min(seconds.values()) > 0 and (compiling > 0) == (number == 0)
        shares.append(stats.first_token_seconds / waited)
    assert shares[0] > SHARE
    check_shares(shares[1:])


def test_of_a_stream(tiny_model, files):
    """The first piece of text comes when the statistics say."""
    shares = []
    for _ in range(4):
        times = []
        began = time.perf_counter()
        stats = bsjax.generate(
            tiny_model,
            asked(files, "Which?"),
            max_new_tokens=3,
            stream=lambda piece, token, times=times: times.append(time.perf_counter()),
        ).stats
        check_first_token(stats)
        assert len(times) == 3 and stats.decode_seconds > 0
        shares.append(stats.first_token_seconds / (times[0] - began))
    check_shares(shares)


def test_of_the_turns_of_a_session(tiny_model):
    """A first turn, and one that follows with another image."""
    shares = {"first": [], "second": []}
    # So large that what comes after the first token, such as freeing memory, is less than 3 %.
    images = np.random.default_rng(0).integers(0, 256, (2, 500, 700, 3), np.uint8)
    for _ in range(4):
        session = bsjax.Session(tiny_model, max_tokens=2048)
        messages = asked(images[:1], "Which?")
        for turn, of_turn in shares.items():
            began = time.perf_counter()
            answer = session.generate(messages, max_new_tokens=1)
            waited = time.perf_counter() - began
            check_first_token(answer.stats)
            assert (answer.stats.reused_tokens > 0) == (turn == "second")
            of_turn.append(answer.stats.first_token_seconds / waited)
            messages.append({"role": "assistant", "content": answer.text})
            messages += asked(images[1:], "And this one?")
    for of_turn in shares.values():
        check_shares(of_turn)


def answered(model, conversations, one_by_one):
    """The statistics of a batch, how long it took, and when it had its answers."""
    options = {"max_new_tokens": 6}
    began = time.perf_counter()
    if not one_by_one:
        results = bsjax.generate(model, conversations, **options)
        return [result.stats for result in results], time.perf_counter() - began
    results, waited = [], 0.0
    for _, result in bsjax.generate_iter(model, conversations, **options):
        waited += time.perf_counter() - began
        results.append(result)
        time.sleep(0.01)  # What the caller does is in no part.
        began = time.perf_counter()
    return [result.stats for result in results], waited + time.perf_counter() - began


@pytest.mark.parametrize("one_by_one", [False, True])
def test_of_a_batch(tiny_model, files, monkeypatch, one_by_one):
    """The shares of all answers add up to the time of the batch, decoding included.

    Some prompts begin alike, and there are more prompts than sequences.
    """
    monkeypatch.setattr(batch, "most_sequences", lambda: 4)
    conversations = [asked(files, f"Which of these? {number}") for number in range(3)]
    conversations += [asked(files[number % 2 :], str(number)) for number in range(3)]
    shares = []
    for _ in range(4):
        statistics, waited = answered(tiny_model, conversations, one_by_one)
        assert any(stats.reused_tokens for stats in statistics)
        for stats in statistics:
            seconds = parts_of(stats)
            assert min(seconds.values()) >= 0 and stats.decode_seconds > 0
            # It also waits for others.
            assert sum(seconds.values()) < stats.first_token_seconds
        whole = sum(sum(parts_of(stats).values()) + stats.decode_seconds for stats in statistics)
        shares.append(whole / waited)
    check_shares(shares)
