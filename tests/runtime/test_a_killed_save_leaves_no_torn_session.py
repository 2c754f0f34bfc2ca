"""A process that is killed while it saves a session leaves the earlier file or the new one."""

import os
import signal
import subprocess
import sys

import pytest

import bsjax
from bsjax import SessionError
from tests.support.paths import ROOT

# What a process does in place of a function when it is killed there.
POINTS = {
    "created": "session_file.write_arrays = kill",
    "half written": "session_file.write_arrays = half",
    "written": "os.fsync = kill",
    "complete": "os.replace = kill",
    "renamed": "rename = os.replace; os.replace = lambda *names: (rename(*names), kill())",
}

# Forks before JAX is used, so that what takes seconds to import is imported once.
_SAVING = """
import os, signal, sys
sys.modules["torch"] = None  # it takes seconds to import
import bsjax
from bsjax.runtime import session_file

write_arrays = session_file.write_arrays

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(file, *arguments):
    write_arrays(file, *arguments)
    file.truncate(file.tell() // 2)
    kill()

checkpoint, saved, *points = sys.argv[1:]
for path, point in zip(points[::2], points[1::2]):
    child = os.fork()
    if not child:
        session = bsjax.Session.load(saved, bsjax.load(checkpoint))
        exec(point)
        session.save(path)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no forks")
def test_kills_at_every_step_of_saving(tiny_model, tiny_checkpoint, tmp_path):
    session = bsjax.Session(tiny_model, max_tokens=256)
    messages = [{"role": "user", "content": "Why?"}]
    paths = {
        (point, earlier): tmp_path / point / str(earlier) / "a.session"
        for point in POINTS
        # Without an earlier file there is nothing else to lose.
        for earlier in ((True, False) if point in ("half written", "renamed") else (True,))
    }
    for (_, earlier), path in paths.items():
        path.parent.mkdir(parents=True)
        if earlier:
            session.save(path)
            before = path.read_bytes()
    session.generate(messages, max_new_tokens=4)
    session.save(tmp_path / "saved")
    after = (tmp_path / "saved").read_bytes()

    arguments = [word for key, path in paths.items() for word in (str(path), POINTS[key[0]])]
    done = subprocess.run(
        [sys.executable, "-c", _SAVING, str(tiny_checkpoint), str(tmp_path / "saved"), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(paths), done.stderr

    for (point, earlier), path in paths.items():
        if point == "renamed":
            assert path.read_bytes() == after
        elif earlier:
            assert path.read_bytes() == before
        else:
            assert not path.exists()
        # What is left over is not taken for a session, unless it is a whole one.
        left = [file for file in path.parent.iterdir() if file != path]
        assert len(left) == (point != "renamed")
        for file in left:
            if point in ("written", "complete"):
                assert file.read_bytes() == after
            else:
                with pytest.raises(SessionError, match="damaged"):
                    bsjax.Session.load(file, tiny_model)
        # The next save cleans up.
        session.save(path)
        assert list(path.parent.iterdir()) == [path]
        assert bsjax.Session.load(path, tiny_model).tokens == session.tokens > 0
