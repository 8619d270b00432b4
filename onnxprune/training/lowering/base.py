"""What the rows are made of: a builder of nodes, and the table of rows by operator."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from onnxprune.errors import TrainingError
from onnxprune.graph.shapes import Shapes, add_initializer, replace_node

Attribute = int | float | list[int]
Lowering = Callable[["Lowerer", ir.Node], None]
LOWERINGS: dict[str, Lowering] = {}


def lowering(*operators: str) -> Callable[[Lowering], Lowering]:
    """Registers how these operators are rewritten for training."""

    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(operators, function))
        return function

    return register


GRADIENTS = {  # that ONNX Runtime training has
    *("Abs", "Add", "AveragePool", "BatchNormalization", "BiasGelu", "Cast", "Clip", "Concat", "Conv", "Cos", "Div"),
    *("Erf", "Exp", "Expand", "FastGelu", "Flatten", "FusedMatMul", "Gather", "GatherElements", "GatherND", "Gelu"),
    *("Gemm", "GlobalAveragePool", "Identity", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "MatMul", "Max"),
    *("MaxPool", "Min", "Mul", "Neg", "Pad", "Pow", "QuickGelu", "Reciprocal", "ReduceL2", "ReduceLogSumExp"),
    *("ReduceMean", "ReduceSum", "Relu", "Reshape", "ScatterElements", "ScatterND", "Sigmoid", "Sin", "Slice"),
    *("SimplifiedLayerNormalization", "Softmax", "SoftmaxCrossEntropyLoss", "Split", "Sqrt", "Squeeze", "Sub", "Tanh"),
    *("Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where"),
}
FLAT = {  # no gradient goes through: their outputs don't change with small changes of their inputs
    *("And", "ArgMax", "ArgMin", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less"),
    *("LessOrEqual", "Not", "Or", "ReduceMax", "ReduceMin", "Round", "Shape", "Sign", "Size", "Xor"),
}  # extremes are lowered to masks


def lower(
    graph: ir.Model, shapes: Shapes, batch_statistics: bool = True, gradients: Collection[str] | None = None
) -> dict[ir.Node, str]:
    """Rewrites, in place, what has no gradient; batch normalisation uses its batch's statistics, or its own.

    Returns the nodes that no gradient can go through, and why. `gradients` are the operators that have one where the
    gradient is made of ONNX operators: no operator is given more outputs for it to read then.
    """
    common.RemoveUnusedNodesPass()(graph)  # before lowering: it would take away outputs that gradients need
    lowerer, blocked = Lowerer(graph, shapes, batch_statistics, gradients is not None), dict[ir.Node, str]()
    for node in list(graph.graph):
        row = LOWERINGS.get(node.op_type) if node.domain == "" else None
        if not _floats(node, shapes):
            continue
        try:
            if row is not None:
                row(lowerer, node)
            elif node.op_type not in FLAT and node.op_type not in (gradients or GRADIENTS):
                blocked[node] = f"node {node.name!r}: {node.op_type} has no gradient"
        except TrainingError as error:
            blocked[node] = str(error)
    return blocked


def _floats(node: ir.Node, shapes: Shapes) -> bool:
    kinds = [value.dtype or shapes.element_type(value) for value in node.outputs]
    return any(kind is None or kind.is_floating_point() for kind in kinds)


def behind(nodes: Mapping[ir.Node, str], names: Collection[str]) -> dict[str, str]:
    """The parameters `names` whose influence goes through one of these nodes, and why that can't be followed."""
    found: dict[str, str] = {}
    for start, reason in nodes.items():
        seen, waiting = set[ir.Value](), [value for value in start.inputs if value is not None]
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            if value.name in names and value.is_initializer():
                found.setdefault(value.name or "", reason)
            elif (maker := value.producer()) is not None and maker.op_type not in FLAT:
                waiting.extend(each for each in maker.inputs if each is not None)
    return found


