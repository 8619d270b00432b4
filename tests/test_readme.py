"""The README's promises that a machine can check."""

from __future__ import annotations

import re

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_two_shell_blocks_of_one_line() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    assert all(len(block.strip().splitlines()) == 1 for block in blocks)
    assert "onnxprune run models/" in blocks[0] and "pytest" in blocks[1]


def test_the_example_operator_in_the_docs_is_the_real_one() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    assert code is not None
    assert code.group(1).strip() in (ROOT / "onnxprune" / "labels" / "reshaping.py").read_text()


def test_what_the_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists()
