"""`--verify` accepts correct conversions and discards wrong ones."""

import numpy as np
import pytest

import convert.conversion
import convert.streaming
import convert.verify
from bsjax.errors import CheckpointError
from convert.__main__ import main
from convert.conversion import convert_checkpoint
from tests.support import convert_sources as sources

pytestmark = [pytest.mark.parity, pytest.mark.slow]


# Conversions of tied and untied weights are compared for all families in
# `test_every_weight_is_converted`, and Gemma 3's untied weights pass in the test after this one.
@pytest.mark.parametrize(
    ("family", "tied"), [("qwen2_vl", False), ("gemma3", True), ("gemma3_text", True)]
)
def test_correct_conversions_pass(tmp_path, family, tied):
    # Gemma 3's third layer is the first global one; local ones see 12 positions.
    source = sources.write_source(tmp_path / "hf", family, tied=tied, layers=3)
    result = convert_checkpoint(source, tmp_path / "ours", check=True)
    assert result.verification is not None
    assert result.verification.tolerance == 1e-4
    assert 0 < result.verification.difference < 1e-4
    assert result.verification.tokens > (12 if family == "gemma3_text" else 20)


def test_the_command_line_prints_the_difference(tmp_path, capsys):
    source = sources.write_source(tmp_path / "hf", "qwen2_5_vl", tied=True, layers=3)
    assert main([str(source), str(tmp_path / "ours"), "--verify"]) == 0
    assert "verified     logits within" in capsys.readouterr().out


def test_a_soft_cap_makes_no_difference(tmp_path):
    """transformers ignores the cap in the class that reads images."""
    source = sources.write_source(tmp_path / "hf", "gemma3", softcap=1.0)
    result = convert_checkpoint(source, tmp_path / "ours", check=True)
    assert result.verification is not None and result.verification.difference < 1e-4


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 5e-2), ("float16", 1e-2)])
def test_differences_from_rounding_are_accepted(tmp_path, dtype, tolerance):
    source = sources.write_source(tmp_path / "hf", dtype="float32")
    result = convert_checkpoint(source, tmp_path / "ours", dtype=dtype, check=True)
    assert result.verification is not None
    assert result.verification.tolerance == tolerance
    assert tolerance / 100 < result.verification.difference < tolerance


def test_wrong_conversions_are_discarded(tmp_path, monkeypatch, capsys):
    source = sources.write_source(tmp_path / "hf")
    real = convert.streaming.TRANSFORMS["transpose"]

    def wrong(tensor):
        # Square projections are not transposed, which keeps their shape.
        return tensor if tensor.shape == (64, 64) else real(tensor)

    monkeypatch.setitem(convert.streaming.TRANSFORMS, "transpose", wrong)
    assert main([str(source), str(tmp_path / "ours"), "--verify"]) == 2
    assert "verification failed" in capsys.readouterr().err
    assert [folder.name for folder in tmp_path.iterdir()] == ["hf"]


def test_logits_that_are_not_numbers_fail(tmp_path, monkeypatch):
    source = sources.write_source(tmp_path / "hf")

    def nothing(folder, prompt):
        return np.full((len(prompt.token_ids), 256), np.nan, np.float32)

    monkeypatch.setattr(convert.verify, "reference_logits", nothing)
    with pytest.raises(CheckpointError, match="differ from transformers' by nan"):
        convert_checkpoint(source, tmp_path / "ours", check=True)
