"""Matrix products. A weight is an operand like any other: its free axis brings the output's labels."""

from __future__ import annotations

import onnx_ir as ir

from onnxprune.labels.flow import Flow, Vector, given, integer, rule, text

CONTRACTED = "the axis that it is multiplied with can't be cut"


@rule("MatMul", "com.microsoft::FusedMatMul")
def matmul(flow: Flow, node: ir.Node) -> None:
    """`x[*b,i,k], y[*b,k,j] -> z[*b,i,j]`: k is tied, i and j pass, batch axes broadcast. Vectors lack i or j."""
    values = [node.inputs[0], node.inputs[1]]
    shapes = [flow.shape(value) for value in values]
    if values[0] is None or values[1] is None or not shapes[0] or not shapes[1]:
        return lock_operands(flow, node, "the shape of an operand is unknown")
    if integer(node, "transBatchA", 0) or integer(node, "transBatchB", 0):
        return lock_operands(flow, node, "a FusedMatMul that transposes batches")
    x, y = flow.of(values[0]), flow.of(values[1])
    x = (*x[:-2], x[-1], x[-2]) if integer(node, "transA", 0) and len(x) > 1 else x
    y = (*y[:-2], y[-1], y[-2]) if integer(node, "transB", 0) and len(y) > 1 else y
    flow.tie(x[-1], y[-2] if len(y) > 1 else y[-1], CONTRACTED)
    batch = _batch_axes(flow, (x[:-2], y[:-2]), (shapes[0][:-2], shapes[1][:-2]))
    if not any(value.is_initializer() for value in values if value is not None):
        flow.heads += [vector for vector in batch if vector is not None]
        if x[-1] is not None and any(vector is not None for vector in batch):
            flow.kinds.append((x[-1], "qk"))
    outer: list[Vector] = [*x[-2:-1], *(y[-1:] if len(y) > 1 else ())]
    flow.give(node.outputs[0], [*batch, *outer])


def _batch_axes(
    flow: Flow, vectors: tuple[tuple[Vector, ...], ...], shapes: tuple[tuple[int | None, ...], ...]
) -> list[Vector]:
    rank = max(len(shape) for shape in shapes)
    result: list[Vector] = []
    for axis in range(-rank, 0):
        wide = [
            vector[axis]
            for vector, shape in zip(vectors, shapes, strict=True)
            if len(shape) >= -axis and shape[axis] != 1
        ]
        if len(wide) == 2:
            flow.tie(wide[0], wide[1])
        result.append(wide[0] if wide and all(vector is not None for vector in wide) else None)
    return result


@rule("Gemm", "com.microsoft::FusedGemm")
def gemm(flow: Flow, node: ir.Node) -> None:
    """`a[i,k], b[k,j], c -> y[i,j]`, with a and b transposed on request and c broadcast to y."""
    a, b = flow.of(node.inputs[0]), flow.of(node.inputs[1])
    if len(a) != 2 or len(b) != 2:
        return lock_operands(flow, node, "the shape of an operand is unknown")
    a = a[::-1] if integer(node, "transA", 0) else a
    b = b[::-1] if integer(node, "transB", 0) else b
    flow.tie(a[1], b[0], CONTRACTED)
    if (c := given(node, 2)) is not None:
        for axis, (vector, size) in enumerate(zip(flow.of(c), flow.shape(c) or (), strict=True), 2 - len(flow.of(c))):
            if size != 1:
                flow.tie(vector, (a[0], b[1])[axis])
    flow.give(node.outputs[0], (a[0], b[1]))


@rule("Einsum")
def einsum(flow: Flow, node: ir.Node) -> None:
    """`x[i,...], y[j,...], ... -> z[k,...]`: axes of the same letter are tied, those that are left out are summed."""
    values = [value for value in node.inputs if value is not None]
    named = einsum_axes(text(node, "equation", ""), [len(flow.shape(value) or ()) for value in values])
    if named is None:
        return lock_operands(flow, node, "an Einsum equation that isn't understood")
    operands, result = named
    found: dict[str, Vector] = {}
    wide: dict[str, list[bool]] = {}
    for value, letters in zip(values, operands, strict=True):
        for vector, size, letter in zip(flow.of(value), flow.shape(value) or (), letters, strict=True):
            if size == 1:  # broadcast
                continue
            if letter in found:
                flow.tie(found[letter], vector, CONTRACTED)
                vector = None if vector is None else found[letter]
            found[letter] = vector
            wide.setdefault(letter, []).append(value.is_initializer())
    shared = [letter for letter, weights in wide.items() if len(weights) > 1 and not any(weights) and letter in found]
    heads = [found[letter] for letter in shared if letter in result]
    flow.heads += [vector for vector in heads if vector is not None]
    if any(vector is not None for vector in heads):
        inner = [found[letter] for letter in shared if letter not in result]
        flow.kinds += [(vector, "qk") for vector in inner if vector is not None]
    for letter in set(found) - set(result):
        flow.end(found[letter])
    flow.give(node.outputs[0], [found.get(letter) for letter in result])


def einsum_axes(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """The letters of every axis of every operand and of the result, "..." spelt out in digits.

    None for what can't be read, such as a letter that stands twice in one operand (a diagonal).
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        return None
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    most = max((count for term, count in zip(terms, hidden, strict=True) if "..." in term), default=0)
    digits = "0123456789"[:most]
    spelt = [
        term.replace("...", digits[most - count :] if count >= 0 else "?")
        for term, count in zip(terms, hidden, strict=True)
    ]
    if not arrow:
        letters = "".join(terms).replace(".", "")
        right = "..." * ("..." in left) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    result = right.replace("...", digits)
    fits = all(len(term) == rank == len(set(term)) for term, rank in zip(spelt, ranks, strict=True))
    return (spelt, result) if fits and set(result) <= set("".join(spelt)) else None


def lock_operands(flow: Flow, node: ir.Node, reason: str) -> None:
    """Locks every axis of every operand."""
    for value in node.inputs:
        flow.lock_all(flow.of(value), reason)
