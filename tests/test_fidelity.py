"""Fidelity, direction and scale of metrics, allowances, and the floor: what is handed over is as good as is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import onnxprune
from onnxprune import DataError, RunOptions, UsageError
from onnxprune.benchmarking.bench import Comparison
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.judge import Judge
from onnxprune.evaluating.metrics import METRICS, Metric, explained, fidelity, find_metric, output_weights
from onnxprune.evaluating.rounding import rounding_noise
from onnxprune.graph.model import open_model, save_model
from onnxprune.running import ending
from onnxprune.running.options import Allowance
from onnxprune.running.report import decimals
from tests.conftest import MODELS, call
from tests.graphs import graph

RNG = np.random.default_rng(0)
SCORES = (3 + 0.3 * RNG.standard_normal((200, 1))).astype(np.float32)  # a quality between 1 and 5
MLP = MODELS / "digits_mlp.onnx"


def test_a_constant_answer_has_nothing_of_fidelity_and_all_of_the_old_cosine() -> None:
    constant = np.full_like(SCORES, SCORES.mean())
    assert fidelity([constant], [SCORES]) == pytest.approx(0, abs=1e-6)
    assert fidelity([SCORES], [SCORES]) == 1
    assert METRICS["cosine"].compute([constant], None, [SCORES]) < 60
    noisy = SCORES + 0.1 * RNG.standard_normal(SCORES.shape).astype(np.float32)
    expected = 1 - ((noisy - SCORES) ** 2).sum() / ((SCORES - SCORES.mean(0)) ** 2).sum()
    assert fidelity([noisy], [SCORES]) == pytest.approx(expected, rel=1e-4)


def test_outputs_are_weighed_and_those_without_spread_do_not_count() -> None:
    flat, wrong = np.ones((200, 3), np.float32), SCORES[::-1].copy()
    assert np.isnan(explained([flat], [flat])[0])
    assert fidelity([SCORES, flat + 1], [SCORES, flat]) == 1
    assert fidelity([SCORES, wrong], [SCORES, SCORES], [1, 0]) == 1
    assert fidelity([SCORES, wrong], [SCORES, SCORES]) < 0.5
    assert output_weights({"b": 2.0}, ["a", "b"]) == [1.0, 2.0] and output_weights({}, ["a"]) is None
    with pytest.raises(UsageError, match="--weigh c"):
        output_weights({"c": 1.0}, ["a", "b"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_no_fidelity(bad: float) -> None:
    broken = SCORES.copy()
    broken[0] = bad
    assert fidelity([broken], [SCORES]) == -np.inf
    assert fidelity([SCORES], [broken]) == 1  # where the uncut model says nothing finite nothing is asked


def test_classes_count_by_what_agreement_has_above_the_most_frequent() -> None:
    answers = np.array([0] * 80 + [1] * 20)
    assert explained([np.zeros(100, int)], [answers]) == [0.0]
    assert explained([answers], [answers]) == [1.0]


def test_equal_scores_are_a_guess_and_nan_is_wrong() -> None:
    labels = np.arange(10) % 5
    top1 = find_metric("top1", Dataset({"x": np.zeros((10, 1), np.float32)}, labels))
    assert top1.compute([np.zeros((10, 5), np.float32)], labels, []) == pytest.approx(20)
    assert top1.compute([np.full((10, 5), np.nan, np.float32)], labels, []) == 0


@pytest.mark.parametrize("step", [1 / 255, 0.01])
def test_the_rounding_of_inputs_is_told_from_their_grid(step: float) -> None:
    grid = (step * RNG.integers(0, 256, (64, 64))).astype(np.float32)
    moved = rounding_noise({"x": grid})["x"]
    assert 0.2 * step < np.abs(moved - grid).max() <= 0.51 * step
    whole = np.arange(10)
    assert rounding_noise({"x": whole})["x"] is whole
    fine = RNG.standard_normal(100_000).astype(np.float32)
    assert np.abs(rounding_noise({"x": fine})["x"] - fine).max() < 1e-6


# ---- direction and scale


def judge(compute: Any, own: Metric | None = None, labels: Any = None) -> Judge:
    """A judge of the identity on three classes, right in nine of ten."""
    model = graph("(float[N,3] x, float[3,3] w) => (float[N,3] y) { y = MatMul(x, w) }")
    model.graph.initializers["w"].const_value = ir.tensor(np.eye(3, dtype=np.float32), name="w")
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 400)
    seen = np.where(rng.random(400) < 0.9, truth, rng.integers(0, 3, 400))
    data = Dataset({"x": np.eye(3, dtype=np.float32)[seen]}, truth if labels is None else labels(truth))
    return Judge(model, data, own or Metric("mine", compute, None, None, own=True), 1, True)


def right(outputs: Any, labels: Any) -> float:
    return float((outputs[0].argmax(1) == labels).mean())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, -7.0])
@pytest.mark.parametrize("higher", [True, False])
def test_direction_and_scale_are_taken_from_wrong_answers(scale: float, offset: float, higher: bool) -> None:
    sign = 1 if higher else -1
    told = judge(lambda outputs, labels, reference: offset + sign * scale * right(outputs, labels)).told()
    assert told.metric.higher_is_better is higher
    if higher:  # from guessing to the uncut model: at most what an accuracy's scale is
        assert told.metric.scale is not None and 0.4 * scale < told.metric.scale < scale
    assert told.unclear is None


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(UsageError, match="which direction is better"):
        judge(lambda outputs, labels, reference: float(np.abs(outputs[0]).mean())).told()


def test_a_metric_that_a_constant_wins_by_is_held_against_wrong_orders() -> None:
    def recall(outputs: Any, labels: Any, reference: Any) -> float:
        return float((outputs[0].argmax(1) == 0)[labels == 0].mean())

    told = judge(recall).told()
    assert told.unclear is None and told.guess is not None and told.guess < 0.5
    always = told.baseline.clone()
    always.graph.initializers["w"].const_value = ir.tensor(np.array([[1, 0, 0]] * 3, np.float32), name="w")
    assert told.measure(always).value == 1 and told.measure(always).useful < 0.5


def test_a_model_that_guesses_is_told_from_one_that_knows() -> None:
    assert judge(None, find_metric("top1", Dataset({"x": SCORES}, np.zeros(200, int)))).unclear is None
    mixed = judge(
        None,
        find_metric("top1", Dataset({"x": SCORES}, np.zeros(200, int))),
        lambda truth: np.random.default_rng(5).integers(0, 3, len(truth)),
    )
    assert mixed.unclear is not None and "guessing has" in mixed.unclear


@pytest.mark.parametrize(
    ("asked", "uncut", "scale", "expected"),
    [
        (1.0, 90.0, 100.0, 1.0),
        (2, 0.9, 1.0, 0.02),
        ("2%", 90.0, 100.0, 1.8),
        (0.01, 0.5, None, 0.01),
        ("10 %", 4, None, 0.4),
    ],
)
def test_what_a_drop_means(asked: Any, uncut: float, scale: float | None, expected: float) -> None:
    allowance = Allowance.of(asked)
    assert allowance is not None and allowance.within(uncut, scale) == pytest.approx(expected)


@pytest.mark.parametrize("asked", ["much", "-1", "nan", -0.5, "%"])
def test_drops_that_are_none_are_refused(asked: Any) -> None:
    with pytest.raises(UsageError, match="--max-drop"):
        RunOptions(max_drop=asked)


@pytest.mark.parametrize(("scale", "higher"), [(None, True), (0.0, True), (-1.0, False), (float("inf"), True)])
def test_the_decorator_says_what_it_is_told(scale: float | None, higher: bool) -> None:
    if scale is None:
        function = onnxprune.metric(higher_is_better=higher)(lambda outputs, labels: 0.0)
        assert function.higher_is_better is higher and function.scale is None  # type: ignore[attr-defined]
    else:
        with pytest.raises(UsageError, match="scale"):
            onnxprune.metric(higher_is_better=higher, scale=scale)


def test_as_many_digits_as_differ() -> None:
    assert decimals(98.5, 97.25) == 2 and decimals(0.00261, 0.00263) == 6 and decimals(1.0) == 2


# ---- the floor, and what is said


def quick(**given: Any) -> RunOptions:
    return RunOptions(**{"epochs": 0, "bench_seconds": 0.1, "threads": 1, **given})


def unlabelled(count: int = 300) -> dict[str, Any]:
    with np.load(MODELS / "digits.npz") as data:
        return {"input": data["input"][:count]}


def test_a_ruined_model_is_not_handed_over_unless_forced(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **unlabelled())
    asked = ("run", MLP, "--data", "d.npz", "--target-macs", 0.02, "--epochs", 0, "-o", "out.onnx")
    ruined = call(*asked, "--json", cwd=tmp_path)
    assert ruined.status == 7 and not (tmp_path / "out.onnx").exists(), ruined.err
    assert "of no use" in ruined.err and "--force" in ruined.err
    quality = ruined.json["quality"]
    assert ruined.json["exit_status"] == 7 and quality["useful"] < quality["floor"] and not quality["written"]
    assert (tmp_path / "out.onnxprune" / "pruned.onnx").exists()
    forced = call(*asked, "--force", "--overwrite", cwd=tmp_path)
    assert forced.status == 0 and (tmp_path / "out.onnx").exists(), forced.err


def test_figures_stand_beside_guessing_and_noise(tmp_path: Path) -> None:
    report = onnxprune.run(MLP, unlabelled(), output=tmp_path / "o.onnx", options=quick(target_macs=0.7))
    quality = report.quality
    assert quality.measured and quality.guess == 0 and 0.9 < quality.noise["fidelity"] <= 1
    assert report.exit_status == 0 and quality.useful is not None and 0.5 < quality.useful <= 1
    without = onnxprune.run(MLP, output=tmp_path / "p.onnx", options=quick())
    assert not without.quality.measured and without.quality.useful is None


def test_outputs_that_samples_do_not_exercise_are_named(tmp_path: Path) -> None:
    text = """(float[N,8] x, float[8,32] v, float[32,4] w, float[32,2] u) => (float[N,4] y, float[N,2] z)
    { h = MatMul(x, v) r = Relu(h) y = MatMul(r, w) a = MatMul(r, u) z = Sigmoid(a) }"""
    model = graph(text)
    model.graph.initializers["u"].const_value = ir.tensor(np.zeros((32, 2), np.float32), name="u")
    save_model(model, tmp_path / "m.onnx")
    data = {"x": np.random.default_rng(0).standard_normal((120, 8)).astype(np.float32)}
    report = onnxprune.run(tmp_path / "m.onnx", data, output=tmp_path / "o.onnx", options=quick(target_macs=0.8))
    assert report.quality.unexercised == ("z",) and any("don't exercise" in note for note in report.notes)
    same = {"x": np.ones((60, 8), np.float32)}
    with pytest.raises(DataError, match="hardly differ"):
        onnxprune.run(tmp_path / "m.onnx", same, output=tmp_path / "p.onnx", options=quick(target_macs=0.8))
    assert not (tmp_path / "p.onnx").exists()


def test_labels_that_the_model_does_not_know_end_a_run_before_any_work(tmp_path: Path) -> None:
    data = unlabelled() | {"labels": np.random.default_rng(0).integers(0, 10, 300)}
    with pytest.raises(DataError, match="no better than guessing"):
        onnxprune.run(MLP, data, output=tmp_path / "o.onnx", options=quick())
    assert not list(tmp_path.iterdir())


def test_a_regression_keeps_what_it_explains(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    v, b = rng.standard_normal((4, 96)).astype(np.float32), rng.uniform(-2, 2, 96).astype(np.float32)

    def draw(count: int) -> tuple[Any, Any]:
        x = rng.uniform(-2, 2, (count, 4)).astype(np.float32)
        return x, (0.3 * np.sin(2 * x[:, :1]) + 0.1 * x[:, 1:2] * x[:, 2:3]).astype(np.float32)

    x, y = draw(2000)
    w = np.linalg.lstsq(np.maximum(x @ v + b, 0), y, rcond=1e-4)[0].astype(np.float32)
    model = graph("(float[N,4] x, float[4,96] v, float[96] b, float[96,1] w) => (float[N,1] y)"
                  " { h = MatMul(x, v) a = Add(h, b) r = Relu(a) y = MatMul(r, w) }")  # fmt: skip
    for name, array in (("v", v), ("b", b), ("w", w)):
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    save_model(model, tmp_path / "m.onnx")
    report = onnxprune.run(
        tmp_path / "m.onnx", {"x": x, "labels": y}, output=tmp_path / "o.onnx", options=quick()
    )  # fmt: skip
    unseen, truth = draw(4000)
    explains = [
        1 - ((onnxprune_outputs(path, unseen) - truth) ** 2).mean() / truth.var()
        for path in (tmp_path / "m.onnx", tmp_path / "o.onnx")
    ]
    assert explains[1] > explains[0] - 0.02 and report.target["max_drop"] < 0.01


def onnxprune_outputs(path: Path, x: Any) -> Any:
    from onnxprune.evaluating.evaluate import run_model

    return run_model(open_model(path), {"x": x})[0]


def test_a_slower_result_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = ending.bench_models

    def slow(*arguments: Any, **given: Any) -> Any:
        from dataclasses import replace

        first, second = timed(*arguments, **given)
        return [first, replace(second, against_first=Comparison(0.8, 0.78, 0.82))]

    monkeypatch.setattr(ending, "bench_models", slow)
    report = onnxprune.run(MLP, unlabelled(), output=tmp_path / "o.onnx", options=quick(target_macs=0.7))
    assert report.exit_status == 5 and report.target["slower"]
    assert json.loads((tmp_path / "o.onnxprune" / "report.json").read_text())["exit_status"] == 5
