"""From an inference graph to one that trains and computes the same: what ONNX Runtime's gradients need.

Only the training graph is changed; trained numbers are written back into the user's graph by the initializer's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from onnxprune.errors import TrainingError
from onnxprune.labels.flow import integer, integers
from onnxprune.labels.recurrent import GATES
from onnxprune.model import constant
from onnxprune.shapes import Shapes, add_initializer, infer_shapes, replace_node
from onnxprune.training.losses import LossPlan, add_loss

NEWEST_OPSET, NEWEST_IR = 21, 10  # what ONNX Runtime 1.19 reads

Lowering = Callable[["Lowerer", ir.Node], None]
LOWERINGS: dict[str, Lowering] = {}


def training_graph(model: ir.Model, loss: LossPlan, label_rank: int) -> ir.Model:
    """A copy of a model whose first output is the loss and whose operators all have gradients.

    Raises `TrainingError` for an opset that ONNX Runtime training doesn't read.
    """
    check_versions(model)
    graph = model.clone()
    shapes = infer_shapes(graph)
    values = {value.name: value for node in graph.graph for value in node.outputs}
    for name in loss.values:
        if (shape := shapes(values[name])) is not None:
            dims = [dim if dim is not None else f"{name}.{axis}" for axis, dim in enumerate(shape)]
            values[name].shape, values[name].type = ir.Shape(dims), ir.TensorType(ir.DataType.FLOAT)
    add_loss(graph, loss, label_rank)
    lower_all(graph, shapes)
    return graph


def lower_all(graph: ir.Model, shapes: Shapes) -> None:
    """Rewrites, in place, what has no gradient. Raises `TrainingError` for what can't be."""
    common.RemoveUnusedNodesPass()(graph)  # before lowering: it would take away outputs that gradients need
    lowerer = Lowerer(graph, shapes)
    for node in list(graph.graph):
        if (lowering := LOWERINGS.get(node.op_type)) is not None and node.domain == "":
            lowering(lowerer, node)
    graph.ir_version = min(graph.ir_version, NEWEST_IR)


def evaluation_graph(model: ir.Model, loss: LossPlan) -> tuple[ir.Model, list[str]]:
    """What the training graph computes with the statistics of batch normalisation kept, and of which values.

    It equals the model; a check on every lowering. Raises `TrainingError` as `training_graph` does.
    """
    graph = teacher_graph(model, loss)
    shapes, names = infer_shapes(graph), [value.name or "" for value in graph.graph.outputs]
    lower_all(graph, shapes)
    for node in graph.graph:
        if node.op_type == "BatchNormalization":
            node.attributes["training_mode"] = ir.AttrInt64("training_mode", 0)
            node.resize_outputs(1)
    return graph, names


def teacher_graph(model: ir.Model, loss: LossPlan) -> ir.Model:
    """The uncut model with the compared values as its outputs. Raises `TrainingError` as `training_graph` does."""
    check_versions(model)
    graph = model.clone()
    values = {value.name: value for node in graph.graph for value in node.outputs}
    graph.graph.outputs.clear()
    for name in loss.values:
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
        graph.graph.outputs.append(values[name])
    common.RemoveUnusedNodesPass()(graph)
    graph.ir_version = min(graph.ir_version, NEWEST_IR)
    return graph


def check_versions(model: ir.Model) -> None:
    """Raises `TrainingError` for an opset that ONNX Runtime training doesn't read."""
    version = model.opset_imports.get("", 0)
    if version > NEWEST_OPSET:
        raise TrainingError(
            f"fine-tuning reads opsets up to {NEWEST_OPSET}, the model has {version}; export it with an older opset, "
            "or use --epochs 0"
        )


def trainable(model: ir.Model) -> list[str]:
    """The initializers that fine-tuning changes: weights, biases, normalisation parameters, embeddings.

    Constants of the computation (masks, anchors, scale factors) look the same in a graph, so only what sits where
    parameters sit is trained.
    """
    found: dict[str, None] = {}
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.dtype != ir.DataType.FLOAT:
                continue
            if index in PARAMETERS.get(node.op_type, ()) or _is_bias(node, value):
                found[value.name or ""] = None
    return list(found)


