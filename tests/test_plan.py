"""Plans: composing, storing, and the mask oracle's power to tell a wrong cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxprune.cutting.cut import cut
from onnxprune.cutting.plan import Plan, Removal, load_plan
from onnxprune.cutting.verify import check_cut, mask_oracle
from onnxprune.errors import ModelError, UsageError
from onnxprune.graph.model import open_model
from onnxprune.labels import analyse
from onnxprune.labels.units import find_units
from onnxprune.normalising.normalise import normalise
from tests.conftest import MODELS
from tests.graphs import graph, random_cut


def test_two_cuts_compose_to_one_plan_for_the_baseline() -> None:
    baseline = normalise(open_model(MODELS / "digits_resnet.onnx"))
    current, plan = baseline, Plan({})
    for seed in range(3):
        units = find_units(analyse(current))
        current, step = cut(units, random_cut(units, np.random.default_rng(seed), 0.3))
        plan = plan.then(step)
    assert plan.exact
    assert mask_oracle(baseline, current, plan).difference < 1e-5


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"format": "onnxprune-plan/1", "tensors": 5}',
        '{"format": "onnxprune-plan/1", "tensors": {"v": [{"axis": 1, "size": 4, "removed": [7]}]}}',
        '{"format": "onnxprune-plan/1", "tensors": {"v": [{"axis": 1}]}}',
    ],
)
def test_what_is_no_plan_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UsageError, match="plan"):
        load_plan(tmp_path / "plan.json")


def test_composition_translates_positions() -> None:
    first = Plan({"v": (Removal(1, 5, (0, 3)),)})
    second = Plan({"v": (Removal(1, 3, (1,)),), "w": (Removal(2, 4, (2,)),)})
    assert first.then(second).tensors == {"v": (Removal(1, 5, (0, 2, 3)),), "w": (Removal(2, 4, (2,)),)}


def test_plans_are_stored(tmp_path: Path) -> None:
    plan = Plan({"v": (Removal(1, 5, (0, 3)),)}, (), ("norm",))
    content = plan.to_json("abc")
    assert content["format"] == "onnxprune-plan/1" and content["model_sha256"] == "abc"
    assert content["tensors"]["v"] == [{"axis": 1, "size": 5, "removed": [0, 3]}]
    assert Plan.from_json(content) == plan
    path = tmp_path / "plan.json"
    path.write_text("{}")
    with pytest.raises(UsageError, match=r"can't be read|not a plan"):
        load_plan(path)


def test_the_oracle_tells_a_wrong_cut() -> None:
    baseline = normalise(open_model(MODELS / "digits_resnet.onnx"))
    units = find_units(analyse(baseline))
    group = max(units.groups, key=lambda g: len(g.units))
    good, wrong = np.ones(units.count, bool), np.ones(units.count, bool)
    good[group.units[:4]] = False
    wrong[group.units[1:5]] = False
    pruned, plan = cut(units, good)
    other, _ = cut(units, wrong)
    check_cut(baseline, pruned, plan)
    with pytest.raises(ModelError, match="differs"):
        check_cut(baseline, other, plan)


def test_the_oracle_refuses_the_plan_of_another_model() -> None:
    baseline = normalise(open_model(MODELS / "digits_mlp.onnx"))
    with pytest.raises(ModelError, match="lacks"):
        mask_oracle(baseline, baseline, Plan({"nothing": (Removal(1, 4, (0,)),)}))


QUIET = """(float[N, 3, 8, 8] x, float[8, 3, 3, 3] w, float[8] b, float[2, 8, 1, 1] w2, float[2] b2) =>
  (float[N, ?] y) {
    h = Conv<pads: ints = [1, 1, 1, 1]>(x, w, b)
    r = Relu(h)
    z = Conv(r, w2, b2)
    p = %s(z)
    y = Flatten(p)
}"""


@pytest.mark.parametrize(("activation", "level"), [("Sigmoid", -200.0), ("Relu", -200.0), ("Tanh", 200.0)])
def test_outputs_that_are_saturated_tell_a_cut_from_a_wrong_one(activation: str, level: float) -> None:
    baseline = graph(QUIET % activation)
    bias = baseline.graph.initializers["b2"]
    bias.const_value = ir.tensor(np.full(2, level, np.float32), name="b2")
    units = find_units(analyse(baseline))
    pruned, plan = cut(units, random_cut(units, np.random.default_rng(0)))
    check_cut(baseline, pruned, plan)
    weight = pruned.graph.initializers["w2"].const_value
    assert weight is not None
    pruned.graph.initializers["w2"].const_value = ir.tensor(weight.numpy() * np.float32(1.5), name="w2")
    with pytest.raises(ModelError, match="differs from the masked one"):
        check_cut(baseline, pruned, plan)
