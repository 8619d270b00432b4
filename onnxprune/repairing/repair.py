"""Repair without training: batch-normalisation statistics re-estimated on data; repairs that do harm are undone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.evaluating.data import Dataset, batches, fixed_batch
from onnxprune.evaluating.evaluate import BATCH, predict, run_session
from onnxprune.evaluating.metrics import fidelity
from onnxprune.graph.model import open_session
from onnxprune.graph.threads import session_options

SAMPLES = 1024
PROBED = 64  # samples that tell whether a repair did harm
FEWEST = 8  # samples in a batch from which statistics can be told


def reestimate_batch_norm(model: ir.Model, data: Dataset, threads: int | None = None) -> int:
    """Sets every BatchNormalization's mean and variance to those of its input on the first samples of `data`.

    All layers are estimated in one pass, each normalising with the statistics of the batch at hand, as in training
    (adaptive batch normalisation: Li et al. 2020, EagleEye, section 3.3). Returns how many layers were changed: none
    where batches are fixed to fewer than 8 samples, since those tell too little.
    """
    nodes = [
        node
        for node in model.graph
        if node.op_type == "BatchNormalization" and all(v is not None and v.is_initializer() for v in node.inputs[3:5])
    ]
    size = min(fixed_batch(model) or BATCH, len(data))
    if not nodes or size < FEWEST:
        return 0
    session = open_session(_with_batch_statistics(model, {node.name for node in nodes}), session_options(threads))
    outputs, totals, count = len(model.graph.outputs), np.zeros(0), 0
    for batch in batches(data.take(slice(0, min(SAMPLES, len(data) // size * size))), size):
        found = [array.astype(np.float64) for array in run_session(session, batch)[outputs:]]
        sums = np.concatenate(
            [np.stack([mean, variance + mean**2]) for mean, variance in zip(found[::2], found[1::2], strict=True)], 1
        )
        totals, count = totals + sums if count else sums, count + 1
    at = 0
    for node in nodes:
        width = _width(node)
        mean, square = totals[:, at : at + width] / count
        _set(node.inputs[3], mean)
        _set(node.inputs[4], square - mean**2)
        at += width
    return len(nodes)


def undo_if_worse(
    model: ir.Model, before: ir.Model, whole: ir.Model, data: Dataset, threads: int | None = None
) -> bool:
    """Gives a model its weights `before` a repair back, in place, if the repair took it further from the `whole` model.

    Measured by the outputs' fidelity on the first samples of `data`. Returns whether that was so.
    """
    part = data.take(slice(0, PROBED))
    wanted, old, new = (predict(each, part, threads) for each in (whole, before, model))
    repaired = fidelity(new, wanted)
    if np.isfinite(repaired) and not repaired < fidelity(old, wanted):
        return False
    for name, value in before.graph.initializers.items():
        model.graph.initializers[name].const_value = value.const_value
    return True


def _with_batch_statistics(model: ir.Model, names: set[str | None]) -> ir.Model:
    """A copy whose BatchNormalization nodes use the batch's own moments and give them as outputs of the model."""
    probe = model.clone()
    for node in probe.graph:
        if node.name in names:
            node.attributes["training_mode"] = ir.AttrInt64("training_mode", 1)
            node.attributes["momentum"] = ir.AttrFloat32("momentum", 0.0)  # outputs are then the batch's moments
            node.resize_outputs(3)
            for value, kind in zip(node.outputs[1:], ("mean", "variance"), strict=True):
                value.name = f"{node.name}.{kind}"
                value.type = ir.TensorType(ir.DataType.FLOAT)
                probe.graph.outputs.append(value)
    return probe


def _width(node: ir.Node) -> int:
    value = node.inputs[3]
    assert value is not None and value.const_value is not None
    return int(value.const_value.size)


def _set(value: ir.Value | None, array: NDArray[Any]) -> None:
    assert value is not None and value.const_value is not None
    value.const_value = ir.tensor(array.astype(value.const_value.numpy().dtype), name=value.name)
