"""The round loop: rolling back, failing rounds, controllers, and what a run folder refuses."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import onnxprune
from onnxprune import RunOptions, TrainingError, UsageError
from onnxprune.choosing.select import Keep
from onnxprune.choosing.threshold import MoveName, published_tau
from onnxprune.evaluating.judge import Judge, Verdict
from onnxprune.graph.model import constant, open_model, save_model
from onnxprune.labels.units import prunable
from onnxprune.normalising.normalise import normalise
from onnxprune.running import proposals, rounds
from onnxprune.training import Trainer, fine_tune
from tests.conftest import MODELS, needs_training

MODEL, DIGITS, TEST = MODELS / "digits_mlp.onnx", str(MODELS / "digits.npz"), str(MODELS / "digits_test.npz")
QUICK: dict[str, Any] = {"epochs": 0, "bench_seconds": 0.1}


def run(folder: Path, resume: bool = False, **options: Any) -> onnxprune.Report:
    folder.mkdir(exist_ok=True)
    return onnxprune.run(
        MODEL,
        DIGITS,
        output=folder / "out.onnx",
        eval_data=TEST,
        resume=resume,
        options=RunOptions(**{**QUICK, **options}),
    )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("target", ["target_macs", "target_latency"])
def test_where_nothing_may_go_the_target_is_not_met(target: str, tmp_path: Path) -> None:
    report = run(tmp_path, keep=(Keep("*", 1.0),), **{target: 0.5})
    assert not report.met and report.pruned.macs == report.baseline.macs


@needs_training
def test_after_a_round_that_was_rolled_back_the_next_cuts_less(tmp_path: Path) -> None:
    way = {"criterion": "flap", "scope": "gradual"}
    options = RunOptions(max_drop=0.2, epochs=2, threads=1, bench_seconds=0.1, round_to=1, **way)  # type: ignore[arg-type]
    rounds = onnxprune.run(MODELS / "digits_resnet.onnx", DIGITS, output=tmp_path / "out.onnx", options=options).rounds
    back = [(one, other) for one, other in pairwise(rounds) if not one["accepted"]]
    assert back and all(other["macs_share"] > one["macs_share"] for one, other in back)


def test_a_rolled_back_round_leaves_no_trace(tmp_path: Path) -> None:
    # The first cut is kept; the way on costs more than the first one did, and is undone.
    way = {"criterion": "flap", "scope": "gradual"}
    one = run(tmp_path / "one", target_macs=0.4, rounds=1, **way)
    most = one.rounds[0]["drop_counted"] + 1e-6
    two = run(tmp_path / "two", target_macs=0.4**2, max_drop=max(0.0, most), rounds=2, **way)
    assert one.met and not two.met
    verdicts = [record["accepted"] for record in two.rounds]
    assert verdicts[0] and not all(verdicts)
    kept = [record for record in two.rounds if record["accepted"]]
    assert two.pruned.macs == kept[-1]["macs"]
    if len(kept) == 1:
        assert digest(tmp_path / "one" / "out.onnx") == digest(tmp_path / "two" / "out.onnx")


@needs_training
@pytest.mark.parametrize("found", [None, 0.0])
def test_where_every_cut_costs_too_much_the_least_is_tried(
    found: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuning may win back more than was hoped for; without it nothing is tried. A threshold of 0 takes nothing."""
    monkeypatch.setattr(proposals, "bisect_tau", lambda *arguments: found)
    tuned = run(tmp_path, max_drop=1.0, epochs=1, rounds=2)
    shares = [record["macs_share"] for record in tuned.rounds]
    assert len(shares) == 2 and 0.5 < shares[1] < shares[0] < 0.99
    assert not run(tmp_path / "untuned", max_drop=1.0).rounds


