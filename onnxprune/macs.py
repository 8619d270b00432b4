"""Multiply-accumulate counts. Convention: products of convolutions, matrix products and recurrent layers, nothing else.

Adds, normalisations and activations don't count; two walks over the same shapes give the same number.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from onnxprune.labels.recurrent import GATES

Size = Callable[[ir.Value], tuple[int, ...] | None]


def node_macs(node: ir.Node, size: Size) -> int:
    """The MACs of one node, given the concrete shape of each value; 0 where a shape is unknown."""
    shapes = [size(value) if value is not None else None for value in node.inputs]
    out = size(node.outputs[0])
    if node.op_type in GATES:
        x, w, r = shapes[:3]
        return 0 if not (x and w and r) else x[0] * x[1] * (math.prod(w) + math.prod(r))
    if out is None or len(shapes) < 2 or shapes[0] is None or shapes[1] is None:
        return 0
    if node.op_type in ("Conv", "FusedConv"):
        return math.prod(out) * math.prod(shapes[1][1:])
    if node.op_type == "ConvTranspose":
        return math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if node.op_type in ("MatMul", "FusedMatMul"):
        return math.prod(out) * shapes[0][-1]
    if node.op_type == "Gemm":
        transposed = "transA" in node.attributes and node.attributes["transA"].as_int()
        return math.prod(out) * shapes[0][0 if transposed else 1]
    return 0


def count_macs(model: ir.Model, size: Size) -> int:
    """The MACs of one run of a model at the batch size that `size` speaks of."""
    return sum(node_macs(node, size) for node in model.graph)