PARAMETERS = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (0, 1),
    "BatchNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "PRelu": (1,),
    "GRU": (1, 2, 3),
    "Gather": (0,),
}


def _is_bias(node: ir.Node, value: ir.Value) -> bool:
    """A vector added to something, or an embedding of positions (1, length, width)."""
    array = constant(value)
    if node.op_type != "Add" or array is None or array.size < 2:
        return False
    wide = [dim for dim in array.shape if dim > 1]
    return len(wide) == 1 or (array.ndim == 3 and array.shape[0] == 1)


class Lowerer:
    """Builds nodes in front of the one that they replace."""

    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self.model, self.shapes = model, shapes
        self.count = 0

    def add(self, before: ir.Node, op: str, inputs: list[ir.Value], **attributes: int | float | list[int]) -> ir.Value:
        """A new node in front of `before`; its output."""
        self.count += 1
        node = ir.node(op, inputs, attributes, name=f"{before.name}.lowered{self.count}")
        self.model.graph.insert_before(before, node)
        node.outputs[0].name = node.name
        return node.outputs[0]

    def constant(self, before: ir.Node, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
        """A new constant."""
        return add_initializer(self.model, f"{before.name}.constant", array)

    def replace(self, node: ir.Node, op: str, inputs: list[ir.Value], **attributes: int | float | list[int]) -> None:
        """Puts a new node in the place of `node`."""
        replace_node(self.model, node, ir.node(op, inputs, attributes, name=f"{node.name}.lowered"))


def lowering(*operators: str) -> Callable[[Lowering], Lowering]:
    """Registers how these operators are rewritten for training."""

    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(operators, function))
        return function

    return register


@lowering("BatchNormalization")
def _batch_norm(lower: Lowerer, node: ir.Node) -> None:
    """Batch statistics, which its gradient needs as outputs."""
    node.attributes["training_mode"] = ir.AttrInt64("training_mode", 1)
    node.resize_outputs(3)
    for index, name in ((1, "mean"), (2, "var")):
        node.outputs[index].name = f"{node.name}.{name}"


@lowering("LayerNormalization")
def _layer_norm(lower: Lowerer, node: ir.Node) -> None:
    """Its gradient reads the outputs Mean and InvStdDev."""
    node.resize_outputs(3)
    for index, name in ((1, "mean"), (2, "inverse_deviation")):
        node.outputs[index].name = f"{node.name}.{name}"


@lowering("SoftmaxCrossEntropyLoss")
def _cross_entropy(lower: Lowerer, node: ir.Node) -> None:
    """Its gradient reads the output log_prob; whether one that isn't named is added depends on the build."""
    node.resize_outputs(2)
    node.outputs[1].name = f"{node.name}.log_prob"


@lowering("Dropout")
def _dropout(lower: Lowerer, node: ir.Node) -> None:
    """Off, as in inference."""
    assert node.inputs[0] is not None
    lower.replace(node, "Identity", [node.inputs[0]])


@lowering("HardSigmoid", "HardSwish")
def _hard(lower: Lowerer, node: ir.Node) -> None:
    """clip(alpha x + beta, 0, 1), times x for HardSwish."""
    x = node.inputs[0]
    assert x is not None
    swish = node.op_type == "HardSwish"
    alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1 / 6 if swish else 0.2
    beta = node.attributes["beta"].as_float() if "beta" in node.attributes else 0.5
    a, b, zero, one = (lower.constant(node, np.array(v, np.float32)) for v in (alpha, beta, 0, 1))
    inner = lower.add(node, "Add", [lower.add(node, "Mul", [x, a]), b])
    if swish:
        lower.replace(node, "Mul", [x, lower.add(node, "Clip", [inner, zero, one])])
    else:
        lower.replace(node, "Clip", [inner, zero, one])


@lowering("PRelu")
def _prelu(lower: Lowerer, node: ir.Node) -> None:
    """max(x, 0) - slope max(-x, 0)."""
    x, slope = node.inputs
    assert x is not None and slope is not None
    negative = lower.add(node, "Relu", [lower.add(node, "Neg", [x])])
    lower.replace(node, "Sub", [lower.add(node, "Relu", [x]), lower.add(node, "Mul", [slope, negative])])