@pytest.mark.parametrize(("asked", "epochs"), [(None, 102), (3, 3)])
def test_a_round_that_almost_holds_is_tuned_for_as_long_again(
    asked: int | None, epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user has said how long."""
    almost, trained = Verdict(value=98.0, drop=1.2, loss=0.1, fidelity=0.99, error=0.5, most=1.2), list[int]()
    monkeypatch.setattr(Judge, "measure", lambda judge, model, limit=None: almost)
    monkeypatch.setattr(rounds, "fine_tune", lambda *arguments, **given: trained.append(arguments[4].epochs))
    monkeypatch.setattr(rounds, "prepare_trainer", lambda trainer, say: None)
    report = run(tmp_path, max_drop=1.0, rounds=2, epochs=asked)
    assert report.rounds[0]["epochs"] == epochs
    assert sum(trained) == sum(record["epochs"] for record in report.rounds)
    assert not report.rounds[0]["accepted"]


@pytest.mark.parametrize(
    ("there", "asked", "batch", "chosen"),
    [
        (True, "auto", 8192, "cuda"),
        (True, "auto", 64, "auto"),
        (False, "auto", 8192, "auto"),
        (True, "ort", 8192, "ort"),
    ],
)
def test_a_gpu_is_taken_for_long_steps(
    there: bool, asked: Trainer, batch: int, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = list[str]()
    monkeypatch.setattr("onnxprune.running.context.has_cuda", lambda: there)
    monkeypatch.setattr(rounds, "fine_tune", lambda *arguments, **given: trainers.append(arguments[4].trainer))
    monkeypatch.setattr(rounds, "prepare_trainer", lambda trainer, say: None)
    run(tmp_path, target_macs=0.5, epochs=1, trainer=asked, batch=batch)
    assert trainers == [chosen]


def test_a_failing_round_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_after_the_first(*arguments: Any, **named: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise TrainingError("training failed (memory): out of memory")

    monkeypatch.setattr(rounds, "fine_tune", fail_after_the_first)
    monkeypatch.setattr(rounds, "prepare_trainer", lambda trainer, say: None)
    report = run(tmp_path, target_macs=0.5, epochs=1, rounds=2)
    assert not report.met
    assert [record["accepted"] for record in report.rounds][:2] == [True, False]
    assert report.pruned.macs == report.rounds[0]["macs"] < report.baseline.macs
    assert any("out of memory" in note for note in report.notes)
    assert json.loads((tmp_path / "out.onnxprune" / "report.json").read_text())["rounds"][1]["drop"] is None


@pytest.mark.parametrize("controller", ["bisect", "published"])
def test_a_failing_round_is_followed_by_a_lesser_cut(
    controller: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_at_first(*arguments: Any, **named: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise TrainingError("training failed (memory): out of memory")

    monkeypatch.setattr(rounds, "fine_tune", fail_at_first)
    monkeypatch.setattr(rounds, "prepare_trainer", lambda trainer, say: None)
    report = run(tmp_path, max_drop=3.0, epochs=1, controller=controller)
    failed, following = report.rounds[:2]
    assert "out of memory" in failed["error"] and following["tau"] < failed["tau"]
    assert report.met and report.pruned.macs < report.baseline.macs


@needs_training
def test_a_worker_out_of_memory_costs_no_accepted_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second round on workers may map 1 MB: they fail by themselves; the run ends with the first's model."""
    calls = []

    def limited(*arguments: Any, **named: Any) -> None:
        model, teacher, data, folder, options, *others = arguments
        calls.append(1)
        limit = 1_000_000 if len(calls) > 1 else None
        fine_tune(model, teacher, data, folder, replace(options, memory_limit=limit), *others, **named)

    monkeypatch.setattr(rounds, "fine_tune", limited)
    report = run(tmp_path, target_macs=0.3, epochs=1, rounds=2)
    assert not report.met and len(calls) > 1
    assert [record["accepted"] for record in report.rounds] == [True] + [False] * (len(calls) - 1)
    assert any("training failed (memory)" in note for note in report.notes)
    assert report.pruned.macs == report.rounds[0]["macs"] < report.baseline.macs
    onnxruntime.InferenceSession(str(tmp_path / "out.onnx"))


def test_when_every_round_fails_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise TrainingError("training failed (memory): out of memory")

    monkeypatch.setattr(rounds, "fine_tune", fail)
    monkeypatch.setattr(rounds, "prepare_trainer", lambda trainer, say: None)
    with pytest.raises(TrainingError, match="memory"):
        run(tmp_path, target_macs=0.5, epochs=1)
    assert not (tmp_path / "out.onnx").exists()


def test_the_published_controller_follows_its_formula(tmp_path: Path) -> None:
    report = run(tmp_path, controller="published", max_drop=3.0, rounds=3)
    first = report.rounds[0]["tau"]
    for before, after in pairwise(report.rounds):
        if before["accepted"]:
            share = min(max(before["drop_counted"] / 3.0, 0), 2)
            wanted = published_tau(first, before["tau"], share, 0.9)
            factors = [move["factor"] for move in after["moves"]]
            assert factors[0] * before["tau"] == pytest.approx(wanted)
            assert after["tau"] == pytest.approx(before["tau"] * np.prod(factors))
    assert sum(record["drop_counted"] for record in report.rounds if record["accepted"]) > 0
    assert report.rounds[0]["accepted"] and report.pruned.macs < report.baseline.macs


@pytest.mark.parametrize("target", ["macs", "params", "size"])
def test_every_resource_can_be_the_target(target: str, tmp_path: Path) -> None:
    report = run(tmp_path, **{f"target_{target}": 0.7})
    assert report.met
    assert 0.6 < report.target["resources"][target]["reached"] <= 0.7


def test_the_user_metric_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def recall(outputs, labels):\n    return float((outputs[0].argmax(1) == labels)[labels == 3].mean() * 100)\n"
    )
    report = run(tmp_path, target_macs=0.8, metric="mine:recall")
    with np.load(TEST) as data:
        scores = onnxruntime.InferenceSession(str(tmp_path / "out.onnx")).run(None, {"input": data["input"]})[0]
        expected = (scores.argmax(1) == 3)[data["labels"] == 3].mean() * 100
    assert report.pruned.metric == {"name": "mine:recall", "value": pytest.approx(expected)}


