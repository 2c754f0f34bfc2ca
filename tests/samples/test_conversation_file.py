"""Conversations of a file are read one by one, and only from the file that was checked."""

import hashlib
import json
import os

import pytest

from bsjax.errors import SampleError
from bsjax.samples.conversations import ConversationFile

LINES = [
    b'[{"role": "user", "content": "One?"}]\n',
    # More than is read ahead.
    b" " * 100_000 + b"\r\n",
    b'{"id": "b", "messages": [{"role": "user", "content": "Two?"}]}\r\n',
    b'{"id": 3, "messages": [{"role": "user", "content": "<image>"}], "images": ["a.png"]}',
]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"".join(LINES))
    (tmp_path / "a.png").write_bytes(b"")
    return tmp_path / "in.jsonl"


def test_lines_have_their_numbers_and_ids(path):
    with ConversationFile(path) as file:
        assert file.ids == {1: None, 3: "b", 4: 3}
        assert file.sha256 == hashlib.sha256(b"".join(LINES)).hexdigest()
        read = dict(file.messages([3, 4]))
    assert read[3] == [{"role": "user", "content": "Two?"}]
    image = {"type": "image", "image": str(path.parent / "a.png")}
    assert read[4] == [{"role": "user", "content": [image]}]


def test_a_line_that_changes_meanwhile_is_not_read(path):
    with ConversationFile(path) as file:
        conversations = file.messages([1, 3])
        assert next(conversations) == (1, [{"role": "user", "content": "One?"}])
        with path.open("r+b") as other:
            other.seek(len(LINES[0] + LINES[1]))
            other.write(LINES[2].replace(b"Two", b"Ten"))
        with pytest.raises(SampleError, match=r"in.jsonl, line 3 has changed while"):
            next(conversations)


def test_a_file_that_takes_its_name_is_not_read(path):
    with ConversationFile(path) as file:
        path.with_name("new").write_text(json.dumps([{"role": "user", "content": "Ten?"}]))
        os.replace(path.with_name("new"), path)
        assert len(list(file.messages(file.ids))) == 3


def test_large_files_take_little_memory(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        for number in range(64):
            part = {"type": "image", "base64": "A" * 500_000}
            file.write(json.dumps([{"role": "user", "content": [part, str(number)]}]) + "\n")
    tracemalloc.start()
    try:
        with ConversationFile(path) as file:
            assert sum(len(messages) for _, messages in file.messages(file.ids)) == 64
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A few lines of 32 MB.
    assert peak < 8_000_000
