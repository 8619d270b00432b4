"""Reductions along axes, and products that sum over them."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxprune.graph.model import constant
from onnxprune.labels.flow import integer, integers
from onnxprune.training.lowering.base import Lowerer, first, lowering


@lowering("ReduceMax", "ReduceMin", "GlobalMaxPool")
def _extreme(lower: Lowerer, node: ir.Node) -> None:
    """The mean of the elements that equal the extreme: where it is reached several times, they share the gradient."""
    x, kept = first(node), integer(node, "keepdims", 1)
    rank = len(lower.sizes(node, x))
    axes = list(range(2, rank)) if node.op_type == "GlobalMaxPool" else _axes(lower, node, rank)
    if not axes:
        lower.replace_by(node, x)
        return
    op = "ReduceMin" if node.op_type == "ReduceMin" else "ReduceMax"
    if lower.opset < 18:
        extreme = lower.add(node, op, [x], axes=axes, keepdims=1)
    else:
        extreme = lower.add(node, op, [x, lower.integers(node, *axes)], keepdims=1)
    there = lower.add(node, "Cast", [lower.add(node, "Equal", [x, extreme])], to=int(ir.DataType.FLOAT))
    chosen = lower.sum(node, lower.add(node, "Mul", [x, there]), axes)
    mean = lower.add(node, "Div", [chosen, lower.sum(node, there, axes)])
    if not kept:
        mean = lower.add(node, "Squeeze", [mean, lower.integers(node, *axes)])
    lower.replace_by(node, mean)


def _axes(lower: Lowerer, node: ir.Node, rank: int) -> list[int]:
    given = integers(node, "axes")
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = constant(node.inputs[1])
        if array is None:
            raise lower.refusal(node, "its axes aren't constant")
        given = [int(axis) for axis in array]
    if not given:
        return [] if integer(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(axis % rank for axis in given)


@lowering("CumSum")
def _running_sum(lower: Lowerer, node: ir.Node) -> None:
    """The product with a triangular matrix along the axis."""
    x, at = first(node), constant(node.inputs[1])
    shape = lower.sizes(node, x)
    if at is None:
        raise lower.refusal(node, "its axis isn't constant")
    axis = int(at.reshape(-1)[0]) % len(shape)
    matrix = np.tri(shape[axis], k=-integer(node, "exclusive", 0), dtype=np.float32)
    if integer(node, "reverse", 0):
        matrix = np.ascontiguousarray(matrix.T)
    lower.replace_by(node, lower.along_axis(node, x, len(shape), axis, matrix))


@lowering("Einsum")
def _einsum(lower: Lowerer, node: ir.Node) -> None:
    """Of two values, as a product of matrices: (common, own of the first, summed) x (common, summed, own of the other).

    Of one value as a sum and a transposition.
    """
    terms, result, sizes = _equation(lower, node)
    values = [value for value in node.inputs if value is not None]
    lonely = [[letter for letter in term if letter not in result + "".join(terms[:i] + terms[i + 1 :])]
              for i, term in enumerate(terms)]  # fmt: skip
    for index, letters in enumerate(lonely):
        if letters:
            values[index] = lower.sum(node, values[index], [terms[index].index(letter) for letter in letters])
            kept = [letter for letter in terms[index] if letter not in letters]
            terms[index] = "".join(kept)
            values[index] = lower.reshape(node, values[index], *(sizes[letter] for letter in kept))
    if len(terms) == 1:
        lower.replace(node, "Transpose", values, perm=[terms[0].index(letter) for letter in result])
        return
    a, b = terms
    common = [letter for letter in a if letter in b and letter in result]
    summed = [letter for letter in a if letter in b and letter not in result]
    own = [[letter for letter in term if letter not in common + summed] for term in terms]
    left = _as_matrix(lower, node, values[0], a, [common, own[0], summed], sizes)
    right = _as_matrix(lower, node, values[1], b, [common, summed, own[1]], sizes)
    order = [*common, *own[0], *own[1]]
    product = lower.reshape(node, lower.add(node, "MatMul", [left, right]), *(sizes[letter] for letter in order))
    lower.replace(node, "Transpose", [product], perm=[order.index(letter) for letter in result])


def _equation(lower: Lowerer, node: ir.Node) -> tuple[list[str], str, dict[str, int]]:
    """The letters of each value and of the result, and their sizes; dots become capital letters."""
    text = node.attributes["equation"].as_string().replace(" ", "")
    left, arrow, result = text.partition("->")
    terms, sizes = left.split(","), dict[str, int]()
    if not arrow or len(terms) > 2 or any(letter.isupper() for letter in text):
        raise lower.refusal(node, f"the equation {text!r} has no arrow, capital letters, or more than two terms")
    for index, value in enumerate(node.inputs):
        shape = lower.sizes(node, value)
        dots = "".join(chr(ord("Z") - i) for i in reversed(range(len(shape) - len(terms[index].replace("...", "")))))
        terms[index] = terms[index].replace("...", dots)
        result = result.replace("...", dots)
        if len(set(terms[index])) < len(terms[index]):
            raise lower.refusal(node, f"the equation {text!r} has a letter twice in a term")
        for letter, size in zip(terms[index], shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise lower.refusal(node, f"the equation {text!r} broadcasts")
    return terms, result, sizes


def _as_matrix(
    lower: Lowerer, node: ir.Node, value: ir.Value, term: str, groups: list[list[str]], sizes: dict[str, int]
) -> ir.Value:
    order = [term.index(letter) for group in groups for letter in group]
    turned = lower.add(node, "Transpose", [value], perm=order)
    return lower.reshape(node, turned, *(math.prod(sizes[letter] for letter in group) for group in groups))