@lowering("AveragePool")
def _average_pool(lower: Lowerer, node: ir.Node) -> None:
    """Its gradient fails with a dynamic batch: a mean over the whole map, or a depthwise convolution over windows."""
    x, out = node.inputs[0], node.outputs[0]
    before, after = lower.shapes(x) if x is not None else None, lower.shapes(out)
    kernel = integers(node, "kernel_shape") or []
    if x is None or before is None or after is None or any(d is None for d in (*before[1:], *after[2:])):
        raise TrainingError(f"node {node.name!r}: AveragePool over a dynamic size can't be fine-tuned; use --epochs 0")
    space = [d or 0 for d in before[2:]]
    if kernel == space and all(d == 1 for d in after[2:]) and not any(integers(node, "pads") or ()):
        lower.replace(node, "GlobalAveragePool", [x])
        return
    channels, pads = before[1] or 1, integers(node, "pads") or [0] * (2 * len(kernel))
    if integer(node, "ceil_mode", 0) or (
        "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() not in ("", "NOTSET")
    ):
        raise TrainingError(
            f"node {node.name!r}: AveragePool with ceil_mode or auto_pad can't be fine-tuned; use --epochs 0"
        )
    weight = np.full((channels, 1, *kernel), 1 / math.prod(kernel), np.float32)
    strides, dilations = (
        integers(node, "strides") or [1] * len(kernel),
        integers(node, "dilations") or [1] * len(kernel),
    )
    attributes: dict[str, int | list[int]] = {
        "group": channels,
        "kernel_shape": kernel,
        "pads": pads,
        "strides": strides,
        "dilations": dilations,
    }
    if integer(node, "count_include_pad", 0) or not any(pads):
        lower.replace(node, "Conv", [x, lower.constant(node, weight)], **attributes)
        return
    sums = lower.add(node, "Conv", [x, lower.constant(node, weight)], **attributes)
    share = _window_shares(space, kernel, strides, pads, dilations)
    lower.replace(node, "Div", [sums, lower.constant(node, share)])


