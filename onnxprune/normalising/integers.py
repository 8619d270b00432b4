"""Operators that compute in integers, spelt out: dequantise, compute, quantise.

`QLinearConv(x, ...)` is `Conv` of what `x` stands for, quantised again. In that form the rules for floats hold, and
onnxruntime fuses it to the same integer kernels again when it opens the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from onnxprune.graph.model import constant
from onnxprune.graph.shapes import add_initializer
from onnxprune.labels.flow import integer

PASSING = {  # what moves integers about without changing any
    *("DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Resize", "Slice"),
    *("SpaceToDepth", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}
Quantised = tuple[ir.Value, ir.Value | None]  # scale and zero point


def has_integers(model: ir.Model) -> bool:
    """Whether a model has operators of the QLinear family."""
    return any(node.op_type in SPELT for node in model.graph)


def spell_out_integers(model: ir.Model) -> None:
    """Replaces operators of the QLinear family by floating-point ones between pairs, where that is understood."""
    known: dict[ir.Value, Quantised] = {}
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            known[node.outputs[0]] = _at(node, 1), _maybe(node, 2)
        elif node.op_type in SPELT or (node.op_type in PASSING and node.inputs[0] in known):
            spelling = Spelling(model, node, known)
            made = SPELT[node.op_type](spelling) if node.op_type in SPELT else _passing(spelling)
            if made is not None:
                node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
                made.name = node.outputs[0].name
                model.graph.insert_before(node, spelling.steps)
                model.graph.remove(node, safe=True)
    common.RemoveUnusedNodesPass()(model)


def _at(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _maybe(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


@dataclass
class Spelling:
    """A node that is being spelt out: the nodes that take its place."""

    model: ir.Model
    node: ir.Node
    known: dict[ir.Value, Quantised]
    steps: list[ir.Node] = field(default_factory=list)

    def add(self, operator: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
        """A new node, by the attributes of the old one where it is the operator itself."""
        own = [] if attributes or operator.endswith("Linear") else list(self.node.attributes.values())
        made = ir.convenience.convert_attributes(attributes) if attributes else own
        node = ir.Node("", operator, inputs, made, name=f"{self.node.outputs[0].name}.{len(self.steps)}")
        node.outputs[0].name = node.name
        self.steps.append(node)
        return node.outputs[0]

    def meant(self, index: int, axis: int | None = None) -> ir.Value:
        """What the operand at `index` stands for; its scale and zero point follow it. `axis` is that of a vector."""
        value, scale, zero = _at(self.node, index), _at(self.node, index + 1), _maybe(self.node, index + 2)
        sizes = scale.shape.numpy() if scale.shape is not None else ()
        along = {"axis": axis} if axis is not None and len(sizes) == 1 and sizes[0] != 1 else {}
        return self.add("DequantizeLinear", [value, self.scalar(scale, along), self.scalar(zero, along)], **along)

    def scalar(self, value: ir.Value | None, along: dict[str, int]) -> ir.Value | None:
        """A scale or zero point of a single number as a number."""
        array = constant(value)
        if value is None or array is None or along or array.ndim == 0:
            return value
        return add_initializer(self.model, f"{value.name}.number", array.reshape(()))

    def quantise(self, value: ir.Value, index: int) -> ir.Value:
        """A result by the scale and zero point at `index`."""
        scale, zero = self.scalar(_at(self.node, index), {}), self.scalar(_maybe(self.node, index + 1), {})
        assert scale is not None
        made = self.add("QuantizeLinear", [value, scale, zero])
        self.known[made] = scale, zero
        return made

    def bias(self, index: int, factor: float = 1.0) -> ir.Value | None:
        """A bias in units of the product of the operands' scales; None where those aren't constant."""
        value, scales = constant(_maybe(self.node, index)), [constant(_at(self.node, i)) for i in (1, 4)]
        if value is None or scales[0] is None or scales[1] is None:
            return None
        array = value * (scales[0].astype(np.float64) * scales[1].ravel() * factor)
        return add_initializer(self.model, f"{self.node.outputs[0].name}.bias", array.astype(np.float32))


def _passing(it: Spelling) -> ir.Value | None:
    """The same on what the integers stand for; they are quantised again as they were."""
    scale, zero = it.known[_at(it.node, 0)]
    if len(it.node.outputs) != 1:
        return None
    value = it.add("DequantizeLinear", [it.node.inputs[0], scale, zero])
    made = it.add("QuantizeLinear", [it.add(it.node.op_type, [value, *it.node.inputs[1:]]), scale, zero])
    it.known[made] = scale, zero
    return made


def _convolution(it: Spelling) -> ir.Value | None:
    """`x, sx, zx, w, sw, zw, sy, zy, bias`."""
    operands: list[ir.Value | None] = [it.meant(0), it.meant(3, axis=0)]
    if _maybe(it.node, 8) is not None:
        if (bias := it.bias(8)) is None:
            return None
        operands.append(bias)
    return it.quantise(it.add("Conv", operands), 6)


def _product(it: Spelling) -> ir.Value | None:
    """`a, sa, za, b, sb, zb, sy, zy`; scales of b go along its columns."""
    scale = constant(_at(it.node, 1))
    if scale is None or scale.size != 1:
        return None
    return it.quantise(it.add("MatMul", [it.meant(0), it.meant(3, axis=-1)]), 6)


def _affine(it: Spelling) -> ir.Value | None:
    """`a, sa, za, b, sb, zb, c, sy, zy`; without sy the result is a float."""
    alpha = it.node.attributes["alpha"].as_float() if "alpha" in it.node.attributes else 1.0
    operands: list[ir.Value | None] = [it.meant(0), it.meant(3, axis=0 if integer(it.node, "transB", 0) else 1)]
    if _maybe(it.node, 6) is not None:
        if (bias := it.bias(6, alpha)) is None:
            return None
        operands.append(bias)
    result = it.add("Gemm", operands)
    return it.quantise(result, 7) if _maybe(it.node, 7) is not None else result


def _pair(operator: str) -> Callable[[Spelling], ir.Value]:
    """`a, sa, za, b, sb, zb, sy, zy`."""
    return lambda it: it.quantise(it.add(operator, [it.meant(0), it.meant(3)]), 6)


def _single(operator: str) -> Callable[[Spelling], ir.Value | None]:
    """`x, sx, zx, sy, zy`."""

    def spell(it: Spelling) -> ir.Value | None:
        if integer(it.node, "channels_last", 0):
            return None
        for name in ("channels_last", "opset"):
            it.node.attributes.pop(name, None)
        return it.quantise(it.add(operator, [it.meant(0)]), 3)

    return spell


def _join(it: Spelling) -> ir.Value:
    """`sy, zy, x, sx, zx, …`."""
    return it.quantise(it.add("Concat", [it.meant(index) for index in range(2, len(it.node.inputs), 3)]), 0)


SPELT: dict[str, Callable[[Spelling], ir.Value | None]] = {
    "QLinearConv": _convolution, "QLinearMatMul": _product, "QGemm": _affine, "QLinearConcat": _join,
    "QLinearAdd": _pair("Add"), "QLinearMul": _pair("Mul"), "QLinearSigmoid": _single("Sigmoid"),
    "QLinearLeakyRelu": _single("LeakyRelu"), "QLinearSoftmax": _single("Softmax"),
    "QLinearAveragePool": _single("AveragePool"), "QLinearGlobalAveragePool": _single("GlobalAveragePool"),
}  # fmt: skip
