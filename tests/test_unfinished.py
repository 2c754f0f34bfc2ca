"""Files are written whole or not at all; what killed processes left is removed, nothing else."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bsjax.unfinished import held, remove_leftovers, write_text
from tests.support.paths import ROOT

# Makes a temporary folder, locks it, says so and waits.
_WRITER = """
import os, sys, time
from pathlib import Path
from bsjax.unfinished import held
folder = Path(sys.argv[1], f"made.part-{os.getpid()}")
folder.mkdir()
with held(folder):
    (folder / "piece").write_text("half")
    print(folder.name, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    with process:
        yield process, tmp_path / name
        process.kill()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(
    writer, tmp_path
):
    process, folder = writer
    assert remove_leftovers(tmp_path, "made.part-") == []
    assert folder.is_dir()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert remove_leftovers(tmp_path, "made.part-") == [folder]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_keeps_what_a_process_elsewhere_writes(writer, tmp_path):
    """As for a process in another container, or on another machine."""
    process, folder = writer
    elsewhere = folder.rename(tmp_path / f"made.part-{_unused_number()}")
    assert remove_leftovers(tmp_path, "made.part-") == []
    assert elsewhere.is_dir()


def test_the_number_of_a_killed_process_may_be_that_of_this_one(tmp_path):
    ours = tmp_path / f"made.part-{os.getpid()}"
    ours.mkdir()
    assert remove_leftovers(tmp_path, "made.part-") == []
    os.utime(ours, (time.time() - 10**6,) * 2)
    with held(ours):
        assert remove_leftovers(tmp_path, "made.part-") == []
    assert remove_leftovers(tmp_path, "made.part-") == [ours]


@pytest.mark.parametrize("name", ["made", "made.part-", "made.part-x1", "made.part-1x", "part-1"])
def test_other_names_are_left_alone(tmp_path, name):
    (tmp_path / name).mkdir()
    assert remove_leftovers(tmp_path, "made.part-") == []
    assert (tmp_path / name).is_dir()


def test_links_are_not_followed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious").write_text("data")
    (tmp_path / f"made.part-{_unused_number()}").symlink_to(tmp_path / "theirs")
    assert remove_leftovers(tmp_path, "made.part-") == []
    assert (tmp_path / "theirs" / "precious").exists()


def test_a_file_is_written_whole_and_cleans_up_after_killed_writers(tmp_path):
    left = tmp_path / f".settings.{_unused_number()}.tmp"
    left.write_text("half of i")
    write_text(tmp_path / "settings", "all of it")
    assert [file.name for file in tmp_path.iterdir()] == ["settings"]
    assert (tmp_path / "settings").read_text() == "all of it"
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "settings", "\ud800")
    assert [file.name for file in tmp_path.iterdir()] == ["settings"]
    assert (tmp_path / "settings").read_text() == "all of it"


def _unused_number():
    """A number that no process has."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device"])
def test_only_files_are_replaced(tmp_path, kind):
    path = tmp_path / "there.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    before = os.lstat(path)
    with pytest.raises(OSError, match="not an ordinary file"):
        write_text(path, "text")
    assert os.lstat(path) == before and list(tmp_path.iterdir()) == [path]
