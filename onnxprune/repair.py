"""Repair without training: batch-normalisation statistics re-estimated on calibration data."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxprune.data import Dataset, batches, fixed_batch
from onnxprune.evaluate import BATCH, run_session, session_options
from onnxprune.model import open_session
from onnxprune.shapes import add_initializer, replace_node

SAMPLES = 1024


def reestimate_batch_norm(model: ir.Model, data: Dataset, threads: int | None = None) -> int:
    """Sets every BatchNormalization's mean and variance to those of its input on the first samples of `data`.

    All layers are estimated in one pass, each normalising with the statistics of the batch at hand, as in training
    (adaptive batch normalisation: Li et al. 2020, EagleEye, section 3.3). Returns how many layers were changed; a model
    with a fixed batch of fewer than 8 keeps its statistics, since they can't be told from so few.
    """
    if (fixed_batch(model) or BATCH) < 8:
        return 0
    nodes = [
        node
        for node in model.graph
        if node.op_type == "BatchNormalization" and all(v is not None and v.is_initializer() for v in node.inputs[3:5])
    ]
    if not nodes or len(data) < 8:
        return 0
    probe = model.clone()
    names = _with_batch_statistics(probe, {node.name for node in nodes})
    session = open_session(probe, session_options(threads))
    size = fixed_batch(model) or BATCH
    totals: list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = []
    count = 0
    for batch in batches(data.take(slice(0, SAMPLES)), size):
        if len(next(iter(batch.values()))) < min(size, len(data)):
            break
        found = [np.asarray(a, np.float64) for a in run_session(session, batch)[len(model.graph.outputs) :]]
        moments = [x if i % 2 == 0 else x + found[i - 1] ** 2 for i, x in enumerate(found)]
        totals = moments if not totals else [a + b for a, b in zip(totals, moments, strict=True)]
        count += 1
    if not count:
        return 0
    means = dict(zip(names, [total / count for total in totals], strict=True))
    for node in nodes:
        mean, square = means[f"{node.name}.mean"], means[f"{node.name}.var"]
        _set(node.inputs[3], mean)
        _set(node.inputs[4], np.maximum(square - mean**2, 1e-8))
    return len(nodes)


def _with_batch_statistics(model: ir.Model, wanted: set[str | None]) -> list[str]:
    """Replaces these nodes by ones that normalise with the batch's own moments, and makes the moments outputs."""
    names = []
    for node in list(model.graph):
        if node.op_type != "BatchNormalization" or node.name not in wanted:
            continue
        x, scale, bias, mean_before = node.inputs[0], node.inputs[1], node.inputs[2], node.inputs[3]
        assert x is not None and scale is not None and bias is not None and mean_before is not None
        dtype = (scale.dtype or ir.DataType.FLOAT).numpy()
        rank = node.inputs[0].meta.get("rank") if node.inputs[0] is not None else None
        rank = rank or (len(x.shape) if x.shape is not None else 4)
        axes = [0, *range(2, rank)]
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        mean = _insert(model, node, "mean", "ReduceMean", [x], axes)
        centred = _insert(model, node, "centred", "Sub", [x, mean])
        square = _insert(model, node, "square", "Mul", [centred, centred])
        var = _insert(model, node, "variance", "ReduceMean", [square], axes)
        eps = add_initializer(model, f"{node.name}.eps", np.array(epsilon, dtype))
        shifted = _insert(model, node, "shifted", "Add", [var, eps])
        deviation = _insert(model, node, "deviation", "Sqrt", [shifted])
        unit = _insert(model, node, "unit", "Div", [centred, deviation])
        lift = add_initializer(model, f"{node.name}.lift", np.array([-1, *[1] * (rank - 2)], np.int64))
        scaled = _insert(
            model, node, "scaled", "Mul", [unit, _insert(model, node, "scale", "Reshape", [scale, lift])]
        )
        flat = add_initializer(model, f"{node.name}.flat", np.array([-1], np.int64))
        for name, value in (("mean", mean), ("var", var)):
            out = _insert(model, node, f"{name}_flat", "Reshape", [value, flat])
            out.name = f"{node.name}.{name}"
            out.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
            model.graph.outputs.append(out)
            names.append(out.name)
        new = ir.node("Add", [scaled, _insert(model, node, "bias", "Reshape", [bias, lift])], name=f"{node.name}.out")
        replace_node(model, node, new)
    return names


def _insert(
    model: ir.Model, before: ir.Node, name: str, op: str, inputs: list[ir.Value], axes: list[int] | None = None
) -> ir.Value:
    attributes: dict[str, int | list[int]] = {}
    values = list(inputs)
    if axes is not None:
        attributes["keepdims"] = 1
        if model.opset_imports.get("", 0) >= 18:
            values.append(add_initializer(model, f"{before.name}.axes", np.array(axes, np.int64)))
        else:
            attributes["axes"] = axes
    node = ir.node(op, values, attributes, name=f"{before.name}.{name}")
    model.graph.insert_before(before, node)
    node.outputs[0].name = f"{before.name}.{name}.value"
    return node.outputs[0]


def _set(value: ir.Value | None, array: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    assert value is not None and value.const_value is not None
    new = ir.tensor(array.astype(value.const_value.numpy().dtype), name=value.name)
    value.const_value, value.shape = new, ir.Shape(array.shape)
