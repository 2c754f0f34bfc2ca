"""Checks what an installed wheel of bsjax contains, and that it works without the repository.

    python -I tools/wheel_check.py      # in an empty folder, with the wheel's interpreter

`make wheel-check` builds and installs the wheel first.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

TOP_LEVEL = {"bsjax", "convert"}
REQUIRED = {
    "bsjax/__init__.pyi",
    "bsjax/py.typed",
    "bsjax/pallas/configurations.json",
    "bsjax/triton/configurations.json",
    "bsjax/profiles/shipped/small-qwen2.5-vl.json",
    "bsjax/profiling/__init__.pyi",
}


def check_contents() -> None:
    """Checks the files of the wheel.

    Raises:
      SystemExit: a file is missing, or there is a package that does not belong in the wheel.
    """
    files = importlib.metadata.files("bsjax")
    if files is None:
        raise SystemExit("error: the installed bsjax has no list of files.")
    names = {file.as_posix() for file in files}
    if missing := REQUIRED - names:
        raise SystemExit(f"error: the wheel lacks {', '.join(sorted(missing))}.")
    packages = {name.split("/")[0] for name in names if name.endswith(".py")}
    if packages != TOP_LEVEL:
        raise SystemExit(f"error: the wheel installs the packages {', '.join(sorted(packages))}.")


def check_commands() -> None:
    """Runs commands that need no checkpoint.

    Raises:
      CalledProcessError: a command failed; its output says why.
    """
    script = Path(sysconfig.get_path("scripts")) / "bsjax"
    for command in (
        [script, "profile", "show", "small-qwen2.5-vl"],
        [script, "generate", "--help"],
        [sys.executable, "-m", "bsjax", "--help"],
        [sys.executable, "-m", "convert", "--help"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def check_attention() -> None:
    """Imports every public name, and computes sparse attention."""
    import jax

    import bsjax

    for name in bsjax.__all__:
        getattr(bsjax, name)
    template = bsjax.Template.from_segments([bsjax.Text(3), bsjax.Image(9), bsjax.Image(9)])
    mask = bsjax.BlockMask(template, ["INTRA_IMAGE_SINK"] * 2)
    q = jax.random.normal(jax.random.key(0), (template.tokens, 2, 64))
    out = bsjax.sparse_attention(q, q, q, mask)
    assert out.shape == q.shape, out.shape


if __name__ == "__main__":
    check_contents()
    check_commands()
    check_attention()
    print(f"bsjax {importlib.metadata.version('bsjax')} works from its wheel.")
