"""`bsjax generate --batch` answers a file of conversations once, however often it is ended."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bsjax
from bsjax.checkpoint import loading
from bsjax.cli import main
from bsjax.runtime import batch as runtime_batch
from bsjax.runtime.answer_file import AnswerFile
from tests.support.paths import ROOT

NEW_TOKENS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Conversations of every form, with images of their own."""
    folder = tmp_path_factory.mktemp("batch")
    random = np.random.default_rng(0)
    for name in ("one.png", "two.png"):
        pixels = random.integers(0, 256, (56, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    whole = (folder / "one.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    lines = [
        [{"role": "user", "content": [{"type": "image", "image": "one.png"}, "What is it?"]}],
        {"id": "two", "messages": [{"role": "user", "content": "Why?"}]},
        None,
        {
            "id": 7,
            "messages": [{"role": "user", "content": "<image> or <image>?"}],
            "images": ["one.png", "two.png"],
        },
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How are you today?"},
            {"role": "assistant", "content": "This is left out."},
        ],
    ]
    write_lines(folder / "in.jsonl", lines)
    return folder


@pytest.fixture
def model(tiny_model, monkeypatch):
    """The model that commands of this process load."""

    def with_weights(described):
        return tiny_model

    monkeypatch.setattr(loading, "with_weights", with_weights)
    return tiny_model


@pytest.fixture
def run(tiny_checkpoint, folder, tmp_path, capsys):
    """Runs a batch; the exit status and what it says."""

    def run(*options: str, batch: str = "in.jsonl", output: Path = tmp_path / "out.jsonl"):
        capsys.readouterr()
        status = main(
            [
                "generate", str(tiny_checkpoint), "--batch", str(folder / batch),
                "--output", str(output), "--max-new-tokens", str(NEW_TOKENS), *options,
            ]
        )  # fmt: skip
        said = capsys.readouterr()
        assert said.out == ""
        return status, said.err

    return run


@pytest.fixture
def no_weights(monkeypatch):
    """Makes reading weights fail the test."""

    def with_weights(*_):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(loading, "with_weights", with_weights)


def write_lines(path: Path, lines: list) -> None:
    text = "".join("\n" if line is None else json.dumps(line) + "\n" for line in lines)
    path.write_text(text)


def answers_in(path: Path) -> dict[int, dict]:
    """The lines of an output, by the number of the conversation; no line may be there twice."""
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["bsjax_batch"] == 1
    by_number = {line["line"]: line for line in lines}
    assert len(by_number) == len(lines)
    return by_number


def conversations(folder: Path) -> dict[int, list]:
    """The conversations of in.jsonl, as a program would write them."""

    def image(name):
        return {"type": "image", "image": str(folder / name)}

    return {
        1: [{"role": "user", "content": [image("one.png"), "What is it?"]}],
        2: [{"role": "user", "content": "Why?"}],
        4: [{"role": "user", "content": [image("one.png"), " or ", image("two.png"), "?"]}],
        5: [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How are you today?"},
        ],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ((), {}),
        (
            ("--temperature", "0.9", "--top-k", "50", "--seed", "3", "--max-pixels", "1568",
             "--uniform", "intra-image"),
            {"temperature": 0.9, "top_k": 50, "seed": 3, "max_pixels": 1568},
        ),
        (("--use-generation-config", "--repetition-penalty", "1.5"),
         {"use_generation_config": True, "repetition_penalty": 1.5}),
    ],
)  # fmt: skip
def test_answers_are_those_of_generate(run, model, folder, tmp_path, options, arguments):
    profile = bsjax.Profile.uniform("INTRA_IMAGE", model) if "--uniform" in options else None
    status, said = run(*options)
    assert status == 0
    given = answers_in(tmp_path / "out.jsonl")
    assert sorted(given) == [1, 2, 4, 5]
    assert [given[number].get("id") for number in (1, 2, 4, 5)] == [None, "two", 7, None]
    for number, messages in conversations(folder).items():
        result = bsjax.generate(
            model, messages, profile=profile, max_new_tokens=NEW_TOKENS, **arguments
        )
        line = given[number]
        assert line["text"] == result.text
        assert line["token_ids"] == list(result.token_ids)
        assert line["finish_reason"] == result.finish_reason
        assert line["prompt_tokens"] == result.prompt_tokens
        assert line["stats"]["image_tokens"] == list(result.stats.image_tokens)
        assert line["stats"]["attention_flops_sparse"] == result.stats.attention_flops_sparse
    tokens = sum(len(line["token_ids"]) for line in given.values())
    assert said.startswith(f"4 conversations: 4 answers, 0 errors; {tokens} new tokens in ")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_conversations_that_cannot_be_answered_have_errors(run, model, folder, tmp_path):
    part = {"type": "image", "image": "cut.png"}
    text = "word " * 40000
    lines = [
        {"id": "a", "messages": [{"role": "user", "content": [part, "?"]}]},
        [{"role": "user", "content": "Why?"}],
        [{"role": "user", "content": text}],
    ]
    write_lines(folder / "errors.jsonl", lines)
    status, said = run(batch="errors.jsonl")
    assert status == 1
    assert said.startswith(f"3 conversations: 1 answer, 2 errors; {NEW_TOKENS} new tokens in ")
    given = answers_in(tmp_path / "out.jsonl")
    assert given[1] == {"line": 1, "id": "a", "error": given[1]["error"]}
    assert given[1]["error"].startswith("Image 1 of 1 (messages[0]['content'][0], ")
    assert "positions" in given[3]["error"]
    assert given[2]["token_ids"]


