"""Run folders: kept, locked, resumed by themselves; and interrupts that tell the truth."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import filelock
import numpy as np
import pytest

import onnxprune
from onnxprune import RunOptions, TrainingError, UsageError
from onnxprune.running import rounds
from tests.conftest import MODELS, call, start

MODEL, DIGITS = MODELS / "digits_mlp.onnx", MODELS / "digits.npz"
ASKED = ("run", MODEL, "--data", DIGITS, "--target-macs", 0.6, "--epochs", 0, "-o", "out.onnx")


def test_a_run_is_not_emptied_without_a_word(tmp_path: Path) -> None:
    assert call(*ASKED, cwd=tmp_path).status == 0
    again = call(*ASKED, cwd=tmp_path)
    assert again.status == 2 and "--resume" in again.err and "--overwrite" in again.err
    assert call(*ASKED, "--overwrite", cwd=tmp_path).status == 0


def test_a_folder_is_enough_to_go_on(tmp_path: Path) -> None:
    first = call(*ASKED, "--keep", "*=0.2", "--json", cwd=tmp_path)
    before = (tmp_path / "out.onnx").read_bytes()
    (tmp_path / "out.onnx").unlink()
    (tmp_path / "elsewhere").mkdir()
    again = call("run", "--resume", "--run-dir", "../out.onnxprune", "--json", cwd=tmp_path / "elsewhere")
    assert again.status == first.status == 0, again.err
    assert (tmp_path / "out.onnx").read_bytes() == before
    more = call("run", "--resume", "--run-dir", "out.onnxprune", "--seed", 3, cwd=tmp_path)
    assert more.status == 2 and "--seed" in more.err
    none = call("run", "--resume", cwd=tmp_path)
    assert none.status == 2 and "--run-dir" in none.err


def test_a_refused_resume_names_what_differs(tmp_path: Path) -> None:
    assert call(*ASKED, cwd=tmp_path).status == 0
    other = call(*ASKED, "--seed", 7, "--threads", 1, "--resume", cwd=tmp_path)
    assert other.status == 2 and "--seed 0 instead of 7" in other.err and "--threads unset instead of 1" in other.err


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out.onnxprune").mkdir()
    with filelock.FileLock(tmp_path / "out.onnxprune" / ".lock"):
        refused = call(*ASKED, cwd=tmp_path)
    assert refused.status == 2 and "another run works in" in refused.err
    assert call(*ASKED, cwd=tmp_path).status == 0


def test_an_interrupt_tells_the_truth_once(tmp_path: Path) -> None:
    process = start(*ASKED[:-4], "--epochs", 400, "-o", "out.onnx", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob("out.onnxprune/round-01/tune-*/job.json")):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.count("interrupted") == 1 and "nothing was written" in err
    assert not (tmp_path / "out.onnx").exists()


def test_an_unreachable_target_is_tried_once(tmp_path: Path) -> None:
    done = call(
        *ASKED[:4], "--target-macs", 0.3, "--keep", "*=0.8", "--epochs", 0, "-o", "o.onnx", "--json", cwd=tmp_path
    )
    assert done.status == 5 and len(done.json["rounds"]) == 1


def test_where_the_runtime_cannot_be_had_the_other_trainer_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(asked: str, say: object = None) -> None:
        raise TrainingError("the training runtime can't be fetched")

    monkeypatch.setattr(rounds, "prepare_trainer", missing)
    with np.load(DIGITS) as data:
        arrays = {name: data[name][:400] for name in data.files}
    options = RunOptions(target_macs=0.7, epochs=1, bench_seconds=0.1)
    report = onnxprune.run(MODEL, arrays, output=tmp_path / "o.onnx", options=options)
    assert report.rounds[0]["trainer"] == "graph" and any("can't be fetched" in note for note in report.notes)
    chosen = RunOptions(target_macs=0.7, epochs=1, trainer="ort")
    with pytest.raises(TrainingError, match="can't be fetched"):
        onnxprune.run(MODEL, arrays, output=tmp_path / "p.onnx", options=chosen)
    with pytest.raises(UsageError, match="arrays"):
        onnxprune.run(None, run_dir=tmp_path / "o.onnxprune", resume=True)


def test_what_was_measured_is_what_is_cut(tmp_path: Path) -> None:
    """The units that stay are recorded: a threshold alone would choose again."""
    assert call(*ASKED, cwd=tmp_path).status == 0
    folder = tmp_path / "out.onnxprune" / "round-01"
    kept = json.loads((folder / "proposal.json").read_text())["kept"]
    widths = json.loads((folder / "round.json").read_text())["widths"]
    assert {name: len(units) for name, units in kept.items()} == widths
