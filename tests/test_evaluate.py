"""Metrics against their definitions, and the benchmark's statistics."""

from __future__ import annotations

import os

import numpy as np
import onnx_ir as ir
import pytest

from onnxprune.benchmarking.bench import Runtime, bench_models, compare, find_providers, profile_model
from onnxprune.errors import DataError, UsageError
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.judge import Judge
from onnxprune.evaluating.metrics import find_metric
from onnxprune.graph.threads import number_of_threads, session_options
from tests.conftest import MODELS
from tests.graphs import graph

X = {"x": np.zeros((4, 2), np.float32)}
SCORES = np.array([[3.0, 2, 1], [1, 3, 2], [1, 2, 3], [3, 1, 2]], np.float32)
OTHER = np.array([[3.0, 2, 1], [3, 1, 2], [1, 2, 3], [3, 1, 2]], np.float32)
LABELLED = Dataset(X, np.array([0, 2, 2, 1]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("top1", 50.0), ("top2", 75.0), ("top3", 100.0), ("agreement", 75.0), (None, 50.0)],
)
def test_metrics_of_classes(name: str | None, expected: float) -> None:
    assert find_metric(name, LABELLED).compute([SCORES], LABELLED.labels, [OTHER]) == expected


def test_fidelity_metrics() -> None:
    for name in ("fidelity", "cosine", "spearman"):
        assert find_metric(name, LABELLED).compute([SCORES], None, [SCORES]) == pytest.approx(100)
    assert find_metric("kl", LABELLED).compute([SCORES], None, [SCORES]) == pytest.approx(0)
    p, q = (np.exp(s) / np.exp(s).sum(1, keepdims=True) for s in (OTHER, SCORES))
    expected = (p * np.log(p / q)).sum(1).mean()
    assert find_metric("kl", LABELLED).compute([SCORES], None, [OTHER]) == pytest.approx(expected, rel=1e-5)


def test_regression_metrics() -> None:
    data = Dataset(X, np.array([1.0, 2, 3, 4], np.float32))
    outputs = [np.array([[1.0], [2], [3], [6]], np.float32)]
    assert find_metric(None, data).compute(outputs, data.labels, outputs) == 1.0
    assert find_metric("mae", data).compute(outputs, data.labels, outputs) == 0.5
    assert find_metric("mse", data).drop(1.0, 3.0) == 2.0
    assert find_metric("top1", LABELLED).drop(90.0, 88.0) == 2.0


def test_metrics_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="labels"):
        find_metric("top1", Dataset(X, None))
    with pytest.raises(UsageError, match="known"):
        find_metric("bleu", LABELLED)
    assert find_metric(None, Dataset(X, None)).name == "fidelity"


def test_a_slower_model_is_told_from_noise() -> None:
    rng = np.random.default_rng(0)
    first = 1 + 0.05 * rng.random(200)
    result = compare(first, first * 1.5)
    assert result.differs and result.low <= result.speedup <= result.high
    assert result.speedup == pytest.approx(1 / 1.5)


def test_equal_models_are_not_told_apart_nineteen_times_in_twenty() -> None:
    """Whatever the machine does in between, and wherever sessions lie in memory."""
    verdicts = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        drift = 1 + 0.2 * np.sin(np.arange(200) / 20).reshape(10, 20)
        noise, placed = 0.1 * rng.random((2, 10, 20)), 1 + 0.015 * rng.standard_normal((2, 10, 1))
        verdicts.append(compare(*((drift + noise) * placed)).differs)
    assert 0.02 < np.mean(verdicts) < 0.08


@pytest.mark.parametrize("runtime", [Runtime(1, "none"), Runtime(1, "basic", {}, bound=True)])
def test_bench_runs_models_as_it_is_told(runtime: Runtime) -> None:
    paths = [MODELS / "digits_mlp.onnx", MODELS / "digits_resnet.onnx"]
    results = bench_models(paths, seconds=0.2, runtime=runtime, shapes={"input": [3, 1, 8, 8]})
    assert all(result.latency.runs >= 20 and result.first_ms > 0 for result in results)
    operators = {row.operator for row in profile_model(paths[1], runtime=runtime)}
    assert "Nchwc Conv" not in operators and ("BatchNormalization" in operators) == (runtime.optimization == "none")
    with pytest.raises(UsageError, match="input 'input' takes"):
        bench_models(paths, seconds=0.2, shapes={"input": [3, 1, 8, 9]})
    with pytest.raises(UsageError, match="no input is called 'x'"):
        bench_models(paths, seconds=0.2, shapes={"x": [3]})


def test_bench_measures_every_model_on_every_provider() -> None:
    paths = [MODELS / "digits_resnet.onnx", MODELS / "digits_mlp.onnx"]
    results = bench_models(paths, ["cpu"], threads=1, seconds=0.2)
    assert [result.model for result in results] == [str(path) for path in paths]
    for result, path in zip(results, paths, strict=True):
        assert result.latency.runs >= 20 and 0 < result.latency.median <= result.latency.p90
        assert result.size_bytes == path.stat().st_size
    assert results[0].against_first.speedup == 1


def test_an_absent_provider_lists_what_is_there() -> None:
    with pytest.raises(UsageError, match="cpu"):
        find_providers(["cpu", "warp"])
    assert find_providers(["CPUExecutionProvider", "cpu"]) == ["CPUExecutionProvider"] * 2


def test_the_error_of_a_drop_is_that_of_a_sample() -> None:
    """A model that is right at random nine times in ten: the drop's standard error is that of a binomial share."""
    model = graph("(float[N,3] x, float[3,3] w) => (float[N,3] y) { y = MatMul(x, w) }")
    worse = model.clone()
    model.graph.initializers["w"].const_value = ir.tensor(np.eye(3, dtype=np.float32), name="w")
    worse.graph.initializers["w"].const_value = ir.tensor(np.diag([1, 1, -1]).astype(np.float32), name="w")
    for count in (400, 4000):
        labels = np.random.default_rng(count).choice(3, count, p=[0.45, 0.45, 0.1])
        data = Dataset({"x": np.eye(3, dtype=np.float32)[labels]}, labels)
        verdict = Judge(model, data, find_metric("top1", data), 1, True).measure(worse)
        share = (labels == 2).mean()
        assert verdict.drop == pytest.approx(100 * share)
        assert 0.5 < verdict.error / (100 * np.sqrt(share * (1 - share) / count)) < 1.6
        assert verdict.most == verdict.drop + verdict.error
        known = Judge(model, data, find_metric("top1", data), 1, True, apart=False).measure(worse)
        assert known.most == known.drop == verdict.drop
    few = Dataset({"x": data.inputs["x"][:5]}, labels[:5])
    assert Judge(model, few, find_metric("top1", few), 1, True).measure(worse).error == 0.0


@pytest.mark.parametrize(("given", "asked", "threads"), [("3", None, 3), ("3", 2, 2), ("", None, 0), ("many", None, 0)])
def test_the_usual_variable_says_how_many_threads_work(
    given: str, asked: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert session_options(asked).intra_op_num_threads == threads
    assert number_of_threads(asked) == (threads or os.cpu_count())