@pytest.mark.slow
def test_what_is_answered_is_not_answered_again(run, model, tmp_path, monkeypatch):
    assert run()[0] == 0
    path = tmp_path / "out.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    # Two answers, and the third without its end.
    path.write_bytes(b"".join(lines[:3]) + lines[3][:-1])
    kept = {json.loads(line)["line"] for line in lines[1:3]}
    ran = []

    def run_batch(model, tasks, *arguments, **options):
        tasks = list(tasks)
        ran.extend(task.number for task in tasks)
        return original(model, tasks, *arguments, **options)

    original = runtime_batch.run_batch
    monkeypatch.setattr(runtime_batch, "run_batch", run_batch)
    status, said = run()
    assert status == 0 and said.startswith("4 conversations: 4 answers, 0 errors; 8 new tokens")
    assert sorted([*ran, *kept]) == [1, 2, 4, 5]
    again = answers_in(path)
    before = {json.loads(line)["line"]: json.loads(line) for line in lines[1:]}
    assert {number: line["token_ids"] for number, line in again.items()} == {
        number: line["token_ids"] for number, line in before.items()
    }


def test_a_complete_batch_reads_no_weights(run, folder, tmp_path, tiny_model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loading, "with_weights", lambda *_: tiny_model)
        part = {"type": "image", "image": "cut.png"}
        write_lines(folder / "one error.jsonl", [[{"role": "user", "content": [part, "?"]}]])
        assert run(batch="one error.jsonl")[0] == 1
    monkeypatch.setattr(loading, "with_weights", None)
    whole = (tmp_path / "out.jsonl").read_bytes()
    status, said = run(batch="one error.jsonl")
    assert status == 1 and said.startswith("1 conversation: 0 answers, 1 error; 0 new tokens")
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "batch", "words"),
    [
        (("--temperature", "0.7"), "in.jsonl", "made with --temperature = 0.0, but this run has "
         "0.7"),
        (("--seed", "1"), "in.jsonl", "made with --seed = 0, but this run has 1,"),
        (("--stop", "."), "in.jsonl", "made with --stop = [], but this run has ['.']"),
        (("--max-pixels", "1568"), "in.jsonl", "made with --max-pixels = None"),
        (("--uniform", "sink"), "in.jsonl", "made with --profile = None"),
        (("--dtype", "bfloat16"), "in.jsonl", "made with --dtype = 'float32'"),
        (("--backend", "reference"), "in.jsonl", "made with --backend = 'xla'"),
        ((), "other.jsonl", "made with input SHA-256 = "),
    ],
)  # fmt: skip
def test_an_output_of_another_run_is_refused(
    run, model, folder, tmp_path, monkeypatch, options, batch, words
):
    # The same conversations, byte for byte, apart from a space.
    (folder / "other.jsonl").write_text((folder / "in.jsonl").read_text().rstrip("\n") + " \n")
    path = tmp_path / "out.jsonl"
    monkeypatch.setattr(runtime_batch, "run_batch", interrupted_after(1))
    assert run()[0] == 130
    before = path.read_bytes()
    assert before.count(b"\n") == 2
    monkeypatch.setattr(loading, "with_weights", None)
    status, said = run(*options, batch=batch)
    assert status == 2 and words in said and said.count("\n") == 1
    assert path.read_bytes() == before


