"""Commands of several processes, each with some of the devices."""

import os
import socket
import subprocess
import sys
from typing import NoReturn

import numpy as np
import pytest

from bsjax.cli import main
from bsjax.runtime.processes import from_mib, in_mib

TIMEOUT = 120


def started(process: int, port: int, *arguments: str) -> subprocess.Popen:
    """One of two processes with four devices each."""
    command = [
        *(sys.executable, "-m", "bsjax", *arguments, "--tensor", "2", "--context", "4"),
        *("--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(process)),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_process_0_answers_and_notices_if_another_one_ends(tiny_checkpoint, capsys):
    question = "Which of these is brighter, and why?"
    assert main(["generate", str(tiny_checkpoint), question, "--max-new-tokens", "4"]) == 0
    alone = capsys.readouterr().out
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    chat = ("chat", str(tiny_checkpoint), "--max-tokens", "256", "--max-new-tokens", "4")
    first, second = (started(process, port, *chat) for process in range(2))
    try:
        assert first.stdin and first.stdout and second.stdout
        first.stdin.write(question + "\n")
        first.stdin.flush()
        assert first.stdout.readline() == alone
        second.kill()
        _, errors = first.communicate("And why not?\n", timeout=TIMEOUT)
        assert first.returncode == 1
        assert "error: another process has ended, or is out of reach" in errors
        assert second.stdout.read() == ""
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "localhost:1"], "--coordinator needs --processes and --process"),
        (["--process", "0", "--processes", "2"], "need --coordinator"),
        (
            ["--coordinator", "localhost:1", "--processes", "2", "--process", "2"],
            "--process must be 0 to 1, got 2",
        ),
        (["--distributed"], "Only a process of its own"),
    ],
)
def test_incomplete_options_are_refused(options, message, tiny_checkpoint, monkeypatch, capsys):
    statuses = []

    def leave(status: int) -> NoReturn:
        statuses.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit):
        main(["generate", str(tiny_checkpoint), "Why?", *options])
    assert statuses == [2]
    assert message in capsys.readouterr().err


def test_free_memory_is_told_as_integers_that_devices_have():
    gib = 2**30
    for sizes in ([79 * gib, 139 * gib], [139 * gib, 79 * gib + 1], [2**60, 79 * gib]):
        told = np.stack([in_mib(size) for size in sizes])
        assert told.dtype == np.int32 and from_mib(told) == 79 * gib
    assert from_mib(np.stack([in_mib(None), in_mib(gib)])) is None
