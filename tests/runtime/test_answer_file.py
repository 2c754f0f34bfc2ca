"""A file of answers holds whole lines, whatever happens while it is written."""

import json
import os
from pathlib import Path

import pytest

from bsjax import GenerationError
from bsjax.runtime.answer_file import AnswerFile

MADE_WITH = {"input SHA-256": "ab", "temperature": 0.7, "stop": ["."], "profile": None}
IDS = {1: None, 3: "drei", 4: None}
OUTCOMES = {3: {"text": "größer\n"}, 1: {"error": "no image"}, 4: {"text": ""}}


def write(path: Path) -> list[int]:
    """Writes what is not in the file yet. Returns the lines that it wrote."""
    with AnswerFile(path, MADE_WITH, IDS) as file:
        file.resume()
        file.begin()
        left = [number for number in OUTCOMES if number not in file.done]
        for number in left:
            file.add(number, OUTCOMES[number])
        assert file.done == {3: False, 1: True, 4: False}
    return left


def test_one_object_per_line(tmp_path):
    assert write(tmp_path / "out") == [3, 1, 4]
    header, *lines = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert header == {"bsjax_batch": 1, "made_with": MADE_WITH}
    assert lines == [
        {"line": 3, "id": "drei", "text": "größer\n"},
        {"line": 1, "error": "no image"},
        {"line": 4, "text": ""},
    ]


def test_a_file_that_was_cut_anywhere_becomes_whole_again(tmp_path):
    path = tmp_path / "out"
    write(path)
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = max(sum(end <= cut for end in ends) - 1, 0)
        assert write(path) == [3, 1, 4][kept:]
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.8}, "made with temperature = 0.7, but this run has 0.8"),
        ({"stop": []}, r"made with stop = \['.'\]"),
        ({"profile": "SHA-256 00"}, "made with profile = None"),
        ({"more": 1}, "made with more = None"),
    ],
)
def test_other_conditions_are_refused_once_there_are_answers(tmp_path, change, words):
    path = tmp_path / "out"
    write(path)
    whole = path.read_bytes()
    other = AnswerFile(path, MADE_WITH | change, IDS)
    with pytest.raises(GenerationError, match=words):
        other.resume()
    assert path.read_bytes() == whole
    # A file without answers, as a run that failed at once leaves it, is anyone's.
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    with other:
        other.resume()
        other.begin()
    assert json.loads(path.read_bytes())["made_with"] == MADE_WITH | change


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"line": 3, "id": "drei", "text": ""}', "line 5, is damaged: it answers line 3 .* again"),
        ('{"line": 2, "text": ""}', "line 5, is damaged: it answers no line"),
        ('{"line": true, "text": ""}', "line 5, is damaged: it answers no line"),
        ("[]", "line 5, is damaged: it answers no line"),
        ('{"line": 4, "te', "line 5 is not JSON"),
    ],
)
def test_damaged_lines_are_refused(tmp_path, line, words):
    path = tmp_path / "out"
    write(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(GenerationError, match=words):
        AnswerFile(path, MADE_WITH, IDS).resume()


@pytest.mark.parametrize("record", [{"id": "zwei", "text": ""}, {"id": "drei"}, {"text": ""}])
def test_answers_to_other_conversations_are_refused(tmp_path, record):
    path = tmp_path / "out"
    write(path)
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({"line": 3, **record})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(GenerationError, match="line 2, is damaged: it is no answer to line 3"):
        AnswerFile(path, MADE_WITH, IDS).resume()


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "out"
    second = AnswerFile(path, MADE_WITH, IDS)
    second.resume()  # There is no file yet.
    with AnswerFile(path, MADE_WITH, IDS) as first:
        first.begin()
        for attempt in (second.begin, second.resume):
            with pytest.raises(GenerationError, match="Another process is writing"):
                attempt()
        first.add(3, OUTCOMES[3])
    with second:
        # It was made, and filled in part, since.
        second.begin()
        assert second.done == {3: False}


def test_a_full_disk_leaves_whole_lines(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "out"
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerFile(path, MADE_WITH, IDS) as file:
        file.begin()
        file.add(3, OUTCOMES[3])
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, hard))
        try:
            with pytest.raises(OSError, match=f"{path}"):
                file.add(1, OUTCOMES[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
    assert write(path) == [1, 4]


def test_answers_reach_the_disk(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def spy(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    path = tmp_path / "out"
    with AnswerFile(path, MADE_WITH, IDS) as file:
        file.begin()
        begun = len(synced)
        file.add(3, OUTCOMES[3])
        assert len(synced) == begun
        now[0] += 2
        file.add(1, OUTCOMES[1])
        assert synced[begun:] == [path.stat().st_size]
        file.add(4, OUTCOMES[4])
    assert synced[-1] == path.stat().st_size