def test_resuming_something_else_is_refused(tmp_path: Path) -> None:
    run(tmp_path, target_macs=0.8)
    again = run(tmp_path, target_macs=0.8, resume=True)
    assert again.met
    with pytest.raises(UsageError, match=r"--target-macs 0.8 instead of 0.7"):
        run(tmp_path, target_macs=0.7, resume=True)


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "out.onnxprune" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(UsageError, match="not a run folder"):
        run(tmp_path, target_macs=0.8)
    assert precious.read_text() == "years of work"


def test_data_may_be_arrays(tmp_path: Path) -> None:
    with np.load(TEST) as data:
        arrays = {"input": data["input"], "labels": data["labels"]}
    report = onnxprune.run(MODEL, arrays, output=tmp_path / "out.onnx", options=RunOptions(**QUICK, target_macs=0.8))
    assert report.met and any("held back" in note for note in report.notes)


@pytest.mark.parametrize("options", [{"sparsify": 1}, {"minutes": 1.0}])
def test_training_without_data_is_refused(options: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data"):
        onnxprune.run(MODELS / "digits_mlp.onnx", output=tmp_path / "o.onnx", options=RunOptions(**options))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_loss_that_labels_do_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    model, data, options = MODELS / "digits_mlp.onnx", str(MODELS / "digits.npz"), RunOptions(loss="bce")
    with pytest.raises(UsageError, match="--loss bce"):
        onnxprune.run(model, data, output=tmp_path / "o.onnx", options=options)
    assert not list(tmp_path.iterdir())


def test_data_in_the_order_of_its_classes_does_no_harm(tmp_path: Path) -> None:
    with np.load(DIGITS) as file:
        order = np.argsort(file["labels"], kind="stable")
        np.savez(tmp_path / "sorted.npz", **{name: file[name][order] for name in file.files})
    options = RunOptions(target_macs=0.3, **QUICK)
    resnet, found = MODELS / "digits_resnet.onnx", []
    for data in (DIGITS, str(tmp_path / "sorted.npz")):
        places = {"output": tmp_path / "o.onnx", "run_dir": tmp_path / f"run{len(found)}"}
        report = onnxprune.run(resnet, data, eval_data=TEST, options=options, **places)
        found.append(report.target["drop"])
    assert abs(found[0] - found[1]) < 5.0  # 33 when the first samples were taken for all


def with_a_gap(path: Path) -> Path:
    """digits_mlp, a quarter of whose first units hardly count."""
    model = normalise(open_model(MODELS / "digits_mlp.onnx"))
    units = prunable(model, "digits_mlp")
    faint = units.groups[0].units[: len(units.groups[0].units) // 4]
    for value, axis, vector in units.parameters:
        array = np.array(constant(value))
        where = np.isin(vector, faint)
        if where.any():
            array[(slice(None),) * axis + (where,)] *= 1e-4
            value.const_value = ir.Tensor(array, name=value.name)
    save_model(model, path)
    return path


def test_a_threshold_near_a_clear_gap_goes_there(tmp_path: Path) -> None:
    """Of what just fits the allowance a few units lie above a gap: they are given back, and that is said."""
    model = with_a_gap(tmp_path / "gap.onnx")

    def first_round(most: float, *moves: MoveName) -> dict[str, Any]:
        options = RunOptions(max_drop=most, metric="fidelity", epochs=0, rounds=1, moves=moves, criterion="flap",
                             scope="gradual", bench_seconds=0.1, round_to=1)  # fmt: skip
        place = {"output": tmp_path / "o.onnx", "eval_data": TEST, "overwrite": True}
        return onnxprune.run(model, DIGITS, options=options, **place).rounds[0]  # type: ignore[arg-type]

    alone, both = first_round(0.05, "performance"), first_round(0.05, "performance", "distribution")
    assert [move["name"] for move in alone["moves"]] == ["performance"]
    assert [move["name"] for move in both["moves"]] == ["performance", "distribution"]
    assert "gap" in both["moves"][1]["evidence"] and both["tau"] < alone["tau"]
    assert all(both["widths"][name] >= width for name, width in alone["widths"].items())
    assert all(width < whole for width, whole in zip(both["widths"].values(), (200, 128), strict=True))
    far = first_round(0.2, "performance", "distribution")  # nothing parts the scores there
    assert [move["name"] for move in far["moves"]] == ["performance"]
    assert sum(far["scores"]["counts"]) > 0 and far["norms"] and far["removed"]
