"""The mask oracle: the strongest check of a cut.

The uncut baseline, with every removed position of every tensor in the plan set to zero, must compute what the pruned
model computes, to float rounding, wherever the plan is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.cutting.compensate import compensate
from onnxprune.cutting.plan import Plan
from onnxprune.cutting.standin import needed, stand_in_session
from onnxprune.errors import ModelError
from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import (
    all_shapes,
    comparable_form,
    relative_difference,
    run_model,
    run_on_all,
    tolerance,
    total_form,
)
from onnxprune.graph.shapes import add_initializer, dynamic_sizes
from onnxprune.labels.pointwise import SUMS

BOUND = 1.0  # beside the largest output, of what differs behind nodes of which a mask shows nothing
SATURATING = {"Sigmoid", "HardSigmoid", "Tanh", "Relu", "Clip"}  # whose outputs may all be the same, or rounding alone
LAID_OUT = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"}  # the same numbers


Outcome = Literal["equal", "different", "not comparable"]


@dataclass(frozen=True)
class OracleResult:
    """The largest relative difference found, where both models must agree, and what that says.

    `exact` says that the plan promises none. `open_nodes` are the inexact nodes for which a mask shows nothing: behind
    them models may differ by `open_difference`, at most as much as the outputs' own size. `unseen` are the outputs that
    were nowhere finite. `allowed` is what rounding may make of equal models.
    """

    difference: float
    exact: bool
    open_nodes: tuple[str, ...] = ()
    open_difference: float = 0.0
    unseen: tuple[str, ...] = ()
    allowed: float = 1e-4

    @property
    def outcome(self) -> Outcome:
        """Equal, different, or not comparable: nothing differs, but not everything could be compared."""
        if not self.difference <= self.allowed or not self.open_difference <= BOUND:
            return "different"
        return "not comparable" if self.open_nodes or self.unseen else "equal"

    @property
    def comparable(self) -> bool:
        """Whether everything was compared."""
        return not self.open_nodes and not self.unseen

    @property
    def why(self) -> str:
        """What could not be compared, in words."""
        parts = []
        if self.open_nodes:
            many = (
                f"node {self.open_nodes[0]!r} mixes"
                if len(self.open_nodes) == 1
                else (f"{len(self.open_nodes)} nodes, first {self.open_nodes[0]!r}, mix")
            )
            parts.append(f"{many} what was cut with what is left (relative difference {self.open_difference:.1e})")
        if self.unseen:
            parts.append(f"output {self.unseen[0]!r} is nowhere finite on the inputs that were tried")
        return "; ".join(parts)


def masked_model(baseline: ir.Model, plan: Plan) -> ir.Model:
    """A copy of the baseline that sets what the plan removes to zero, tensor by tensor.

    Where, not Mul: what is removed may be infinite by then (something divided by a zero), and zero times that is NaN.
    Raises `ModelError` when the plan names a value that the baseline lacks.
    """
    model = baseline.clone()
    values = {value.name: value for node in model.graph for value in node.outputs}
    values.update({value.name: value for value in model.graph.inputs})
    latest: dict[str, ir.Value] = {}  # what takes the place of a value
    for name, removals in plan.tensors.items():
        if name not in values:
            raise ModelError(f"the plan names {name!r}, which the baseline lacks; is it the plan of another model?")
        value = values[name]
        dtype = value.dtype.numpy() if value.dtype is not None else _float_type(baseline)
        zero = add_initializer(model, f"{name}.zero", np.zeros((), dtype))
        current, inside = value, set[ir.Node]()
        for removal in removals:
            keep = np.ones(removal.size, bool)
            keep[list(removal.removed)] = False
            shape = [1] * (_rank(value, removal.axis) - removal.axis)
            shape[0] = removal.size
            mask = add_initializer(model, f"{name}.mask", keep.reshape(shape))
            current, steps = _masked(model, current, mask, zero, f"{name}.masked{removal.axis}")
            inside.update(steps)
        _redirect(value, current, inside)
        latest[name] = current
    for name, kept in plan.layers:
        _silence(model, name, latest.get(kept, values.get(kept)), latest)
    return model


def _silence(model: ir.Model, name: str, kept: ir.Value | None, latest: dict[str, ir.Value]) -> None:
    """Multiplies by zero what a dropped layer adds to the value that is `kept`, or what it makes instead of it."""
    last = next((node for node in model.graph if node.name == name), None)
    if last is None or kept is None:
        raise ModelError(f"the plan drops layer {name!r}, which the baseline lacks; is it the plan of another model?")
    output = last.outputs[0]
    kind = output.dtype.numpy() if output.dtype is not None else _float_type(model)
    zero = add_initializer(model, f"{name}.zero", np.zeros((), kind))
    if last.op_type in SUMS and kept in last.inputs:  # a residual branch
        side = 1 - list(last.inputs).index(kept)
        silent = ir.node("Mul", [last.inputs[side], zero], name=f"{name}.silenced")
        model.graph.insert_before(last, silent)
        last.replace_input_with(side, silent.outputs[0])
    else:
        silent = ir.node("Mul", [output, zero], name=f"{name}.silenced")
        passed = ir.node("Add", [kept, silent.outputs[0]], name=f"{name}.passed")
        passed.outputs[0].name = passed.name
        model.graph.insert_after(last, [silent, passed])
        _redirect(output, passed.outputs[0], {silent})
        latest[output.name or ""] = passed.outputs[0]
    silent.outputs[0].name = silent.name


def _masked(
    model: ir.Model, value: ir.Value, mask: ir.Value, zero: ir.Value, name: str
) -> tuple[ir.Value, list[ir.Node]]:
    """The value where the mask is true, zero elsewhere, and the nodes that make it so.

    Small integers, for which Where has no kernel, go as int32.
    """
    kind, steps = zero.dtype, list[ir.Node]()

    def add(op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=name if not steps else f"{name}.{len(steps)}")
        node.outputs[0].name = node.name
        steps.append(node)
        return node.outputs[0]

    if kind == ir.DataType.BOOL:
        result = add("And", [mask, value])
    elif kind is not None and kind.is_integer() and kind not in (ir.DataType.INT32, ir.DataType.INT64):
        wide = [add("Cast", [each], to=int(ir.DataType.INT32)) for each in (value, zero)]
        result = add("Cast", [add("Where", [mask, *wide])], to=int(kind))
    else:
        result = add("Where", [mask, value, zero])
    producer = value.producer()
    assert producer is not None
    model.graph.insert_after(producer, steps)
    return result, steps


def _redirect(value: ir.Value, masked: ir.Value, inside: set[ir.Node]) -> None:
    for node, index in list(value.uses()):
        if node not in inside:
            node.replace_input_with(index, masked)


def _rank(value: ir.Value, axis: int) -> int:
    rank = value.meta.get("rank")
    if rank is None and value.shape is not None:
        rank = len(value.shape)
    return int(rank) if rank is not None else axis + 1


def _float_type(model: ir.Model) -> np.dtype[np.generic]:
    for value in model.graph.inputs:
        if value.dtype is not None and value.dtype.is_floating_point():
            return np.dtype(value.dtype.numpy())
    return np.dtype(np.float32)


def mask_oracle(baseline: ir.Model, pruned: ir.Model, plan: Plan, seeds: tuple[int, ...] = (0, 1, 2)) -> OracleResult:
    """Compares the pruned model with the masked baseline on signed random inputs, one set for each seed.

    Dynamic dimensions get other sizes from one seed to the next. Outputs that come from an activation are compared
    together with what goes into it.
    """
    shapes = all_shapes(baseline)
    for node in baseline.graph:
        for value in node.outputs:
            if (shape := shapes(value)) is not None:
                value.meta["rank"] = len(shape)
                if value.type is None and (kind := shapes.first.types.get(value.name or "")) is not None:
                    value.type = ir.TensorType(ir.DataType(kind.tensor_type.elem_type))
    masked = masked_model(baseline, plan)
    removed, layers = dict(plan.tensors), dict(plan.layers)
    for node in baseline.graph:
        if node.name in layers and layers[node.name] in removed:  # the sum is what is kept, and cut as that is
            removed[node.outputs[0].name or ""] = removed[layers[node.name]]
    open_nodes = compensate(masked, plan.inexact_nodes, removed, shapes)
    masked, pruned, sources = _with_sources(comparable_form(masked), comparable_form(pruned))
    inputs = [random_inputs(baseline, seed, batch=None, walk=index % 2) for index, seed in enumerate(seeds)]
    sessions = [stand_in_session(model) if needed(masked, pruned) else None for model in (masked, pruned)]
    before, after = (run_on_all(*each) for each in zip((masked, pruned), (inputs, inputs), sessions, strict=True))
    names, behind = [value.name or "" for value in baseline.graph.outputs], _behind(masked, set(open_nodes))
    found = _compared(_joined(before, sources), _joined(after, sources), names)
    if any(math.isnan(each) for each in found.values()) or _has_gaps(before):
        again = [run_on_all(total_form(model), inputs) for model in (masked, pruned)]
        total = _compared(_joined(again[0], sources), _joined(again[1], sources), names)
        found = {name: _larger(found[name], total[name]) for name in names}
    strict = [each for name, each in found.items() if name not in behind]
    return OracleResult(
        max((each for each in strict if not math.isnan(each)), default=0.0),
        plan.exact,
        tuple(open_nodes),
        max((found[name] for name in behind if not math.isnan(found[name])), default=0.0),
        tuple(name for name, each in found.items() if math.isnan(each)),
        tolerance(baseline),
    )


def _compared(before: list[Any], after: list[Any], names: list[str]) -> dict[str, float]:
    """The largest relative difference of each output over all runs; NaN where no number of it was finite."""
    found = {}
    for index, name in enumerate(names):
        pairs = list(zip(before[index :: len(names)], after[index :: len(names)], strict=True))
        worst = max(relative_difference(a, b) for a, b in pairs)
        found[name] = worst if worst > 0 or any(_finite(a) for a, _ in pairs) else math.nan
    return found


def _finite(array: Any) -> bool:
    """Whether an output holds anything that can be compared."""
    return (
        not isinstance(array, np.ndarray)
        or array.dtype.kind not in "fc"
        or not array.size
        or bool(np.isfinite(array).any())
    )


def _has_gaps(arrays: list[Any]) -> bool:
    return any(isinstance(a, np.ndarray) and a.dtype.kind in "fc" and not np.isfinite(a).all() for a in arrays)


def _larger(one: float, other: float) -> float:
    return other if math.isnan(one) else one if math.isnan(other) else max(one, other)


def _behind(model: ir.Model, names: set[str]) -> set[str]:
    """The outputs of a model that hang on one of the nodes of these names."""
    reached = set[ir.Value]()
    for node in model.graph:
        if node.name in names or any(value in reached for value in node.inputs):
            reached.update(node.outputs)
    return {value.name or "" for value in model.graph.outputs if value in reached}


def _with_sources(masked: ir.Model, pruned: ir.Model) -> tuple[ir.Model, ir.Model, list[int]]:
    """Both models with what goes into the activations that make their outputs as further outputs.

    A detector that sees nothing says 0 everywhere, give or take the rounding of a sigmoid: whether what it saw is the
    same can be told before it only. Returns for each output the index of that further one, or its own.
    """
    models = [model.clone() for model in (masked, pruned)]
    found = [[_activated(value) for value in model.graph.outputs] for model in models]
    sources = list(range(len(found[0])))
    for index, nodes in enumerate(zip(*found, strict=True)):
        if None in nodes or len({node.op_type for node in nodes if node is not None}) > 1:
            continue
        sources[index] = len(models[0].graph.outputs)
        for model, node in zip(models, nodes, strict=True):
            assert node is not None
            seen = ir.node("Identity", [node.inputs[0]], name=f"{node.name}.source{index}")
            seen.outputs[0].name, seen.outputs[0].type = seen.name, node.outputs[0].type
            model.graph.insert_before(node, seen)
            model.graph.outputs.append(seen.outputs[0])
    return models[0], models[1], sources


def _joined(arrays: list[NDArray[Any]], sources: list[int]) -> list[NDArray[Any]]:
    """The outputs of all runs, each in one with its source: both are as exact as the larger one's rounding."""
    each = len(sources) + sum(source != index for index, source in enumerate(sources))
    runs = [arrays[start : start + each] for start in range(0, len(arrays), each)]
    return [
        run[index] if source == index else np.concatenate([run[index].ravel(), run[source].ravel()])
        for run in runs
        for index, source in enumerate(sources)
    ]


def _activated(value: ir.Value) -> ir.Node | None:
    """The saturating activation whose numbers a value holds."""
    node = value.producer()
    while node is not None and node.domain == "" and node.op_type in LAID_OUT and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.domain == "" and node.op_type in SATURATING else None


def check_cut(before: ir.Model, after: ir.Model, plan: Plan) -> OracleResult:
    """The oracle's result. Raises `ModelError` when a cut doesn't run, or differs from the masked model."""
    if not needed(before, after):
        run_model(after, random_inputs(after, seed=0, batch=None))  # as a user runs it, with all optimisations
    result = mask_oracle(before, after, plan, seeds=(0, 1) if dynamic_sizes(before, 0) else (0,))
    if result.outcome == "different":
        raise ModelError(
            f"the cut model differs from the masked one by {max(result.difference, result.open_difference):.1e}, which "
            "is a fault of onnxprune: nothing was written; please report the model"
        )
    return result
