"""Where tests find models and data, and how they call the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: threads that wait for one another take longer
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from onnxprune.training import supported

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
SHARED = Path(os.environ.get("ONNXPRUNE_SHARED", ROOT.parent / "shared"))

needs_training = pytest.mark.skipif(not supported(), reason="no training wheel for this Python and platform")


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The JSON object on stdout."""
        return json.loads(self.out)


def _as_in_a_terminal() -> None:
    """Ctrl-C counts, also where tests run in the background of a shell that has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments: object, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Starts the command line as a user would."""
    command = [sys.executable, "-m", "onnxprune", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "120", **env}
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        preexec_fn=_as_in_a_terminal,
    )


def call(*arguments: object, cwd: Path, **env: str) -> Result:
    """Runs the command line as a user would."""
    process = start(*arguments, cwd=cwd, **env)
    out, err = process.communicate(timeout=280)
    assert "Traceback" not in err, err
    return Result(process.returncode, out, err)


@pytest.fixture
def shared() -> Path:
    """The folder of real models and data that lies beside the project on some machines."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"no {SHARED}: set ONNXPRUNE_SHARED to the folder with the shared models")
    return SHARED