def _window_shares(
    space: list[int], kernel: list[int], strides: list[int], pads: list[int], dilations: list[int]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """For every output position, the share of its window that lies inside the map."""
    share = np.ones((1, 1), np.float32)
    for axis, size in enumerate(space):
        span = (kernel[axis] - 1) * dilations[axis] + 1
        starts = np.arange(0, size + pads[axis] + pads[axis + len(space)] - span + 1, strides[axis]) - pads[axis]
        taps = starts[:, None] + np.arange(kernel[axis]) * dilations[axis]
        share = share[..., None] * ((taps >= 0) & (taps < size)).mean(1, dtype=np.float32)
    return share


@lowering("GRU")
def _gru(lower: Lowerer, node: ir.Node) -> None:
    """Unrolled over its fixed length: the gradient kernel wants inputs that exporters leave out."""
    x = node.inputs[0]
    shape = lower.shapes(x) if x is not None else None
    bidirectional = "direction" in node.attributes and node.attributes["direction"].as_string() != "forward"
    if (
        x is None
        or not shape
        or shape[0] is None
        or bidirectional
        or (len(node.inputs) > 4 and node.inputs[4] is not None)
    ):
        raise TrainingError(
            f"node {node.name!r}: only a forward GRU over a fixed length can be fine-tuned; use --epochs 0"
        )
    gru = _Unrolled(lower, node, shape[0])
    states = gru.run()
    _give_recurrent_outputs(lower, node, states)


class _Unrolled:
    """z = s(Wz x + Rz h + bz), r likewise, n = tanh(Wn x + bn + r (Rn h + cn)), h = (1 - z) n + z h."""

    def __init__(self, lower: Lowerer, node: ir.Node, length: int) -> None:
        self.lower, self.node, self.length = lower, node, length
        self.hidden = integer(node, "hidden_size", 0)
        self.linear_before_reset = integer(node, "linear_before_reset", 0)

    def run(self) -> list[ir.Value]:
        """The state after every step, (batch, hidden)."""
        node, lower, gates = self.node, self.lower, GATES["GRU"]
        w, r = (self._transposed(value) for value in node.inputs[1:3])
        bias = node.inputs[3] if len(node.inputs) > 3 else None
        sizes = [gates * self.hidden] * 2
        wb, rb = self._split(self._squeezed(bias, 0), sizes, 0) if bias is not None else (None, None)
        steps = self._split(node.inputs[0], [1] * self.length, 0)
        h = self._squeezed(node.inputs[5], 0) if len(node.inputs) > 5 and node.inputs[5] is not None else None
        states = []
        for step in steps:
            xw = self._plus(lower.add(node, "MatMul", [self._squeezed(step, 0), w]), wb)
            if h is None:
                zero = lower.constant(node, np.zeros((1, self.hidden), np.float32))
                first = self._split(xw, [self.hidden] * gates, 1)[0]
                h = lower.add(node, "Mul", [first, zero])
            h = self._step(xw, h, r, rb)
            states.append(h)
        return states

    def _step(self, xw: ir.Value, h: ir.Value, r: ir.Value, rb: ir.Value | None) -> ir.Value:
        lower, node = self.lower, self.node
        parts = [self.hidden] * GATES["GRU"]
        xz, xr, xn = self._split(xw, parts, 1)
        rz, rr, rn = self._split(r, parts, 1)
        biases = self._split(rb, parts, 0) if rb is not None else [None] * GATES["GRU"]

        def recurrent(state: ir.Value, matrix: ir.Value, bias: ir.Value | None) -> ir.Value:
            return self._plus(lower.add(node, "MatMul", [state, matrix]), bias)

        z = lower.add(node, "Sigmoid", [lower.add(node, "Add", [xz, recurrent(h, rz, biases[0])])])
        reset = lower.add(node, "Sigmoid", [lower.add(node, "Add", [xr, recurrent(h, rr, biases[1])])])
        if self.linear_before_reset:
            candidate = lower.add(node, "Mul", [reset, recurrent(h, rn, biases[2])])
        else:
            candidate = recurrent(lower.add(node, "Mul", [reset, h]), rn, biases[2])
        n = lower.add(node, "Tanh", [lower.add(node, "Add", [xn, candidate])])
        difference = lower.add(node, "Sub", [h, n])
        return lower.add(node, "Add", [n, lower.add(node, "Mul", [z, difference])])

    def _transposed(self, value: ir.Value | None) -> ir.Value:
        return self.lower.add(self.node, "Transpose", [self._squeezed(value, 0)], perm=[1, 0])

    def _squeezed(self, value: ir.Value | None, axis: int) -> ir.Value:
        assert value is not None
        return self.lower.add(self.node, "Squeeze", [value, self.lower.constant(self.node, np.array([axis], np.int64))])

    def _plus(self, value: ir.Value, bias: ir.Value | None) -> ir.Value:
        return value if bias is None else self.lower.add(self.node, "Add", [value, bias])

    def _split(self, value: ir.Value | None, sizes: list[int], axis: int) -> list[ir.Value]:
        assert value is not None
        edges = np.cumsum([0, *sizes]).astype(np.int64)
        at = self.lower.constant(self.node, np.array([axis], np.int64))
        return [
            self.lower.add(
                self.node,
                "Slice",
                [value, *(self.lower.constant(self.node, edges[i + k : i + k + 1]) for k in (0, 1)), at],
            )
            for i in range(len(sizes))
        ]


def _give_recurrent_outputs(lower: Lowerer, node: ir.Node, states: list[ir.Value]) -> None:
    """Y (seq, 1, batch, hidden) and Y_h (1, batch, hidden) from the states after every step."""

    def stacked(values: list[ir.Value], axes: list[int]) -> ir.Value:
        lifted = [
            lower.add(node, "Unsqueeze", [value, lower.constant(node, np.array(axes, np.int64))]) for value in values
        ]
        return lower.add(node, "Concat", lifted, axis=0) if len(lifted) > 1 else lifted[0]

    for output, (values, axes) in zip(node.outputs, ((states, [0, 1]), (states[-1:], [0])), strict=False):
        if output.uses():
            output.replace_all_uses_with(stacked(values, axes), replace_graph_outputs=True)
    lower.model.graph.remove(node, safe=True)
