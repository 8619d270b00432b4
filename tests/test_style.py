"""The code is formatted, linted and typed, and what it promises by name is there."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import onnxprune

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=["lint", "format", "types"]
)
def test_code(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_name_is_there() -> None:
    """Whatever was imported before: a module of the same name would stand in its place from then on."""
    for module in pkgutil.walk_packages(onnxprune.__path__, "onnxprune."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in onnxprune.__all__:
        assert callable(getattr(onnxprune, name)), name


def test_folders_import_only_from_below() -> None:
    """In the order in which docs/architecture.md names them; below them are single files."""
    text = " ".join((ROOT / "docs" / "architecture.md").read_text().split())
    named = re.search(r"from the ground up: ([a-z, ]+)\.", text)
    assert named
    ground_up = ["errors", "checks", "progress", *named.group(1).split(", ")]
    package = ROOT / "onnxprune"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders - {"cli"} == set(ground_up[3:])
    for name in ground_up:
        for path in [package / f"{name}.py", *(package / name).rglob("*.py")]:
            if path.exists():
                imported = re.findall(r"^ *(?:from|import) onnxprune(?:\.(\w+))?", path.read_text(), re.MULTILINE)
                above = {each for each in imported if each not in ground_up[: ground_up.index(name) + 1]}
                assert not above, f"{path.relative_to(ROOT)} imports from {', '.join(sorted(above)) or 'the package'}"
