"""The mask oracle: the strongest check of a cut.

The uncut baseline, with every removed position of every tensor in the plan set to zero, must compute what the pruned
model computes, to float rounding, wherever the plan is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxprune.data import random_inputs
from onnxprune.errors import ModelError
from onnxprune.evaluate import relative_difference, run_on_all
from onnxprune.plan import Plan
from onnxprune.shapes import add_initializer, dynamic_sizes, infer_shapes

TOLERANCE = 1e-4  # relative; far above float32 rounding, far below any real mistake


@dataclass(frozen=True)
class OracleResult:
    """The largest relative difference found, and whether the plan promises none."""

    difference: float
    exact: bool


def masked_model(baseline: ir.Model, plan: Plan) -> ir.Model:
    """A copy of the baseline that sets what the plan removes to zero, tensor by tensor.

    Where, not Mul: what is removed may be infinite by then (something divided by a zero), and zero times that is NaN.
    Raises `ModelError` when the plan names a value that the baseline lacks.
    """
    model = baseline.clone()
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name, removals in plan.tensors.items():
        if name not in values:
            raise ModelError(f"the plan names {name!r}, which the baseline lacks; is it the plan of another model?")
        value = values[name]
        producer = value.producer()
        assert producer is not None
        dtype = value.dtype.numpy() if value.dtype is not None else _float_type(baseline)
        zero = add_initializer(model, f"{name}.zero", np.zeros((), dtype))
        current = value
        for removal in removals:
            keep = np.ones(removal.size, bool)
            keep[list(removal.removed)] = False
            shape = [1] * (_rank(value, removal.axis) - removal.axis)
            shape[0] = removal.size
            mask = add_initializer(model, f"{name}.mask", keep.reshape(shape))
            operator, inputs = ("And", [mask, current]) if dtype == np.bool_ else ("Where", [mask, current, zero])
            node = ir.node(operator, inputs, name=f"{name}.masked{removal.axis}")
            model.graph.insert_after(current.producer() or producer, node)
            node.outputs[0].name = f"{name}.masked{removal.axis}"
            current = node.outputs[0]
        _redirect(value, current)
    return model


def _redirect(value: ir.Value, masked: ir.Value) -> None:
    inside: set[ir.Node] = set()
    step = masked
    while step is not value:
        node = step.producer()
        assert node is not None and node.inputs[1] is not None
        inside.add(node)
        step = node.inputs[1]
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

    Dynamic dimensions get other sizes from one seed to the next.
    """
    shapes = infer_shapes(baseline)
    for node in baseline.graph:
        for value in node.outputs:
            if (shape := shapes(value)) is not None:
                value.meta["rank"] = len(shape)
                if value.type is None and (kind := shapes.first.types.get(value.name or "")) is not None:
                    value.type = ir.TensorType(ir.DataType(kind.tensor_type.elem_type))
    masked = masked_model(baseline, plan)
    inputs = [random_inputs(baseline, seed, batch=None, walk=index % 2) for index, seed in enumerate(seeds)]
    pairs = zip(run_on_all(masked, inputs), run_on_all(pruned, inputs), strict=True)
    return OracleResult(max((relative_difference(a, b) for a, b in pairs), default=0.0), plan.exact)


def check_cut(before: ir.Model, after: ir.Model, plan: Plan) -> None:
    """Raises `ModelError` when a cut doesn't run, or an exact one differs from the mask oracle."""
    result = mask_oracle(before, after, plan, seeds=(0, 1) if dynamic_sizes(before, 0) else (0,))
    if plan.exact and not result.difference <= TOLERANCE:
        raise ModelError(
            f"the cut model differs from the masked one by {result.difference:.1e}, which is a fault of onnxprune: "
            "nothing was written; please report the model"
        )
