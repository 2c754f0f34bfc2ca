"""Loading says how much of the weights is in memory, on a terminal or to a function."""

import io
import sys
import threading
import time

import jax
import pytest
from flax import nnx
from transformers import AutoTokenizer

import bsjax
from bsjax import CheckpointError
from bsjax.checkpoint import loading
from bsjax.checkpoint.loading import PARAMETERS
from bsjax.runtime.programs import size_in_bytes
from tests.support.refusals import refused


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_function_is_told_the_bytes_of_each_parameter(tiny_checkpoint, dtype):
    seen = []
    model = bsjax.load(tiny_checkpoint, dtype, progress=lambda *counts: seen.append(counts))
    parameters = jax.tree.leaves(nnx.state(model.module))
    total = size_in_bytes(parameters)
    stages, done, totals = zip(*seen, strict=True)
    assert set(stages) == {"loading weights"} and set(totals) == {total}
    assert done[0] == 0 and done[-1] == total
    steps = sorted(later - earlier for earlier, later in zip(done, done[1:], strict=False))
    assert steps == sorted(leaf.size * leaf.dtype.itemsize for leaf in parameters)


@pytest.mark.parametrize(
    ("terminal", "progress", "shows"),
    [(True, None, True), (True, False, False), (False, None, False), (False, True, True)],
)
def test_a_bar_is_shown_on_a_terminal_only(
    tiny_checkpoint, monkeypatch, capfd, terminal, progress, shows
):
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    bsjax.load(tiny_checkpoint, progress=progress)
    assert ("loading weights" in stderr.getvalue()) == shows
    assert shows or not stderr.getvalue()
    assert capfd.readouterr() == ("", "")


def test_a_load_that_fails_half_way_ends_the_bar_and_says_why(tiny_source, tmp_path, monkeypatch):
    from convert.conversion import convert_checkpoint

    convert_checkpoint(tiny_source, tmp_path / "ours")
    *_, last = sorted(
        file for file in (tmp_path / "ours" / PARAMETERS).glob("*/c/**/*") if file.is_file()
    )
    content = bytearray(last.read_bytes())
    content[0] ^= 1
    last.write_bytes(content)
    monkeypatch.setattr(sys, "stderr", Terminal())
    refused(lambda: bsjax.load(tmp_path / "ours"), CheckpointError, "is missing or damaged")


def test_an_error_of_the_function_reaches_the_caller(tiny_checkpoint):
    class Stopped(Exception):
        pass

    def stop(stage, done, total):
        if done:
            raise Stopped

    with pytest.raises(Stopped):
        bsjax.load(tiny_checkpoint, progress=stop)


@pytest.mark.parametrize("progress", ["yes", 3, [1]])
def test_other_values_are_refused(tiny_checkpoint, annotations_unchecked, progress):
    words = "progress must be None, False or a function"
    refused(lambda: bsjax.load(tiny_checkpoint, progress=progress), CheckpointError, words)


def test_weights_stop_being_read_when_something_else_is_wrong(tiny_source, tmp_path, monkeypatch):
    """They are read while the tokenizer is, which is damaged here."""
    from convert.conversion import convert_checkpoint

    convert_checkpoint(tiny_source, tmp_path / "ours")
    (tmp_path / "ours" / "tokenizer.json").write_text("{}")
    begun, refused_by_main = threading.Event(), threading.Event()
    read = []

    def progress(stage: str, done: int, total: int) -> None:
        read.append(done)
        begun.set()
        assert refused_by_main.wait(60)
        time.sleep(0.2)  # until the error has left `load`'s `with` block

    class Tokenizer:
        @staticmethod
        def from_pretrained(*arguments, **options):
            assert begun.wait(60), "weights are read first"
            try:
                return AutoTokenizer.from_pretrained(*arguments, **options)
            finally:
                refused_by_main.set()

    monkeypatch.setattr(loading, "AutoTokenizer", Tokenizer)
    with pytest.raises(CheckpointError, match="tokenizer"):
        bsjax.load(tmp_path / "ours", progress=progress)
    assert len(read) < 3, "of more than twenty parameters"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bsjax")]
