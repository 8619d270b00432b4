"""The graphs of fine-tuning: the one that trains, the teacher's, and which of the model's numbers change.

Only the training graph is changed; trained numbers are written back into the user's graph by the initializer's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from onnxprune.errors import TrainingError
from onnxprune.evaluating.data import Dataset, fixed_batch, random_inputs
from onnxprune.graph.model import constant
from onnxprune.graph.shapes import add_initializer
from onnxprune.labels.flow import operator_name
from onnxprune.training.backward import differentiable
from onnxprune.training.loss_graph import add_loss, add_own_loss
from onnxprune.training.losses import LossPlan, plan_loss
from onnxprune.training.lowering import at_sizes, behind, lower, spell_out
from onnxprune.training.runtime import Trainer

Sizes = Mapping[str, Sequence[int]]
FEWEST = 8  # samples whose statistics batch normalisation can train on


def training_graph(
    model: ir.Model,
    loss: LossPlan,
    sizes: Sizes,
    freeze: Sequence[str] = (),
    trainer: Trainer = "ort",
    batch_statistics: bool = False,
) -> tuple[ir.Model, list[str], dict[str, str]]:
    """A copy of a model whose first output is the loss and whose operators have gradients, and what trains in it.

    `sizes` are the shapes of its inputs, and of the labels where there are any. Batch normalisation keeps the
    statistics it has, or with `batch_statistics` takes those of the samples, where they are at least eight. Returns the
    graph, the parameters that train, and those that can't, because the loss hangs on them through an operator without a
    gradient, with the reason.
    Raises `TrainingError` if nothing can train.
    """
    names = trainable(model, freeze)
    graph, shapes = at_sizes(spell_out(model.clone()), sizes, trainable(model))
    if loss.own is not None:
        add_own_loss(graph, loss, sizes)
        graph, shapes = at_sizes(graph, sizes, trainable(model))
    add_loss(graph, loss, sizes)
    samples = next(iter(sizes.values()))[0]
    gradients = None if trainer == "ort" else differentiable()
    blocked = lower(graph, shapes, batch_statistics and uses_batch_statistics(model, samples), gradients)
    frozen = behind(blocked, names)
    left = [name for name in names if name not in frozen]
    if not left:
        reason = next(iter(frozen.values()), "it has no parameters that aren't frozen")
        raise TrainingError(f"nothing in the model can be fine-tuned: {reason}; use --epochs 0")
    return graph, left, frozen


def untrainable(model: ir.Model) -> dict[str, str]:
    """The parameters that ONNX Runtime training can't tune by distillation, and why; sizes are of its own choice."""
    data = Dataset(random_inputs(model, seed=0, batch=None if fixed_batch(model) else FEWEST), None)
    sizes = {name: array.shape for name, array in data.inputs.items()}
    try:
        return training_graph(model, plan_loss(model, data), sizes)[2]
    except TrainingError as error:
        return dict.fromkeys(trainable(model), str(error))


def uses_batch_statistics(model: ir.Model, samples: int) -> bool:
    """Whether there is batch normalisation, and it can train on the statistics of so many samples."""
    return samples >= FEWEST and any(node.op_type == "BatchNormalization" for node in model.graph)


def evaluation_graph(model: ir.Model, loss: LossPlan, sizes: Sizes) -> tuple[ir.Model, list[str]]:
    """What the training graph computes with the statistics of batch normalisation kept, and of which values.

    It equals the model; a check on every lowering. Raises `TrainingError` as `training_graph` does.
    """
    graph, shapes = at_sizes(spell_out(_comparing(model, loss)), sizes, trainable(model))
    names = [value.name or "" for value in graph.graph.outputs]
    lower(graph, shapes, batch_statistics=False)
    return graph, names


def teacher_graph(model: ir.Model, loss: LossPlan) -> ir.Model:
    """The uncut model with the compared values as its outputs, of those that were cut what is left in the cut model.

    Raises `TrainingError` as `training_graph` does.
    """
    graph = _comparing(model, loss)
    for index, name in enumerate(loss.compared):
        for axis, positions in loss.kept.get(name, ()):
            value, where = graph.graph.outputs[index], f"onnxprune.kept.{index}.{axis}"
            kept = add_initializer(graph, where, np.array(positions, np.int64))
            node = ir.node("Gather", [value, kept], {"axis": axis}, name=f"{where}.gathered")
            node.outputs[0].name, node.outputs[0].type = f"{where}.value", value.type
            graph.graph.append(node)
            graph.graph.outputs[index] = node.outputs[0]
    return spell_out(graph)


def _comparing(model: ir.Model, loss: LossPlan) -> ir.Model:
    graph = model.clone()
    values = {value.name: value for node in graph.graph for value in node.outputs}
    graph.graph.outputs.clear()
    for name in loss.compared:
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
        graph.graph.outputs.append(values[name])
    common.RemoveUnusedNodesPass()(graph)
    return graph


def trainable(model: ir.Model, freeze: Sequence[str] = ()) -> list[str]:
    """The initializers that fine-tuning changes: weights, biases, normalisation parameters, embeddings.

    Those whose names match a pattern in `freeze` are left out.

    Constants of the computation (masks, anchors, scale factors) look the same in a graph, so only what sits where
    parameters sit is trained.
    """
    found: dict[str, None] = {}
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.dtype != ir.DataType.FLOAT:
                continue
            if index in PARAMETERS.get(operator_name(node), ()) or _is_bias(node, value):
                found[value.name or ""] = None
    return [name for name in found if not any(fnmatchcase(name, pattern) for pattern in freeze)]


PARAMETERS = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (0, 1),
    "Einsum": (0, 1),
    "BatchNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "PRelu": (1,),
    "GroupNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "RNN": (1, 2, 3),
    "GRU": (1, 2, 3),
    "LSTM": (1, 2, 3),
    "Gather": (0,),
    "com.microsoft::FusedConv": (1, 2),
    "com.microsoft::FusedGemm": (1, 2),
    "com.microsoft::FusedMatMul": (0, 1),
    "com.microsoft::BiasGelu": (1,),
    "com.microsoft::FastGelu": (1,),
    "com.microsoft::SkipLayerNormalization": (2, 3, 4),
    "com.microsoft::SkipSimplifiedLayerNormalization": (2, 3),
    "com.microsoft::EmbedLayerNormalization": (2, 3, 4, 5, 6),
    "com.microsoft::Attention": (1, 2),
    "com.microsoft::MultiHeadAttention": (3,),
}


def _is_bias(node: ir.Node, value: ir.Value) -> bool:
    """A vector added to something, or an embedding of positions (1, length, width)."""
    array = constant(value)
    if node.op_type != "Add" or array is None or array.size < 2:
        return False
    wide = [dim for dim in array.shape if dim > 1]
    return len(wide) == 1 or (array.ndim == 3 and array.shape[0] == 1)
