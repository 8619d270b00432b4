"""Element by element: activations by functions that neither overflow nor lack a gradient, sums of several values."""

from __future__ import annotations

import onnx_ir as ir

from onnxprune.training.lowering.base import Lowerer, attribute, first, lowering


@lowering("Dropout")
def _dropout(lower: Lowerer, node: ir.Node) -> None:
    """Off, as in inference."""
    lower.replace_by(node, first(node))


@lowering("HardSigmoid", "HardSwish")
def _hard(lower: Lowerer, node: ir.Node) -> None:
    """clip(alpha x + beta, 0, 1), times x for HardSwish."""
    x, swish = first(node), node.op_type == "HardSwish"
    alpha, beta, zero, one = (
        lower.number(node, v)
        for v in (attribute(node, "alpha", 1 / 6 if swish else 0.2), attribute(node, "beta", 0.5), 0, 1)
    )
    inner = lower.add(node, "Add", [lower.add(node, "Mul", [x, alpha]), beta])
    if swish:
        lower.replace(node, "Mul", [x, lower.add(node, "Clip", [inner, zero, one])])
    else:
        lower.replace(node, "Clip", [inner, zero, one])


def _negative_part(lower: Lowerer, node: ir.Node, x: ir.Value) -> ir.Value:
    """max(-x, 0)."""
    return lower.add(node, "Relu", [lower.add(node, "Neg", [x])])


@lowering("PRelu")
def _prelu(lower: Lowerer, node: ir.Node) -> None:
    """max(x, 0) - slope max(-x, 0)."""
    x, slope = node.inputs
    assert x is not None and slope is not None
    below = _negative_part(lower, node, x)
    lower.replace(node, "Sub", [lower.add(node, "Relu", [x]), lower.add(node, "Mul", [slope, below])])


EXPONENTIAL = {"Elu": 1.0, "Selu": 1.67326319217681884765625, "Celu": 1.0}  # and the usual alpha


@lowering(*EXPONENTIAL)
def _exponential(lower: Lowerer, node: ir.Node) -> None:
    """gamma (max(x, 0) + alpha (exp(min(x, 0)) - 1)); for Celu the exponent is over alpha."""
    x, alpha = first(node), attribute(node, "alpha", EXPONENTIAL[node.op_type])
    gamma = attribute(node, "gamma", 1.05070102214813232421875) if node.op_type == "Selu" else 1.0
    exponent = lower.add(node, "Neg", [_negative_part(lower, node, x)])
    if node.op_type == "Celu":
        exponent = lower.add(node, "Div", [exponent, lower.number(node, alpha)])
    raised = lower.add(node, "Sub", [lower.add(node, "Exp", [exponent]), lower.number(node, 1)])
    below = lower.add(node, "Mul", [raised, lower.number(node, alpha)])
    both = lower.add(node, "Add", [lower.add(node, "Relu", [x]), below])
    lower.replace(node, "Mul", [both, lower.number(node, gamma)])


@lowering("Softplus")
def _softplus(lower: Lowerer, node: ir.Node) -> None:
    """max(x, 0) + log(1 + exp(-|x|)), whose exponential never overflows."""
    x = first(node)
    small = lower.add(node, "Exp", [lower.add(node, "Neg", [lower.add(node, "Abs", [x])])])
    rest = lower.add(node, "Log", [lower.add(node, "Add", [small, lower.number(node, 1)])])
    lower.replace(node, "Add", [lower.add(node, "Relu", [x]), rest])


PAIRWISE = {"Sum": "Add", "Mean": "Add", "Max": "Max", "Min": "Min"}


@lowering(*PAIRWISE)
def _several(lower: Lowerer, node: ir.Node) -> None:
    """Two at a time, as gradients want it."""
    total, *rest = (value for value in node.inputs if value is not None)
    if len(rest) == 1 and node.op_type in ("Max", "Min"):
        return
    for value in rest:
        total = lower.add(node, PAIRWISE[node.op_type], [total, value])
    if node.op_type == "Mean":
        total = lower.add(node, "Div", [total, lower.number(node, len(node.inputs))])
    lower.replace_by(node, total)


@lowering("CastLike")
def _cast_like(lower: Lowerer, node: ir.Node) -> None:
    """A cast to the type of the other input."""
    other = node.inputs[1]
    kind = (other.dtype or lower.shapes.element_type(other)) if other is not None else None
    if kind is None:
        raise lower.refusal(node, "the type that it casts to isn't known")
    lower.replace(node, "Cast", [first(node)], to=int(kind))
