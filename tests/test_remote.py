"""Benchmarks on other machines: the bundle runs by itself, and ssh brings its figures back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.conftest import MODELS, call

PAIR = (MODELS / "digits_mlp.onnx", MODELS / "digits_gru.onnx")


def test_a_bundle_runs_with_nothing_but_numpy_and_onnxruntime(tmp_path: Path) -> None:
    result = call("bench", *PAIR, "--target", "script:device", "--seconds", 0.2, "--threads", 1, cwd=tmp_path)
    assert result.status == 0 and "bench_here.py" in result.err
    bundle = (tmp_path / "device").rename(tmp_path / "elsewhere")
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("onnx", "onnxprune", "onnx_ir", "click"):
        (blocked / f"{name}.py").write_text("raise ImportError('the device lacks it')")
    done = subprocess.run([sys.executable, bundle / "bench_here.py"], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(blocked)}, check=True)  # fmt: skip
    found = json.loads(done.stdout)["providers"]["CPUExecutionProvider"]
    rows = np.array(found["rows"])
    assert len(rows) == 2 and rows.shape[1] >= 4 and rows[0].size >= 20 and (rows > 0).all()
    assert all(load > 0 and first > 0 for load, first in found["starts"])


def with_ssh(folder: Path, script: str) -> dict[str, str]:
    """An environment in which `ssh` is a script."""
    programs = folder / "programs"
    programs.mkdir()
    (programs / "ssh").write_text(f"#!/bin/sh\n{script}\n")
    (programs / "ssh").chmod(0o755)
    return {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}


def test_figures_come_back_by_ssh_and_nothing_stays_there(tmp_path: Path) -> None:
    place = tmp_path / "there"
    place.mkdir()
    script = f'echo "$@" > words; for last; do :; done; TMPDIR={place} exec sh -c "$last"'
    here = with_ssh(tmp_path, script)
    words = ("--target", "ssh:me@board:2222", "--python", sys.executable, "--seconds", 0.2, "--json")
    result = call("bench", *PAIR, *words, cwd=tmp_path, **here)
    assert result.status == 0, result.err
    first, second = result.json["results"]
    assert first["against_first"]["speedup"] == 1 and second["latency"]["median"] > 0
    assert "-p 2222 me@board" in (tmp_path / "words").read_text()
    assert not [each for each in place.iterdir() if each.is_dir()]
    assert "onnxruntime" in result.err


def test_what_the_other_machine_says_reaches_the_user(tmp_path: Path) -> None:
    here = with_ssh(tmp_path, "echo 'Permission denied (publickey).' >&2; exit 255")
    result = call("bench", *PAIR, "--target", "ssh:board", cwd=tmp_path, **here)
    assert result.status == 2 and "Permission denied" in result.err
    assert call("bench", *PAIR, "--target", "telnet:board", cwd=tmp_path).status == 2
