"""The code of docs/devices.md runs as it is printed, one block after the other."""

import re

from tests.support.paths import ROOT


def test_blocks_run_one_after_the_other():
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6 and all("assert" in block for block in blocks[1:])
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"docs/devices.md, block {number}", "exec"), names)
