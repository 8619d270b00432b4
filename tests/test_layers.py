"""Layers that can be dropped: which they are, and that what is left equals the uncut graph with them silenced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxprune
from onnxprune.api import inspect, prune
from onnxprune.choosing.layers import choose_layers, drop_layers, find_layers, influence_scores, weight_scores
from onnxprune.choosing.select import Keep
from onnxprune.cutting.plan import Plan, load_plan
from onnxprune.cutting.verify import mask_oracle
from onnxprune.errors import UsageError
from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import relative_difference, run_model
from onnxprune.evaluating.sources import as_dataset
from onnxprune.graph.model import open_model
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
    data = as_dataset({"x": np.random.default_rng(0).standard_normal((32, 3, 6, 6)).astype(np.float32)}, model, None)
    by_weight = dict(zip([layer.output.name for layer in found], weight_scores(model, found), strict=True))
    assert min(by_weight, key=lambda name: by_weight[name]) == "t"
    assert by_weight["t"] == 0
    influence = influence_scores(model, found, data)
    assert all(0 <= score <= 2 for score in influence)
    assert [layer.name for layer in choose_layers(found, [3, 1, 2, 0], 2)] == [found[1].name, found[3].name]
    with pytest.raises(UsageError, match="4 layers"):
        choose_layers(found, influence, 5)


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


def test_layers_and_widths_share_one_budget(tmp_path: Path) -> None:
    """At the same share of the MACs, the transformer loses less when it may drop layers."""

    def run(layers: str | None) -> onnxprune.Report:
        options = onnxprune.RunOptions(target_macs=0.3, epochs=0, layers=layers, bench_seconds=0.1)  # type: ignore[arg-type]
        data = [str(MODELS / f"{name}.npz") for name in ("digits", "digits_test")]
        out = tmp_path / f"{layers}.onnx"
        return onnxprune.run(MODELS / "digits_vit.onnx", data[0], eval_data=data[1], output=out, options=options)

    widths, both = run(None), run("auto")
    assert max(widths.pruned.macs, both.pruned.macs) <= 0.3 * both.baseline.macs
    assert any("layers to drop, by loss" in note for note in both.notes)
    assert both.target["drop"] < widths.target["drop"]


def test_layers_go_without_data_where_widths_may_not(tmp_path: Path) -> None:
    """How many is told by the loss on inputs that were made up: here only dropped layers reach the target."""
    options = onnxprune.RunOptions(target_macs=0.7, layers="auto", keep=(Keep("*", 0.9),), bench_seconds=0.1)
    report = onnxprune.run(MODELS / "digits_vit.onnx", output=tmp_path / "o.onnx", options=options)
    assert any("layers to drop, by loss" in note for note in report.notes)
    assert report.pruned.macs <= 0.7 * report.baseline.macs
    assert load_plan(tmp_path / "o.onnxprune" / "plan.json").layers