class Builder:
    """Builds nodes in front of the one that they replace."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.opset = model.opset_imports.get("", 0)
        self.count = 0

    def refusal(self, node: ir.Node, reason: str) -> TrainingError:
        """An error that names a node which can't be fine-tuned."""
        return TrainingError(f"node {node.name!r}: {node.op_type} can't be fine-tuned: {reason}")

    def add(self, before: ir.Node, op: str, inputs: list[ir.Value], **attributes: Attribute) -> ir.Value:
        """A new node in front of `before`; its output."""
        return self.add_all(before, op, inputs, 1, **attributes)[0]

    def add_all(
        self, before: ir.Node, op: str, inputs: list[ir.Value], outputs: int, **attributes: Attribute
    ) -> list[ir.Value]:
        """A new node with several outputs in front of `before`."""
        self.count += 1
        node = ir.node(op, inputs, attributes, name=f"{before.name}.lowered{self.count}", num_outputs=outputs)
        self.model.graph.insert_before(before, node)
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}.{index}" if index else node.name
        return list(node.outputs)

    def constant(self, before: ir.Node, array: NDArray[np.generic]) -> ir.Value:
        """A new constant."""
        return add_initializer(self.model, f"{before.name}.constant", array)

    def number(self, before: ir.Node, number: float) -> ir.Value:
        """A new float32 scalar."""
        return self.constant(before, np.array(number, np.float32))

    def integers(self, before: ir.Node, *numbers: int) -> ir.Value:
        """A new int64 vector."""
        return self.constant(before, np.array(numbers, np.int64))

    def reshape(self, before: ir.Node, value: ir.Value, *sizes: int) -> ir.Value:
        """The value in another shape."""
        return self.add(before, "Reshape", [value, self.integers(before, *sizes)])

    def mean(self, before: ir.Node, value: ir.Value, axes: list[int]) -> ir.Value:
        """The mean over axes, which stay, with size 1."""
        if self.opset < 18:
            return self.add(before, "ReduceMean", [value], axes=axes, keepdims=1)
        return self.add(before, "ReduceMean", [value, self.integers(before, *axes)], keepdims=1)

    def sum(self, before: ir.Node, value: ir.Value, axes: list[int]) -> ir.Value:
        """The sum over axes, which stay, with size 1."""
        return self.add(before, "ReduceSum", [value, self.integers(before, *axes)], keepdims=1)

    def replace(self, node: ir.Node, op: str, inputs: list[ir.Value], **attributes: Attribute) -> None:
        """Puts a new node in the place of `node`."""
        replace_node(self.model, node, ir.node(op, inputs, attributes, name=f"{node.name}.lowered"))

    def replace_by(self, node: ir.Node, value: ir.Value) -> None:
        """Puts a value that was added in the place of what `node` gives out."""
        self.replace(node, "Identity", [value])


class Lowerer(Builder):
    """A builder that knows the shapes of all values, and how the gradient will be made."""

    def __init__(self, model: ir.Model, shapes: Shapes, batch_statistics: bool, plain: bool) -> None:
        super().__init__(model)
        self.shapes = shapes
        self.batch_statistics, self.plain = batch_statistics, plain

    def sizes(self, node: ir.Node, value: ir.Value | None) -> list[int]:
        """The shape of a value. Raises `TrainingError` when it isn't known."""
        shape = self.shapes(value) if value is not None else None
        if shape is None and value is not None and value.shape is not None and value.shape.is_static():
            shape = value.shape.numpy()  # of the loss, which was added since
        if shape is None or any(size is None for size in shape):
            raise self.refusal(node, "the shape of what it reads isn't known")
        return [size or 0 for size in shape]

    def along_axis(
        self, before: ir.Node, value: ir.Value, rank: int, axis: int, matrix: NDArray[np.float32]
    ) -> ir.Value:
        """The product with a constant matrix (new size, old size) along one axis of a value."""
        if axis == rank - 1:
            return self.add(before, "MatMul", [value, self.constant(before, np.ascontiguousarray(matrix.T))])
        if axis == rank - 2:
            return self.add(before, "MatMul", [self.constant(before, matrix), value])
        order = list(range(rank))
        order[axis], order[-1] = order[-1], order[axis]
        turned = self.add(before, "Transpose", [value], perm=order)
        product = self.add(before, "MatMul", [turned, self.constant(before, np.ascontiguousarray(matrix.T))])
        return self.add(before, "Transpose", [product], perm=order)


def attribute(node: ir.Node, name: str, default: float) -> float:
    """A float attribute."""
    return node.attributes[name].as_float() if name in node.attributes else default


def first(node: ir.Node) -> ir.Value:
    """The first input, which every operator here has."""
    value = node.inputs[0]
    assert value is not None
    return value