def interrupted_after(answers: int):
    """A `run_batch` that is interrupted after some answers."""
    original = runtime_batch.run_batch

    def run_batch(*arguments, **options):
        for number, outcome in enumerate(original(*arguments, **options)):
            if number == answers:
                raise KeyboardInterrupt
            yield outcome

    return run_batch


def test_an_output_of_another_checkpoint_is_refused(
    run, model, tiny_checkpoint, folder, tmp_path, capsys, monkeypatch
):
    assert run()[0] == 0
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    description = json.loads((other / "bsjax.json").read_text())
    (other / "bsjax.json").write_text(json.dumps(description | {"fingerprint": "0" * 64}))
    monkeypatch.setattr(loading, "with_weights", None)
    arguments = ["--batch", str(folder / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["generate", str(other), *arguments, "--max-new-tokens", "4"]) == 2
    assert "was made with checkpoint fingerprint = " in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(run, model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runtime_batch, "run_batch", interrupted_after(3))
        status, said = run()
    assert status == 130
    assert "3 of 4 conversations are in" in said and said.endswith("interrupted\n")
    assert run()[0] == 0
    assert len(answers_in(tmp_path / "out.jsonl")) == 4


def test_two_runs_do_not_write_to_one_output(run, model, tmp_path, no_weights):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, {}, {1: None}) as held:
        held.begin()
        before = path.read_bytes()
        status, said = run()
        assert status == 2 and f"Another process is writing to {path}" in said
        assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["Notes of mine", "Notes of mine\n", '{"bsjax": 1}\n', "\n"])
def test_a_file_of_something_else_is_left_alone(run, no_weights, tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    status, said = run()
    assert status == 2 and "is not a file of answers" in said
    assert path.read_text() == content


@pytest.mark.slow
def test_progress_is_shown_on_a_terminal(run, model, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    status, said = run("--backend", "reference")
    assert status == 0
    assert "answering" in said and "4/4" in said and "0 errors" in said and "tokens/s" in said
    assert "4 conversations: 4 answers" in said.splitlines()[-1]


def test_a_question_may_follow_options(model, tiny_checkpoint, capsys):
    arguments = ["generate", str(tiny_checkpoint), "--max-new-tokens", "2", "Why?"]
    assert main(arguments) == 0
    assert capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(arguments[:-1])
    assert "required: QUESTION" in capsys.readouterr().err


# Forks before JAX is used, so that what takes seconds to import is imported once. Each child is
# killed while it writes a line, counted from 0, of which it has written a share.
_KILLED = """
import os, signal, sys
sys.modules["torch"] = None  # it takes seconds to import
import bsjax
from bsjax.cli import main
from bsjax.runtime.answer_file import AnswerFile
import bsjax.runtime.batch, bsjax.samples.conversations, bsjax.profiling.state

write, calls = AnswerFile._write, 0

def killed(self, line):
    global calls
    if calls == at:
        os.write(self._descriptor, line[: int(share * len(line))])
        os.kill(os.getpid(), signal.SIGKILL)
    calls += 1
    write(self, line)

checkpoint, batch, *points = sys.argv[1:]
for output, at, share in zip(points[::3], map(int, points[1::3]), map(float, points[2::3])):
    child = os.fork()
    if not child:
        AnswerFile._write = killed
        os._exit(main(["generate", checkpoint, "--batch", batch, "--output", output,
                       "--max-new-tokens", "4"]))
    # Flushed, or the next child may print it again.
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no forks")
def test_kills_while_lines_are_written(run, model, tiny_checkpoint, folder, tmp_path):
    points = [(0, 0.5), (4, 1.0)]
    paths = {point: tmp_path / f"{point[0]}-{point[1]}.jsonl" for point in points}
    assert run()[0] == 0
    expected = answers_in(tmp_path / "out.jsonl")
    arguments = [str(part) for (at, share), path in paths.items() for part in (path, at, share)]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tiny_checkpoint), str(folder / "in.jsonl"), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(points), done.stderr
    for (at, share), path in paths.items():
        content = path.read_bytes()
        *whole, torn = content.split(b"\n")
        assert len(whole) == at + (share == 1.0)
        assert bool(torn) == (share == 0.5)
        assert run(output=path)[0] == 0
        # Nothing that was whole is written again.
        kept = b"".join(line + b"\n" for line in whole) if len(whole) > 1 else b""
        assert path.read_bytes().startswith(kept)
        given = answers_in(path)
        assert {number: line["token_ids"] for number, line in given.items()} == {
            number: line["token_ids"] for number, line in expected.items()
        }
