"""Models whose samples don't lie along the first axis, or that run at few sizes only, as those of speech and text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxprune
from onnxprune.errors import ModelError
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.evaluate import predict
from onnxprune.graph.model import open_model
from tests.graphs import graph, proto

BY_TIME = """(float[%s, T, 6] x, float[1, 32, 6] w, float[1, 32, 8] r, float[8, 3] v) => (float[T, %s, 3] y) {
    t = Transpose<perm: ints = [1, 0, 2]>(x)
    h = LSTM<hidden_size: int = 8>(t, w, r)
    one = Constant<value_ints: ints = [1]>()
    s = Squeeze(h, one)
    y = MatMul(s, v)
}"""
FIXED = {"step": "float[1, 6] x, float[2, 1, 8] state", "batch": "float[N, 6] x, float[2, N, 8] state"}
STATEFUL = """(%s, float[8, 8] v, float[6, 8] u) => (float[1, %s, 8] y) {
    zero = Constant<value_ints: ints = [0]>()
    first = Gather(state, zero)
    h = MatMul(x, u)
    r = Relu(h)
    a = MatMul(r, v)
    y = Add(a, first)
}"""
FOUND = """(float[N, 6] x, float[6, 16] w, float[16, 4] v) => (float[M, 4] y) {
    h = MatMul(x, w)
    r = Relu(h)
    y0 = MatMul(r, v)
    zero = Constant<value: tensor = float {0.0}>()
    over = Greater(y0, zero)
    ones = Cast<to: int = 7>(over)
    axis = Constant<value_ints: ints = [1]>()
    count = ReduceSum<keepdims: int = 0>(ones, axis)
    two = Constant<value: tensor = int64 {2}>()
    found = Greater(count, two)
    y = Compress<axis: int = 0>(y0, found)
}"""


def saved(text: str, folder: Path, inputs: tuple[str, ...] = ("x",)) -> Path:
    onnx.save(proto(text, inputs), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(("batch", "length"), [("N", 5), ("1", 5), ("4", 5), ("N", 64), ("4", 4)])
def test_outputs_by_time_are_moved_to_their_samples(batch: str, length: int) -> None:
    model = graph(BY_TIME % (batch, batch))
    data = np.random.default_rng(0).standard_normal((70, length, 6)).astype(np.float32)
    found = predict(model, Dataset({"x": data}, None))[0]
    assert found.shape[:2] == (len(data), length)
    turned = predict(model, Dataset({"x": data[::-1].copy()}, None))[0]
    np.testing.assert_allclose(found, turned[::-1], atol=1e-6)


def test_a_run_on_a_model_by_time(tmp_path: Path) -> None:
    path, data = saved(BY_TIME % ("1", "1"), tmp_path), np.random.default_rng(0).standard_normal((40, 7, 6))
    options = onnxprune.RunOptions(target_macs=0.6, epochs=0, bench_seconds=0.1)
    report = onnxprune.run(path, {"x": data.astype(np.float32)}, output=tmp_path / "out.onnx", options=options)
    assert report.pruned.macs <= 0.6 * report.baseline.macs


@pytest.mark.parametrize("name", FIXED)
def test_states_are_cut_by_weights_and_refused_as_samples(name: str, tmp_path: Path) -> None:
    path = saved(STATEFUL % (FIXED[name], "1" if name == "step" else "N"), tmp_path, ("x", "state"))
    onnxprune.prune(path, tmp_path / "out.onnx", 0.5)
    data = {"x": np.zeros((20, 6), np.float32), "state": np.zeros((20, 1, 8), np.float32)}
    for given in (None, data):
        with pytest.raises(ModelError, match=r"input 'state' .* doesn't have one row for each sample of 'x'.*prune"):
            onnxprune.run(path, given, output=tmp_path / "run.onnx")


def test_a_scalar_input_is_no_sample(tmp_path: Path) -> None:
    text = """(float[N, 6] x, float rate, float[6, 16] w, float[16, 4] v) => (float[N, 4] y) {
        h = MatMul(x, w)
        r = Relu(h)
        s = Mul(r, rate)
        y = MatMul(s, v)
    }"""
    path = saved(text, tmp_path, ("x", "rate"))
    onnxprune.prune(path, tmp_path / "out.onnx", 0.5)
    with pytest.raises(ModelError, match="input 'rate'"):
        onnxprune.run(path, output=tmp_path / "run.onnx")


def test_what_a_model_finds_is_no_output_to_compare(tmp_path: Path) -> None:
    path, data = saved(FOUND, tmp_path), np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    with pytest.raises(ModelError, match="other shapes than the uncut model's"):
        onnxprune.run(path, {"x": data}, output=tmp_path / "run.onnx", options=onnxprune.RunOptions(epochs=0))


SHORT = """(float[N, 3, T] x, float[8, 3, 3] w, float[6, 8, 3] v, float[1, 6, 12] p) => (float[N, 6, M] y) {
    h = Conv<pads: ints = [1, 1]>(x, w)
    r = Relu(h)
    z = Conv<pads: ints = [1, 1]>(r, v)
    y = Add(z, p)
}"""


def test_a_benchmark_finds_sizes_that_run(tmp_path: Path) -> None:
    """Positions were learned for twelve steps, so other lengths fail."""
    path = saved(SHORT, tmp_path)
    assert onnxprune.bench([path], seconds=0.1)[0].latency.median > 0
    with pytest.raises(ModelError, match="onnxruntime failed to run"):
        onnxprune.bench([path], seconds=0.1, shapes={"x": (1, 3, 11)})


def test_a_run_times_what_the_data_is_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "(float[N, 3, H, W] x, float[8, 3, 3, 3] w, float[6, 8, 1, 1] v) => (float[N, 6, A, B] y) {"
    path = saved(text + "h = Conv(x, w) r = Relu(h) y = Conv(r, v) }", tmp_path)
    seen = list[object]()
    from onnxprune.running import ending

    bench = ending.bench_models
    monkeypatch.setattr(ending, "bench_models", lambda *a, **k: seen.append(k["shapes"]) or bench(*a, **k))
    data = np.random.default_rng(0).standard_normal((30, 3, 12, 20)).astype(np.float32)
    options = onnxprune.RunOptions(target_macs=0.6, epochs=0, bench_seconds=0.1)
    onnxprune.run(path, {"x": data}, output=tmp_path / "out.onnx", options=options)
    assert seen == [{"x": (1, 3, 12, 20)}]
    assert open_model(tmp_path / "out.onnx").graph.inputs[0].shape is not None
