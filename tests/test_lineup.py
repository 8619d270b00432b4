"""Lining up columns: rows are sorted one by one, in all that holds them, and nothing that is computed changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxprune.api import apply, prune, verify
from onnxprune.cutting.plan import Reordering, load_plan
from onnxprune.errors import ModelError
from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import relative_difference, run_model
from onnxprune.graph.model import open_model
from onnxprune.labels import analyse
from onnxprune.labels.units import find_units
from onnxprune.normalising.normalise import normalise
from onnxprune.scoring.lineup import line_up, reorder
from tests.conftest import MODELS
from tests.graphs import graph, proto
from tests.rules.test_rules import EXACT


def lined_up(text: str, granularity: str = "columns") -> tuple[ir.Model, ir.Model, set[str]]:
    model = graph(text)
    ordered = model.clone()
    moved = line_up(find_units(analyse(ordered, granularity)), "l2")  # type: ignore[arg-type]
    return model, ordered, {each.initializer for each in moved}


ROWS = {  # what moves when columns are cut
    "attention by heads": {"w", "o"},
    "einsum of two activations": {"a", "b", "o"},
    "heads folded into a dynamic batch": set(),  # rows and batch are one axis
    "grouped": {"w", "g", "v"},
    "grouped queries": set(),  # one order for a key head and several query heads isn't looked for
    "conv": set(),  # there are no rows
    "channel shuffle": set(),  # what is cut are its rows
}


@pytest.mark.parametrize("name", ROWS)
def test_what_moves_and_that_nothing_changes(name: str) -> None:
    model, ordered, moved = lined_up(EXACT[name][1])
    assert moved == ROWS[name]
    for seed in range(3):
        inputs = random_inputs(model, seed, batch=None)
        assert relative_difference(run_model(model, inputs), run_model(ordered, inputs)) < 1e-5


def test_packed_projections_and_shared_tables_move_with_their_rows() -> None:
    """Queries and keys come from one product; a table that every head shares keeps both from being sorted."""
    text = """(float[N,4,6] x, float[6,24] w, float[6,12] u, float[12,5] o TABLE) => (float[N,4,5] y)
    <int64[2] parts = {12, 12}, int64[4] split = {0,4,3,4}, int64[3] join = {0,4,12}> { p = MatMul(x, w)
      q0, k0 = Split<axis=2>(p, parts) q1 = Reshape(q0, split) k1 = Reshape(k0, split) v0 = MatMul(x, u)
      v1 = Reshape(v0, split) q = Transpose<perm=[0,2,1,3]>(q1) QUERY k = Transpose<perm=[0,2,3,1]>(k1)
      v = Transpose<perm=[0,2,1,3]>(v1) s = MatMul(QQ, k) z = Softmax(s) c = MatMul(z, v)
      d = Transpose<perm=[0,2,1,3]>(c) e = Reshape(d, join) y = MatMul(e, o) }"""
    free = text.replace("TABLE", "").replace("QUERY", "").replace("QQ", "q")
    assert lined_up(free)[2] == {"w", "u", "o"}
    shared = text.replace("TABLE", ", float[4] t").replace("QUERY", "r = Mul(q, t)").replace("QQ", "r")
    assert lined_up(shared)[2] == {"u", "o"}


def test_whole_rows_are_not_torn_apart() -> None:
    assert not lined_up(EXACT["attention by heads"][1], "rows")[2]
    assert not lined_up(EXACT["grouped"][1], "rows")[2]


def test_what_reads_its_neighbours_keeps_its_order() -> None:
    text = """(float[N,3,6,6] x, float[8,3,1,1] w, float[12,4,3,3] g, float[5,12,1,1] v) => (float[N,5,4,4] y)
    { h = Conv(x, w) l = LRN<size=3>(h) e = Conv<group=2>(l, g) y = Conv(e, v) }"""
    assert lined_up(text)[2] == {"g", "v"}


def test_the_useless_column_of_every_row_goes_wherever_it_is(tmp_path: Path) -> None:
    """Half of the positions of every head are zero, others in each: cutting half must lose nothing at all."""
    content = proto(EXACT["einsum of two activations"][1])
    useless = [(0, 1), (2, 3), (1, 2)]
    for tensor in content.graph.initializer:
        if tensor.name in ("a", "b", "o"):
            array = np.array(ir.from_proto(tensor).numpy())
            flat = array if tensor.name == "o" else array.T
            for head, positions in enumerate(useless):
                flat[[4 * head + position for position in positions]] = 0
            tensor.CopyFrom(ir.to_proto(ir.Tensor(array, name=tensor.name)))
    path = tmp_path / "model.onnx"
    path.write_bytes(content.SerializeToString())
    result = prune(path, tmp_path / "out.onnx", 0.5, granularity="columns", plan=tmp_path / "plan.json",
                   baseline=tmp_path / "baseline.onnx")  # fmt: skip
    assert result.params[1] * 2 == result.params[0]
    inputs = random_inputs(open_model(path), 0, batch=3)
    before, after = (run_model(open_model(each), inputs) for each in (path, tmp_path / "out.onnx"))
    assert relative_difference(before, after) < 1e-6
    assert verify(tmp_path / "baseline.onnx", tmp_path / "out.onnx", tmp_path / "plan.json").passed


def test_a_plan_with_moved_columns_is_repeated(tmp_path: Path) -> None:
    model, plan = MODELS / "digits_vit.onnx", tmp_path / "plan.json"
    prune(model, tmp_path / "a.onnx", 0.5, kinds=["qk", "value"], plan=plan)
    assert load_plan(plan).reordered
    again = apply(plan, model, tmp_path / "b.onnx", new_plan=tmp_path / "again.json")
    assert again.compared
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert load_plan(tmp_path / "again.json").to_json("") == load_plan(plan).to_json("")
    with pytest.raises(ModelError, match="reorders"):
        apply(plan, MODELS / "digits_mlp.onnx", tmp_path / "c.onnx")


@pytest.mark.parametrize(
    "wrong",
    [
        Reordering("w", 0, np.array([0, 1, 1])),
        Reordering("w", 2, np.array([0, 1, 2])),
        Reordering("w", 0, np.array([[0, 1, 2]] * 2), 1),
        Reordering("v", 0, np.array([0, 1, 2])),
    ],
)
def test_a_reordering_that_does_not_fit_is_refused(wrong: Reordering) -> None:
    model = normalise(ir.from_proto(proto("(float[N,3] x, float[3,4] w) => (float[N,4] y) { y = MatMul(x, w) }")))
    with pytest.raises(ModelError, match="doesn't fit"):
        reorder(model, [wrong])
