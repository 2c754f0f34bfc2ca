"""A reader who follows `generate` to the attention kernel opens at most seven files of bsjax."""

import traceback
from pathlib import Path

import pytest

import bsjax
from convert.conversion import convert_checkpoint
from tests.support import convert_sources as sources
from tests.support.pallas import needs_pallas

MOST_FILES = 7


class KernelReached(Exception):
    """Raised in the kernel's place, so that nothing is compiled or run."""


# transformers writes the checkpoint, which needs torch.
@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "gemma3", "gemma3_text"])
@needs_pallas
def test_generate_reaches_the_kernel_in_seven_files(family, tmp_path, monkeypatch):
    source = sources.write_source(tmp_path / "hugging-face", family, tied=True, layers=4)
    convert_checkpoint(source, tmp_path / "converted", dtype="float32")
    model = bsjax.load(tmp_path / "converted", "float32")
    files: list[str] = []

    def reached(*arguments, **options):
        package = Path(bsjax.__file__).parent
        stack = [Path(frame.filename) for frame in traceback.extract_stack()]
        files.extend(
            str(path.relative_to(package))
            for path in dict.fromkeys(stack)
            if path.is_relative_to(package)
        )
        raise KernelReached

    monkeypatch.setattr("bsjax.pallas.prefill.prefill_attention", reached)
    question = {"type": "text", "text": "word3 word4"}
    messages = [{"role": "user", "content": [question]}]
    with pytest.raises(KernelReached):
        bsjax.generate(model, messages, backend="pallas")
    files.append("pallas/prefill.py")
    assert files[0] == "runtime/generation.py"
    assert len(files) <= MOST_FILES, files
