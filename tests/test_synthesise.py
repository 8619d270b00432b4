"""Calibration inputs from nothing but the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxprune
from onnxprune import RunOptions
from onnxprune.cutting.cut import cut
from onnxprune.evaluating.data import random_dataset
from onnxprune.evaluating.evaluate import predict
from onnxprune.evaluating.metrics import find_metric
from onnxprune.evaluating.sources import as_dataset
from onnxprune.graph.model import open_model
from onnxprune.labels.units import prunable
from onnxprune.normalising.normalise import normalise
from onnxprune.repairing.reconstruct import reconstruct
from onnxprune.scoring.cost import Cost
from onnxprune.training.synthesise import noise_dataset, synthetic_dataset
from tests.conftest import MODELS, call, needs_training
from tests.graphs import graph, random_cut

NORM = "float[4] s, float[4] b, float[4] m, float[4] v"


@needs_training
def test_what_is_made_repairs_a_cut_and_white_noise_does_not() -> None:
    model = normalise(open_model(MODELS / "digits_resnet.onnx"))
    units = prunable(model, "digits_resnet")
    test = as_dataset(str(MODELS / "digits_test.npz"), model, None)
    macs = Cost(units).macs(np.ones(units.count, bool))
    made = synthetic_dataset(model, macs, 0, 2)
    assert made is not None and made.labels is None and len(made) == 256
    alive, top1 = random_cut(units, np.random.default_rng(0), 0.5), []
    for data in (None, random_dataset(model, 256, 0), made):
        pruned, plan = cut(units, alive)
        if data is not None:
            reconstruct(pruned, model, plan, data)
        top1.append(find_metric("top1", test).compute(predict(pruned, test), test.labels, []))
    assert top1[2] > top1[0] + 20 and top1[2] > top1[1] + 5, top1


@needs_training
@pytest.mark.parametrize("opset", [17, 18])
def test_statistics_are_matched(opset: int) -> None:
    """One normalisation of the input itself: what is made has its mean and variance."""
    text = f"""(float[N,4,5,5] x, {NORM}, float[3,4,1,1] w) => (float[N,3,5,5] y)
    {{ n = BatchNormalization(x, s, b, m, v) y = Conv(n, w) }}"""
    model = graph(text, opset=opset)
    wanted = {"m": np.array([-2.0, 0.0, 1.0, 3.0], np.float32), "v": np.array([0.5, 1.0, 2.0, 4.0], np.float32)}
    for name, array in wanted.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    made = synthetic_dataset(model, 1000, 0, 2)
    assert made is not None
    x = made.inputs["x"]
    np.testing.assert_allclose(x.mean((0, 2, 3)), wanted["m"], atol=0.25)
    np.testing.assert_allclose(x.var((0, 2, 3)), wanted["v"], rtol=0.25)
    again = synthetic_dataset(model, 1000, 0, 2)
    assert again is not None and (again.inputs["x"] == x).all()


@pytest.mark.parametrize(
    "text",
    [
        "(float[N,6] x, float[6,5] w) => (float[N,5] y) { y = MatMul(x, w) }",
        f"(float[2,4,5,5] x, {NORM}) => (float[2,4,5,5] y) {{ y = BatchNormalization(x, s, b, m, v) }}",
        f"""(float[2,4,5,5] x, float[2,4,5,5] z, {NORM}) => (float[2,4,5,5] y)
        {{ a = Add(x, z) y = BatchNormalization(a, s, b, m, v) }}""",
    ],
)
def test_models_that_do_not_tell(text: str) -> None:
    assert synthetic_dataset(graph(text), 1000, 0, 1) is None


@needs_training
def test_a_run_without_data_repairs(tmp_path: Path) -> None:
    run = ("run", MODELS / "digits_resnet.onnx", "-o", "o.onnx", "--target-macs", 0.5, "--json")
    result = call(*run, cwd=tmp_path)
    assert result.status == 0, result.err
    assert any("batch-normalisation" in note for note in result.json["notes"])
    test = as_dataset(str(MODELS / "digits_test.npz"), model := open_model(tmp_path / "o.onnx"), None)
    assert find_metric("top1", test).compute(predict(model, test), test.labels, []) > 85
    first = (tmp_path / "o.onnx").read_bytes()
    assert call(*run, "--resume", cwd=tmp_path).status == 0
    assert (tmp_path / "o.onnx").read_bytes() == first


@pytest.mark.parametrize("name", ["digits_mlp", "digits_gru"])
def test_noise_repairs_models_without_statistics(name: str, tmp_path: Path) -> None:
    """What a run fits on noise is well above the same cut alone."""
    report = onnxprune.run(
        MODELS / f"{name}.onnx", output=tmp_path / "o.onnx", options=RunOptions(target_macs=0.5, bench_seconds=0.1)
    )
    assert any("on noise" in note for note in report.notes)
    done = tmp_path / "o.onnxprune"
    call("apply", done / "plan.json", done / "baseline.onnx", "-o", "cut.onnx", cwd=tmp_path)
    test, top1 = as_dataset(str(MODELS / "digits_test.npz"), open_model(tmp_path / "o.onnx"), None), []
    for path in ("cut.onnx", "o.onnx"):
        outputs = predict(open_model(tmp_path / path), test)
        top1.append(find_metric("top1", test).compute(outputs, test.labels, []))
    assert top1[1] > top1[0] + 5, top1


def test_noise_is_like_images() -> None:
    """Neighbours and channels are alike; brightness and contrast differ from sample to sample."""
    model = graph("(float[N,3,32,32] x, float[4,3,3,3] w) => (float[N,4,30,30] y) { y = Conv(x, w) }")
    made = noise_dataset(model, 1000, 0)
    assert made is not None and len(made) == 640 and made.labels is None
    x = made.inputs["x"]
    assert x.dtype == np.float32 and np.isfinite(x).all()
    flat = x - x.mean((2, 3), keepdims=True)
    near, far = (np.mean(flat[..., step:] * flat[..., :-step]) / flat.var() for step in (1, 12))
    assert near > 0.5 > 0.2 > far
    assert np.mean(flat[:, 0] * flat[:, 1]) / flat.var() == pytest.approx(0.5, abs=0.1)
    assert np.quantile(x.std((1, 2, 3)), 0.9) > 3 * np.quantile(x.std((1, 2, 3)), 0.1)
    again = noise_dataset(model, 1000, 0)
    assert again is not None and (again.inputs["x"] == x).all()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("(int64[N] x, float[6,5] w) => (float[N,5] y) { y = Gather(w, x) }", None),
        ("(float[N,6] x, float[6,5] w) => (float[N,5] y) { y = MatMul(x, w) }", 640),
        ("(float[2,6] x, float[2,6] z) => (float[2,6] y) { y = Add(x, z) }", 640),
    ],
)
def test_noise_for_other_models(text: str, count: int | None) -> None:
    made = noise_dataset(graph(text), 1000, 0)
    assert (made if made is None else len(made)) == count
