"""An interrupted conversion leaves nothing that looks finished."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

import convert.conversion
from bsjax.checkpoint.loading import load
from bsjax.errors import CheckpointError
from convert.__main__ import main
from convert.conversion import convert_checkpoint
from tests.support import convert_sources as sources
from tests.support.paths import ROOT

pytestmark = [pytest.mark.parity, pytest.mark.slow]

# Converts half of a checkpoint, prints a line and waits.
_STALLED = """
import sys, time
sys.modules["torch"] = None  # it takes seconds to import
import convert.conversion

def stall(done, total):
    if done > total / 2:
        print("half", flush=True)
        # In short naps: a signal received by another thread would not end a long one.
        for _ in range(600):
            time.sleep(0.1)

real = convert.conversion.convert_checkpoint
convert.conversion.convert_checkpoint = lambda *a, **o: real(*a, **(o | {"progress": stall}))
from convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sources.write_source(tmp_path_factory.mktemp("source") / "hf")


def stop_half_way(source, destination, number):
    process = subprocess.Popen(
        [sys.executable, "-c", _STALLED, str(source), str(destination)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    assert not destination.exists()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_remove_everything(source, tmp_path, number, status):
    code, errors = stop_half_way(source, tmp_path / "ours", number)
    assert code == status
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_kill_leaves_a_folder_that_says_what_it_is(source, tmp_path, capsys):
    code, _ = stop_half_way(source, tmp_path / "ours", signal.SIGKILL)
    assert code == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("ours.converting-")
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        load(left)

    # The next run removes the folder, says so, and succeeds.
    assert main([str(source), str(tmp_path / "ours")]) == 0
    assert left.name in capsys.readouterr().err
    assert load(tmp_path / "ours").family.name == "qwen2_vl"
    assert not left.exists()


def test_a_limit_on_the_size_of_files_is_an_error_of_one_line(tiny_source, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        status = main([str(tiny_source), str(tmp_path / "ours"), "--quiet"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = capsys.readouterr().err
    assert status == 2 and message.startswith("error: cannot write")
    assert message.count("\n") == 1 and "File too large" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(1)])
def test_exceptions_remove_everything(source, tmp_path, error):
    def fail(done, total):
        if done > total / 2:
            raise error

    with pytest.raises(type(error)):
        convert_checkpoint(source, tmp_path / "ours", progress=fail)
    assert not list(tmp_path.iterdir())


def test_interrupt_is_reported_without_traceback(source, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.conversion, "convert_checkpoint", interrupt)
    assert main([str(source), str(tmp_path / "ours")]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_full_disk_is_reported_and_leaves_nothing(source, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.conversion.shutil, "copyfile", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        convert_checkpoint(source, tmp_path / "ours")
    assert not list(tmp_path.iterdir())


def test_a_destination_that_appears_meanwhile_is_left_alone(source, tmp_path):
    destination = tmp_path / "ours"

    def create(done, total):
        destination.mkdir(exist_ok=True)
        (destination / "theirs").write_text("data")

    with pytest.raises(CheckpointError, match="created by another process"):
        convert_checkpoint(source, destination, progress=create)
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]
    assert [file.name for file in destination.iterdir()] == ["theirs"]


def test_destination_cannot_have_an_unfinished_name(source, tmp_path):
    with pytest.raises(CheckpointError, match="unfinished"):
        convert_checkpoint(source, tmp_path / "ours.converting-1")


def test_progress_counts_every_source_byte_once(source, tmp_path):
    seen = []
    convert_checkpoint(source, tmp_path / "ours", progress=lambda *counts: seen.append(counts))
    total = sum(2 * tensor.numel() for tensor in sources.read_weights(source).values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_destination_keeps_ordinary_permissions(source, tmp_path):
    convert_checkpoint(source, tmp_path / "ours")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert time.time() - (tmp_path / "ours/bsjax.json").stat().st_mtime < 60


@pytest.mark.parametrize(
    "number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_signals_that_a_callback_swallows_are_remembered(source, tmp_path, number, error):
    # Python prints and drops exceptions raised in callbacks of its garbage collector.
    def swallow(done, total):
        if done == total:
            with contextlib.suppress(BaseException):
                signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(error):
        convert_checkpoint(source, tmp_path / "ours", progress=swallow)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) is before


def test_a_name_too_long_for_the_file_system_is_refused(source, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert_checkpoint(source, tmp_path / ("x" * 300))
