"""The code is formatted, linted and typed, and what it promises by name is there."""

from __future__ import annotations

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
    for name in onnxprune.__all__:
        assert getattr(onnxprune, name) is not None
