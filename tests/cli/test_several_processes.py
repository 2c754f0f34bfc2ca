"""Commands of several processes, each with some of the devices."""

import os
import queue
import socket
import subprocess
import sys
from argparse import Namespace
from typing import NoReturn

import numpy as np
import pytest
from PIL import Image

from bsjax import GenerationError
from bsjax.cli import distributed, main, watch
from bsjax.runtime import processes
from bsjax.runtime.processes import argument_of_least, check_alike, from_mib, in_mib

TIMEOUT = 120


def started(
    process: int, port: int, devices: int, *arguments: str, silent_seconds: int
) -> subprocess.Popen:
    """One of two processes, with some devices."""
    program = (
        "import sys\n"
        "from bsjax.cli import main, watch\n"
        f"watch.SILENT_SECONDS = {silent_seconds}\n"
        "sys.exit(main())"
    )
    command = [
        *(sys.executable, "-c", program, *arguments),
        *("--coordinator", f"localhost:{port}", "--processes", "2", "--process", str(process)),
    ]
    count = "--xla_force_host_platform_device_count"
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(count)]
    environment = {**os.environ, "XLA_FLAGS": " ".join([*flags, f"{count}={devices}"])}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture
def pair():
    """Starts a command as two processes, which are killed in the end."""
    processes: list[subprocess.Popen] = []

    def start(
        devices: int, *arguments: str, silent_seconds: int = watch.SILENT_SECONDS
    ) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        processes.extend(
            started(process, port, devices, *arguments, silent_seconds=silent_seconds)
            for process in range(2)
        )
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def pictures(tmp_path):
    """Files of six pictures, each of which is a group. The devices of process 1 encode the last."""
    files = []
    for seed in range(6):
        files.append(tmp_path / f"{seed}.jpg")
        pixels = np.random.default_rng(seed).integers(0, 256, (336, 336, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(files[-1])
    return files


@pytest.mark.slow
def test_two_processes_of_four_devices_answer_as_one(tiny_checkpoint, pictures, pair, capsys):
    images = [str(file) for file in pictures]
    once = ["generate", str(tiny_checkpoint), "Why?", *images, "--max-new-tokens", "4"]
    assert main(once) == 0
    alone = capsys.readouterr().out
    first, second = pair(4, *once, "--context", "4", "--tensor", "2")
    output, _ = first.communicate(timeout=TIMEOUT)
    nothing, _ = second.communicate(timeout=TIMEOUT)
    assert (first.returncode, second.returncode, output, nothing) == (0, 0, alone, "")


@pytest.mark.slow
def test_a_process_that_is_killed_while_another_answers_ends_it(tiny_checkpoint, pair):
    chat = ["chat", str(tiny_checkpoint), "--max-tokens", "2048", "--max-new-tokens", "1024"]
    first, second = pair(1, *chat, "--context", "2", silent_seconds=6)
    first.stdin.write("Which of these is brighter, and why?\n")
    first.stdin.flush()
    assert first.stdout.read(3), "of an answer that has only begun"
    second.kill()
    _, errors = first.communicate(timeout=TIMEOUT)
    assert first.returncode == 1
    assert "has ended, or is out of reach" in errors.splitlines()[-1]
    assert second.stdout.read() == ""


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_all(tiny_checkpoint, pictures, pair):
    content = pictures[5].read_bytes()
    pictures[5].write_bytes(content[: len(content) // 2])
    images = [str(file) for file in pictures]
    first, second = pair(1, "generate", str(tiny_checkpoint), "Why?", *images, "--context", "2")
    (output, errors), (nothing, own_errors) = (
        process.communicate(timeout=TIMEOUT) for process in (first, second)
    )
    assert (first.returncode, second.returncode, output, nothing) == (1, 2, "", "")
    assert errors.splitlines()[-1].startswith("error: process 1: Image 6 of 6 (")
    assert own_errors.splitlines()[-1].startswith("process 1: error: Image 6 of 6 (")


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
        (["--coordinator", "nonsense", "--processes", "2", "--process", "0"], "HOST:PORT"),
        (["--coordinator", "a:99999", "--processes", "2", "--process", "0"], "up to 65535"),
        (["--coordinator", "a:1", "--processes", "0", "--process", "0"], "--processes must be 1"),
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


def test_a_port_in_use_is_refused():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(GenerationError, match=f"cannot wait at port {port}"):
            distributed.check_options(f"localhost:{port}", 2, 0)


def test_arguments_that_differ_are_refused():
    store = Store()
    options = Namespace(process=0, prompt="Why?", max_new_tokens=4)
    distributed.check_arguments(store, options)
    options.process = 1
    distributed.check_arguments(store, options)
    options.max_new_tokens = 40
    with pytest.raises(GenerationError, match="Process 1 .* max-new-tokens is 40, not 4"):
        distributed.check_arguments(store, options)


def test_other_images_are_refused(monkeypatch):
    told = []

    def gathered(own: np.ndarray) -> np.ndarray:
        told.append(own)
        return np.stack(told)

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gathered)
    check_alike({"prompt": b"1", "image": b"2"})
    check_alike({"prompt": b"1", "image": b"2"})
    with pytest.raises(GenerationError, match="Process 2 has another image than process 0"):
        check_alike({"prompt": b"1", "image": b"3"})


def test_free_memory_is_told_as_integers_that_devices_have():
    gib = 2**30
    for sizes in ([79 * gib, 139 * gib], [139 * gib, 79 * gib + 1], [2**60, 79 * gib]):
        told = np.stack([in_mib(size) for size in sizes])
        assert told.dtype == np.int32 and from_mib(told) == 79 * gib
    assert from_mib(np.stack([in_mib(None), in_mib(gib)])) is None


class Store:
    """What several `Watch`es need of JAX's coordination service."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self.silent = "none"

    def key_value_set(self, key: str, value: str, *, allow_overwrite: bool = False) -> None:
        assert allow_overwrite or key not in self.values
        if not key.endswith(self.silent):
            self.values[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        return self.values[key]

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


@pytest.mark.parametrize("ending", ["error", "silence", "finish"])
def test_processes_notice_what_becomes_of_the_others(monkeypatch, ending):
    monkeypatch.setattr(watch, "SILENT_SECONDS", 3)
    monkeypatch.setattr(watch, "_LOOK_AGAIN", 0.05)
    monkeypatch.setattr(watch, "_TIME_TO_LEAVE", 0.2)
    store, reasons = Store(), queue.Queue()
    processes = [
        watch.Watch(store, process, 3, lambda reason: reasons.put(reason)) for process in range(3)
    ]
    with pytest.raises(queue.Empty):
        reasons.get(timeout=0.5)
    match ending:
        case "error":
            processes[1].end("no such file.")
            expected = ["process 1: no such file."] * 2
        case "silence":
            store.silent = "1"
            expected = ["process 1 has ended, or is out of reach"] * 2
        case _:
            processes[1].finish()
            expected = []
    assert [reasons.get(timeout=30) for _ in expected] == expected
    with pytest.raises(queue.Empty):
        reasons.get(timeout=0.5)
    for process in processes:
        process.finish()


def test_the_device_with_the_least_memory_may_be_another_processes(monkeypatch):
    gib = 2**30

    def gathered(own: np.ndarray) -> np.ndarray:
        return np.stack([own, np.asarray([5, in_mib(20 * gib)], np.int32)])

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gathered)
    assert argument_of_least(1, 50 * gib) == 5
    assert argument_of_least(1, 10 * gib) == 1
