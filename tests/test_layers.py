"""Layers that can be dropped: which they are, and that what is left equals the uncut graph with them silenced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxprune
from onnxprune.api import inspect, prune
from onnxprune.choosing.layers import choose_layers, drop_layers, find_layers, layer_norms, weight_scores
from onnxprune.choosing.select import Keep
from onnxprune.cutting.plan import Plan, load_plan
from onnxprune.cutting.verify import mask_oracle
from onnxprune.errors import UsageError
from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import relative_difference, run_model
from onnxprune.graph.model import open_model, save_model
from onnxprune.normalising.normalise import normalise
from tests.conftest import MODELS
from tests.graphs import graph

CHAIN = """(float[N,3,6,6] x, float[4,3,1,1] stem, float[4,4,3,3] a, float[4] s, float[4] b, float[4] m, float[4] var,
float[4,1,3,3] d, float[4,4,1,1] p, float[8,4,1,1] w, float[8,8] f, float[8] g, float[8,5] o) => (float[N,5] y)
<int64[2] space = {2, 3}> { h = Conv(x, stem) r = Relu(h)
  c = Conv<pads=[1,1,1,1]>(r, a) n = BatchNormalization(c, s, b, m, var) u = LeakyRelu(n)
  e = Conv<pads=[1,1,1,1], group=4>(u, d) q = Conv(e, p) t = Relu(q)
  z = Conv(t, w) v = ReduceMean<keepdims=0>(z, space) k = MatMul(v, f) l = Add(k, g) i = Gelu(l) y = MatMul(i, o) }"""
RESIDUAL = """(float[N,4,6,6] x, float[4,4,1,1] a, float[4,4,1,1] b, float[4,4,1,1] c, float[5,4,1,1] d)
=> (float[N,5,6,6] y) { p = Conv(x, a) q = Relu(p) r = Conv(q, b) s = Relu(r) t = Add(s, q) u = Add(q, t)
  v = Conv(u, c) y = Conv(v, d) }"""


def names(model: ir.Model) -> dict[str, str]:
    """What is kept by what comes out, for every layer."""
    return {layer.output.name or "": layer.kept.name or "" for layer in find_layers(model)}


def test_layers_of_a_chain_go_with_what_follows_them() -> None:
    assert names(graph(CHAIN)) == {"u": "r", "e": "u", "t": "e", "i": "v"}


def test_layers_inside_a_residual_branch_go_with_it() -> None:
    assert names(graph(RESIDUAL)) == {"q": "x", "t": "q", "u": "q", "v": "u"}


@pytest.mark.parametrize("text", [CHAIN, RESIDUAL])
def test_every_choice_of_layers_equals_the_graph_without_them(text: str) -> None:
    model = graph(text)
    found = [layer.name for layer in find_layers(model)]
    for bits in range(1, 2 ** len(found)):
        chosen = [name for index, name in enumerate(found) if bits >> index & 1]
        thinner, plan = drop_layers(model, chosen)
        assert mask_oracle(model, thinner, plan, seeds=(0, 1)).difference < 1e-5
        assert not {name for name in plan.removed_nodes if name in {node.name for node in thinner.graph}}


def test_the_oracle_sees_a_layer_that_is_still_there() -> None:
    model = graph(CHAIN)
    thinner, plan = drop_layers(model, [find_layers(model)[0].name])
    assert mask_oracle(model, thinner, Plan({})).difference > 1e-3
    assert mask_oracle(model, model, plan).difference > 1e-3


@pytest.mark.parametrize(
    "text",
    [
        "(float[N,6] x, float[6,6] a) => (float[N,6] y) { y = MatMul(x, a) }",  # an output must be made by something
        "(float[N,6] x, float[6,8] a, float[8,5] b) => (float[N,5] y) { h = MatMul(x, a) y = MatMul(h, b) }",
        "(float[N,6,6] x, float[6,6] a, float[6,5] b) => (float[N,6,5] y) { h = MatMul(x, x) y = MatMul(h, b) }",
    ],
)
def test_what_is_no_layer(text: str) -> None:
    assert not find_layers(graph(text))


def test_a_layer_that_does_nothing_scores_lowest() -> None:
    model = graph(CHAIN)
    found = find_layers(model)
    for layer in found:
        if layer.output.name == "t":
            value = layer.weights[0]
            value.const_value = ir.Tensor(np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1), name=value.name)
    by_weight = dict(zip([layer.output.name for layer in found], weight_scores(model, found), strict=True))
    assert min(by_weight, key=lambda name: by_weight[name]) == "t"
    assert by_weight["t"] == 0
    assert [layer.name for layer in choose_layers(found, [3, 1, 2, 0], 2)] == [found[1].name, found[3].name]
    with pytest.raises(UsageError, match="4 layers"):
        choose_layers(found, [3, 1, 2, 0], 5)


def test_layers_are_dropped_and_widths_cut_in_one_go(tmp_path: Path) -> None:
    source, output = MODELS / "digits_resnet.onnx", tmp_path / "out.onnx"
    assert [layer["kind"] for layer in inspect(source).layers] == ["layer"] * 3
    result = prune(source, output, 0.5, layers=2)
    assert result.compared
    assert len(result.plan.layers) == 2
    model = normalise(open_model(source))
    alone, _ = drop_layers(model, [name for name, _ in result.plan.layers])
    inputs = random_inputs(model, 0, batch=None)
    assert relative_difference(run_model(model, inputs), run_model(alone, inputs)) > 1e-3


@pytest.mark.parametrize(("order", "wanted"), [(1.0, 2.0), (2.0, np.sqrt(5)), (np.inf, 3.0)])
def test_norms_of_layers_are_by_size(order: float, wanted: float) -> None:
    model = graph(RESIDUAL)
    for name in ("a", "b", "c"):
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(np.tile(np.array([1, 3], np.float32), 8).reshape(4, 4, 1, 1), name=name)
    assert list(layer_norms(model, find_layers(model)[:1], order).values()) == [pytest.approx(wanted)]


def test_layers_whose_norm_is_small_beside_the_largest_go(tmp_path: Path) -> None:
    given = {"scope": "raw", "criterion": "magnitude", "layer_norm": "2:0.9", "target_macs": 0.7}
    report = run_residual([1.0, 0.0, 1.0], tmp_path, **given)
    (record,) = report.rounds
    assert len(record["layers"]) == 1 and record["removed_layers"]
    with pytest.raises(UsageError, match="layer-norm"):
        onnxprune.RunOptions(scope="raw", layer_norm="3")
    with pytest.raises(UsageError, match="scope raw"):
        onnxprune.RunOptions(layer_norm="2")


def residual(strengths: list[float]) -> ir.Model:
    """Residual branches of 16 channels, and how much each adds."""
    body = " ".join(
        f"h{i} = MatMul(x{i}, a{i}) r{i} = Relu(h{i}) b{i}_ = MatMul(r{i}, b{i}) x{i + 1} = Add(x{i}, b{i}_)"
        for i in range(len(strengths))
    )
    given = ", ".join(f"float[16,32] a{i}, float[32,16] b{i}" for i in range(len(strengths)))
    last = len(strengths)
    model = graph(
        f"(float[N,8] x, float[8,16] stem, {given}, float[16,4] head) => (float[N,4] y) "
        f"{{ x0 = MatMul(x, stem) {body} y = MatMul(x{last}, head) }}"
    )
    for i, strength in enumerate(strengths):
        value = model.graph.initializers[f"b{i}"]
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(strength), name=value.name)
    return model


def run_residual(strengths: list[float], folder: Path, **options: object) -> onnxprune.Report:
    folder.mkdir(exist_ok=True)
    save_model(residual(strengths), folder / "model.onnx")
    x = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    given = onnxprune.RunOptions(**{"epochs": 0, "bench_seconds": 0.1, "round_to": 1, **options})  # type: ignore[arg-type]
    return onnxprune.run(folder / "model.onnx", {"x": x}, output=folder / "out.onnx", options=given)


def test_a_layer_that_adds_nothing_goes_first(tmp_path: Path) -> None:
    report = run_residual([1.0, 0.0, 1.0], tmp_path, target_macs=0.75)
    gone = [name for record in report.rounds for name in record["layers"]]
    thinner = [layer.output.name for layer in find_layers(normalise(residual([1.0, 0.0, 1.0]))) if layer.name in gone]
    assert thinner == ["x2"]
    assert report.pruned.fidelity["fidelity"] > 0.99


def test_at_most_so_many_layers_go_and_all_of_them_are_judged(tmp_path: Path) -> None:
    report = run_residual([0.0, 0.0, 0.0, 1.0], tmp_path, target_macs=0.5, layers=1)
    assert sum(len(record["layers"]) for record in report.rounds) == 1
    none = run_residual([0.0, 0.0, 1.0], tmp_path / "none", target_macs=0.5, layers=0)
    assert not any(record["layers"] for record in none.rounds)


def test_layers_that_cost_too_much_stay(tmp_path: Path) -> None:
    """Every round is judged, also one that drops layers: nothing leaves a run that lost more than was allowed."""
    data = [str(MODELS / f"{name}.npz") for name in ("digits", "digits_test")]
    options = onnxprune.RunOptions(max_drop=0.1, epochs=0, layers=3, bench_seconds=0.1, criterion="flap")
    report = onnxprune.run(
        MODELS / "digits_resnet.onnx", data[0], eval_data=data[1], output=tmp_path / "o.onnx", options=options
    )
    assert report.target["drop"] <= 0.1


def test_who_may_drop_layers_loses_no_more(tmp_path: Path) -> None:
    """At the same share of the MACs, the transformer loses no more where layers may go with widths."""

    def run(layers: int | None) -> onnxprune.Report:
        options = onnxprune.RunOptions(target_macs=0.3, epochs=0, layers=layers, bench_seconds=0.1)
        data = [str(MODELS / f"{name}.npz") for name in ("digits", "digits_test")]
        out = tmp_path / f"{layers}.onnx"
        return onnxprune.run(MODELS / "digits_vit.onnx", data[0], eval_data=data[1], output=out, options=options)

    widths, both = run(0), run(None)
    assert max(widths.pruned.macs, both.pruned.macs) <= 0.3 * both.baseline.macs
    assert "with layers" not in " ".join(widths.contest) and "with layers" in " ".join(both.contest)
    assert both.target["drop"] <= widths.target["drop"] < 4.07  # what it lost before layers and units had prices


def test_layers_go_without_data_where_widths_may_not(tmp_path: Path) -> None:
    """What they lose is measured on inputs that were made up: here only dropped layers reach the target."""
    options = onnxprune.RunOptions(target_macs=0.7, layers="auto", keep=(Keep("*", 0.9),), bench_seconds=0.1)
    report = onnxprune.run(MODELS / "digits_vit.onnx", output=tmp_path / "o.onnx", options=options)
    assert report.pruned.macs <= 0.7 * report.baseline.macs
    assert load_plan(tmp_path / "o.onnxprune" / "plan.json").layers
