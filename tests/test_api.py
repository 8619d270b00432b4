"""What a program calls: the public names, with paths as strings, and all of them in one process."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import onnxprune
from tests.conftest import MODELS

MODEL, DATA = str(MODELS / "digits_mlp.onnx"), str(MODELS / "digits.npz")


def test_the_small_operations(tmp_path: Path) -> None:
    """One cut, checked, repeated, timed and looked at."""
    small, again = str(tmp_path / "small.onnx"), str(tmp_path / "again.onnx")
    pruned = onnxprune.prune(MODEL, small, 0.5, keep=[onnxprune.Keep("*layers.1*", 0.75)])
    assert pruned.macs[1] < 0.6 * pruned.macs[0]
    plan, baseline = str(tmp_path / "plan.json"), str(tmp_path / "baseline.onnx")
    pruned = onnxprune.prune(MODEL, small, 0.5, plan=plan, baseline=baseline)
    assert onnxprune.verify(baseline, small, plan).passed
    with pytest.raises(onnxprune.UsageError, match="--seeds 0: give one set"):
        onnxprune.verify(baseline, small, plan, seeds=())
    applied = onnxprune.apply(plan, MODEL, again)
    assert applied.macs == pruned.macs and Path(again).read_bytes() == Path(small).read_bytes()
    whole, cut = onnxprune.bench([MODEL, small], seconds=0.2)
    assert cut.size_bytes < whole.size_bytes and cut.against_first.low <= cut.against_first.high
    curves = onnxprune.sensitivity(MODEL, DATA, samples=64).curves
    assert [curve.group for curve in curves] == [group["name"] for group in onnxprune.inspect(MODEL).groups]
    with pytest.raises(onnxprune.UsageError, match="no group has such a name"):
        onnxprune.prune(MODEL, small, 0.5, keep=[onnxprune.Keep("nothing", 0.75)])
    with pytest.raises(onnxprune.ModelError, match="absent"):
        onnxprune.bench([MODEL, str(tmp_path / "absent.onnx")])


def test_a_run_on_arrays(tmp_path: Path) -> None:
    data = np.load(DATA)
    few = {name: data[name][:300] for name in data.files}
    options = onnxprune.RunOptions(target_macs=0.5, epochs=0, bench_seconds=0.1)
    report = onnxprune.run(MODEL, few, output=str(tmp_path / "small.onnx"), options=options)
    assert isinstance(report, onnxprune.Report) and report.pruned.macs <= 0.5 * report.baseline.macs
    again = onnxprune.apply(Path(report.run_dir) / "plan.json", MODEL, tmp_path / "again.onnx")
    assert again.macs[1] == report.pruned.macs and (tmp_path / "small.onnx").exists()


@pytest.mark.parametrize(
    ("option", "value", "advice"),
    [
        ("scope", "all", "--scope all: give global or gradual or layer or isomorphic or raw or priced or auto"),
        (
            "controller",
            "bisection",
            "--controller bisection: give bisect or published or published-text or recursive or recursive-text",
        ),
        ("epochs", 1.5, "--epochs 1.5: give a whole number or nothing"),
        ("target_macs", "0.5", "--target-macs 0.5: give a number or nothing"),
        ("target_macs", 1.0, "--target-macs 1: give the share that may remain, between 0 and 1"),
        ("max_drop", float("nan"), "--max-drop nan: give a number of 0 or more, or one with a % sign, such as 2%"),
        (
            "initial_tau",
            "median",
            "--initial-tau median: there is none; known: deviation, mean, std, quantile, energy, otsu, one of them and "
            "a rate (mean:0.1), or a number above 0",
        ),
        ("layers", -1, "--layers -1: give 0 or more"),
        ("kinds", "width", "--kinds width: give a list, each of it a word"),
        ("batch_statistics", 1, "--batch-statistics 1: give True or False"),
        ("bench_seconds", 0, "--bench-seconds 0: give more than 0"),
        ("threads", True, "--threads True: give a whole number or nothing"),
    ],
)
def test_options_that_do_not_fit_are_refused(option: str, value: object, advice: str) -> None:
    with pytest.raises(onnxprune.UsageError, match=f"^{re.escape(advice)}$"):
        onnxprune.RunOptions(**{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"epochs": np.int64(3), "target_macs": np.float32(0.5), "kinds": ["width"]}])
def test_options_that_fit_are_taken(given: dict[str, object]) -> None:
    assert onnxprune.RunOptions(**given).epochs == 3  # type: ignore[arg-type]


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    small = tmp_path / "small.onnx"
    for given in ({"scope": "all"}, {"granularity": "all"}, {"round_to": 0}, {"layers": "all"}, {"criterion": "all"}):
        with pytest.raises(onnxprune.UsageError, match=next(iter(given)).replace("_", "-")):
            onnxprune.prune(MODEL, small, **given)  # type: ignore[arg-type]
    for given in ({"providers": "cpu"}, {"batch": 0}, {"seconds": "1"}):
        with pytest.raises(onnxprune.UsageError, match="give"):
            onnxprune.bench([MODEL], **given)  # type: ignore[arg-type]
    for given in ({"seed": -1}, {"samples": 0}, {"ratios": 0.5}, {"ratios": [1.0]}, {"parallel": "many"}):
        with pytest.raises(onnxprune.UsageError, match=f"--{next(iter(given))} .*: give"):
            onnxprune.sensitivity(MODEL, DATA, **given)  # type: ignore[arg-type]
    with pytest.raises(onnxprune.UsageError, match="name a model"):
        onnxprune.bench([])
    with pytest.raises(onnxprune.UsageError, match="can't be read as what 'onnxprune sensitivity -o' writes"):
        onnxprune.run(MODEL, output=small, options=onnxprune.RunOptions(prior=str(tmp_path / "absent.json")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [{"epochs": 1}, {"sparsify": 1}, {"minutes": 0.1}])
@pytest.mark.parametrize("eval_data", [None, str(MODELS / "digits_test.npz")])
def test_what_learns_needs_data_to_learn_from(option: dict[str, object], eval_data: str | None, tmp_path: Path) -> None:
    options = onnxprune.RunOptions(target_macs=0.5, **option)  # type: ignore[arg-type]
    with pytest.raises(onnxprune.UsageError, match="give --data"):
        onnxprune.run(MODEL, eval_data=eval_data, output=tmp_path / "small.onnx", options=options)


def fails(outputs: list[np.ndarray], labels: np.ndarray) -> float:
    raise KeyError("no such class")


@pytest.mark.parametrize(
    ("labels", "metric", "advice"),
    [
        (
            np.zeros(20, np.float32),
            None,
            r"shape \(7,\), the first output has shape \(7, 10\): give a number",
        ),
        (np.zeros(20, np.int64), "mse", "give a number for each of the output's"),
        (np.zeros((20, 10), np.float32), "top1", "top1 wants one class index"),
        (
            np.zeros(20, np.int64),
            "tests.test_api:fails",
            "test_api:fails failed: KeyError: 'no such class'",
        ),
    ],
)
def test_labels_that_do_not_fit_the_metric(labels: np.ndarray, metric: str | None, advice: str, tmp_path: Path) -> None:
    few = {"input": np.load(DATA)["input"][:20], "labels": labels}
    options = onnxprune.RunOptions(target_macs=0.5, epochs=0, metric=metric)
    with pytest.raises((onnxprune.DataError, onnxprune.UsageError), match=advice):
        onnxprune.run(MODEL, few, output=tmp_path / "small.onnx", options=options)
    assert not (tmp_path / "small.onnx").exists()


def test_a_single_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(onnxprune.DataError, match="one sample"):
        onnxprune.run(MODEL, {"input": np.load(DATA)["input"][:1], "labels": [0]}, output=tmp_path / "small.onnx")


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"initial_tau": "mean"}, "bisect controller"),
        ({"alpha": 0.5}, "bisect controller"),
        ({"controller": "published", "target_macs": 0.5}, "target"),
        ({"moves": ("distribution",)}, "performance"),
        ({"moves": ("performance",), "layers": 2}, "structure"),
        ({"moves": ("performance",), "scope": "priced"}, "structure"),
        ({"layers": 2, "scope": "global"}, "--scope global"),
        ({"prior": "s.json", "scope": "priced"}, "--prior"),
    ],
)
def test_what_no_threshold_would_heed_is_refused(given: dict[str, object], advice: str) -> None:
    with pytest.raises(onnxprune.UsageError, match=advice):
        onnxprune.RunOptions(**given)  # type: ignore[arg-type]
