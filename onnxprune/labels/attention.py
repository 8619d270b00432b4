"""Attention in one operator, and rotary embeddings: an axis of hidden units is (heads, head_dim), row by row."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxprune.labels.flow import Flow, Vector, given, integer, integers, rule
from onnxprune.labels.linear import CONTRACTED, lock_operands
from onnxprune.labels.reshaping import merge, split
from onnxprune.labels.resizing import Cut, resize

Heads = tuple[Vector, Vector]  # the labels of the heads, and of the positions inside every head


def attend(flow: Flow, q: Heads, k: Heads, v: Heads, heads: tuple[int, int]) -> Heads:
    """`softmax(q[h,d] k[g,d]) v[g,e] -> y[h,e]`, h = (g, n): n heads of the queries share one of keys and values."""
    shared, per_group = heads[1], heads[0] // heads[1]
    flow.tie(q[1], k[1], CONTRACTED)
    if shared > 1:
        flow.tie(k[0], v[0])
        rows = split(flow, q[0], [shared, per_group])[0] if per_group > 1 and q[0] is not None else q[0]
        flow.tie(rows, k[0], "the heads of keys and values can't be cut")
    flow.heads += [rows for rows in (q[0], k[0]) if rows is not None]
    return q[0], v[1]


def unfold(flow: Flow, flat: Vector, heads: int) -> Heads:
    """The heads and the inner positions of one axis of hidden units."""
    if flat is None:
        return None, None
    rows, inner = split(flow, flat, [heads, len(flat) // heads])
    return rows, inner


def fold(flow: Flow, rows: Vector, inner: Vector, heads: int, size: int) -> Vector:
    """The reverse of `unfold`."""
    return merge(flow, [rows, inner], [heads, size])


def _bias_axis(flow: Flow, node: ir.Node, index: int, rows: Vector) -> None:
    """An attention mask or bias (..., heads or 1, queries, keys): its axis of heads is tied, the others stay."""
    if (bias := given(node, index)) is not None:
        axes, shape = flow.of(bias), flow.shape(bias) or ()
        for axis, vector in enumerate(axes):
            if axis == len(axes) - 3 and shape[axis] != 1:
                flow.tie(vector, rows, "the attention mask can't be cut")
            else:
                flow.lock(vector, "attention reads it as a mask")


def _caches(flow: Flow, node: ir.Node, inputs: tuple[int, int], outputs: tuple[int, int], k: Heads, v: Heads) -> None:
    """Past and present keys and values, (batch, heads, time, head_dim)."""
    for index, (rows, inner) in zip(inputs, (k, v), strict=True):
        if (past := given(node, index)) is not None:
            axes = flow.of(past)
            if len(axes) != 4:
                flow.lock_all((rows, inner, *axes), "the layout of the past keys and values isn't understood")
                continue
            flow.lock_all((axes[0], axes[2]), "batch and time stay")
            flow.tie(axes[1], rows, "the past keys and values can't be cut")
            flow.tie(axes[3], inner, "the past keys and values can't be cut")
    for index, (rows, inner) in zip(outputs, (k, v), strict=True):
        if index < len(node.outputs) and node.outputs[index].name:
            flow.give(node.outputs[index], (None, rows, None, inner))


@rule("Attention")
def attention(flow: Flow, node: ir.Node) -> None:
    """`q[b,h,s,d], k[b,g,t,d], v[b,g,t,e], mask -> y[b,h,s,e]`; or with axes joined, `q[b,s,(h d)]` and so on."""
    operands = [flow.of(node.inputs[i]) for i in range(3)]
    if any(len(axes) not in (3, 4) for axes in operands):
        return lock_operands(flow, node, "the shape of an operand is unknown")
    joined = len(operands[0]) == 3
    heads = _head_counts(flow, node)
    if joined:
        q, k, v = (unfold(flow, axes[2], count) for axes, count in zip(operands, heads, strict=True))
        flow.lock_all([vector for axes in operands for vector in axes[:2]], "batch and sequence stay")
    else:
        q, k, v = ((axes[1], axes[3]) for axes in operands)
        flow.lock_all([axes[i] for axes in operands for i in (0, 2)], "batch and sequence stay")
    rows, inner = attend(flow, q, k, v, heads[:2])
    _bias_axis(flow, node, 3, rows)
    _caches(flow, node, (4, 5), (1, 2), k, v)
    size = (flow.shape(node.outputs[0]) or (0,))[-1] or 0
    out = (None, None, fold(flow, rows, inner, heads[0], size // heads[0])) if joined else (None, rows, None, inner)
    flow.give(node.outputs[0], out)
    if len(node.outputs) > 3 and node.outputs[3].name:
        flow.give(node.outputs[3], (None, rows, None, None))


def _head_counts(flow: Flow, node: ir.Node) -> tuple[int, int, int]:
    """The heads of queries, keys and values."""
    shape = flow.shape(node.inputs[0]) or ()
    if len(shape) == 4:
        other = flow.shape(node.inputs[1]) or (1, 1)
        return shape[1] or 1, other[1] or 1, other[1] or 1
    queries = integer(node, "q_num_heads", 1)
    shared = integer(node, "kv_num_heads", queries)
    return queries, shared, shared


@resize("Attention")
def resize_attention(cut: Cut, node: ir.Node) -> None:
    """Head counts are attributes where axes are joined; the scale that follows from head_dim stays what it was."""
    if len(cut.axes(node.inputs[0])) == 4:
        return _keep_scale(cut, node, cut.size_before(node.inputs[0], 3), cut.size(node.inputs[0], 3))
    for name, index in (("q_num_heads", 0), ("kv_num_heads", 1)):
        if name in node.attributes:
            before, (rows, inner) = integer(node, name, 1), _kept(cut, node.inputs[index], 2, integer(node, name, 1))
            node.attributes[name] = ir.AttrInt64(name, rows)
            if index == 0:
                _keep_scale(cut, node, cut.size_before(node.inputs[0], 2) // before, inner)


def _kept(cut: Cut, value: ir.Value | None, axis: int, heads: int) -> tuple[int, int]:
    """How many heads, and positions inside each, survive on an axis of hidden units."""
    vector = cut.axes(value)[axis]
    if vector is None:
        return heads, cut.size_before(value, axis) // heads
    return _kept_of(cut, vector, heads)


def _kept_of(cut: Cut, vector: np.ndarray[tuple[int, ...], np.dtype[np.int64]], heads: int) -> tuple[int, int]:
    kept = cut.is_kept(vector).reshape(heads, -1)
    return int(kept.any(1).sum()), int(kept.any(0).sum()) if kept.any() else 0


def _keep_scale(cut: Cut, node: ir.Node, before: int, after: int) -> None:
    """Attention divides by the root of head_dim unless told otherwise: told, when head_dim changes."""
    given_scale = node.attributes["scale"].as_float() if "scale" in node.attributes else 0.0
    if before != after and not given_scale:
        node.attributes["scale"] = ir.AttrFloat32("scale", 1 / math.sqrt(before))


@rule("com.microsoft::MultiHeadAttention")
def multi_head(flow: Flow, node: ir.Node) -> None:
    """`q[b,s,(h d)], k[b,t,(h d)], v[b,t,(h e)], bias[(q k v)], padding, mask, pasts -> y[b,s,(h e)]`."""
    heads = integer(node, "num_heads", 1)
    operands = [flow.of(given(node, i)) for i in range(3)]
    if any(len(axes) != 3 for axes in operands):
        return lock_operands(flow, node, "packed or transposed operands of MultiHeadAttention")
    flow.lock_all([vector for axes in operands for vector in axes[:2]], "batch and sequence stay")
    flats = [axes[2] for axes in operands]
    q, k, v = (unfold(flow, flat, heads) for flat in flats)
    if (bias := given(node, 3)) is not None:
        whole = flow.of(bias)[0]
        edges = np.cumsum([0, *[(flow.shape(node.inputs[i]) or (0,))[-1] or 0 for i in range(3)]])
        for flat, start, end in zip(flats, edges[:-1], edges[1:], strict=True):
            flow.tie(None if whole is None else whole[start:end], flat)
    rows, inner = attend(flow, q, k, v, (heads, heads))
    _bias_axis(flow, node, 5, rows)
    _caches(flow, node, (6, 7), (1, 2), k, v)
    size = (flow.shape(node.outputs[0]) or (0,))[-1] or 0
    flow.give(node.outputs[0], (None, None, fold(flow, rows, inner, heads, size // heads)))


@resize("com.microsoft::MultiHeadAttention")
def resize_multi_head(cut: Cut, node: ir.Node) -> None:
    """The head count is an attribute; the scale that follows from head_dim stays what it was."""
    heads = integer(node, "num_heads", 1)
    rows, inner = _kept(cut, node.inputs[0], 2, heads)
    node.attributes["num_heads"] = ir.AttrInt64("num_heads", rows)
    _keep_scale(cut, node, cut.size_before(node.inputs[0], 2) // heads, inner)


@rule("com.microsoft::GroupQueryAttention")
def grouped_queries(flow: Flow, node: ir.Node) -> None:
    """`q[b,s,(h d)], k[b,t,(g d)], v[b,t,(g d)], pasts[b,g,p,d], lengths … -> y[b,s,(h d)]`, h = (g, n)."""
    heads, shared = integer(node, "num_heads", 1), integer(node, "kv_num_heads", 1)
    operands = [flow.of(given(node, i)) for i in range(3)]
    if any(len(axes) != 3 for axes in operands):
        return lock_operands(flow, node, "packed operands of GroupQueryAttention")
    flow.lock_all([vector for axes in operands for vector in axes[:2]], "batch and sequence stay")
    q = unfold(flow, operands[0][2], heads)
    k, v = (unfold(flow, axes[2], shared) for axes in operands[1:])
    if integer(node, "do_rotary", 0):
        flow.lock(k[1], "rotary embedding turns it")
    rows, inner = attend(flow, q, k, v, (heads, shared))
    flow.tie(k[1], v[1])  # the cache has one head_dim for both
    _caches(flow, node, (3, 4), (1, 2), k, v)
    size = (flow.shape(node.outputs[0]) or (0,))[-1] or 0
    flow.give(node.outputs[0], (None, None, fold(flow, rows, inner, heads, size // heads)))


@resize("com.microsoft::GroupQueryAttention")
def resize_grouped_queries(cut: Cut, node: ir.Node) -> None:
    """Head counts are attributes; the scale that follows from head_dim stays what it was."""
    for name, index in (("num_heads", 0), ("kv_num_heads", 1)):
        heads = integer(node, name, 1)
        rows, inner = _kept(cut, node.inputs[index], 2, heads)
        node.attributes[name] = ir.AttrInt64(name, rows)
        if index == 0:
            _keep_scale(cut, node, cut.size_before(node.inputs[0], 2) // heads, inner)


@rule("com.microsoft::Attention")
def packed_attention(flow: Flow, node: ir.Node) -> None:
    """`x[b,s,i], w[i,(q k v)], bias[(q k v)], mask, past, mask -> y[b,s,(h e)]`, with q = k = (h d) and v = (h e)."""
    x, w, heads = flow.of(node.inputs[0]), flow.of(node.inputs[1]), integer(node, "num_heads", 1)
    shape = flow.shape(node.inputs[1])
    past = given(node, 4) is not None or (len(node.outputs) > 1 and bool(node.outputs[1].uses()))
    if len(x) != 3 or len(w) != 2 or shape is None or shape[1] is None or w[1] is None or past:
        return lock_operands(flow, node, "past keys and values, or unknown shapes, in Attention")
    flow.lock_all(x[:2], "batch and sequence stay")
    flow.tie(x[2], w[0], "the input of this Attention can't be cut")
    if (bias := given(node, 2)) is not None:
        flow.tie(flow.of(bias)[0], w[1])
    parts = np.split(w[1], np.cumsum(_sizes(node, shape[1]))[:2])
    q, k, v = (unfold(flow, part, heads) for part in parts)
    if integer(node, "do_rotary", 0):
        flow.lock(k[1], "rotary embedding turns it")
    rows, _ = attend(flow, q, k, v, (heads, heads))
    _bias_axis(flow, node, 5, rows)
    flow.give(node.outputs[0], (None, None, parts[2]))


def _sizes(node: ir.Node, total: int) -> list[int]:
    return integers(node, "qkv_hidden_sizes") or [total // 3] * 3


@resize("com.microsoft::Attention")
def resize_packed_attention(cut: Cut, node: ir.Node) -> None:
    """Head count and hidden sizes are attributes; the scale that follows from head_dim stays what it was."""
    vector, heads = cut.axes(node.inputs[1])[1], integer(node, "num_heads", 1)
    if vector is None:
        return
    sizes = _sizes(node, len(vector))
    parts = np.split(vector, np.cumsum(sizes)[:2])
    rows, inner = _kept_of(cut, parts[0], heads)
    node.attributes["num_heads"] = ir.AttrInt64("num_heads", rows)
    left = [int(cut.is_kept(part).sum()) for part in parts]
    if len(set(left)) > 1 or "qkv_hidden_sizes" in node.attributes:
        node.attributes["qkv_hidden_sizes"] = ir.AttrInt64s("qkv_hidden_sizes", left)
    _keep_scale(cut, node, sizes[0] // heads, inner)


@rule("RotaryEmbedding", "com.microsoft::RotaryEmbedding")
def rotary(flow: Flow, node: ir.Node) -> None:
    """`x[b,h,s,d] or x[b,s,(h d)], cos, sin -> y` of the same shape: heads pass, what is turned inside them stays."""
    x = flow.of(node.inputs[0])
    for value in node.inputs[1:]:
        flow.lock_all(flow.of(value), "rotary embedding reads it as it is")
    if len(x) == 4:
        flow.lock(x[3], "rotary embedding turns it")
        return flow.give(node.outputs[0], (x[0], x[1], x[2], None))
    heads = _rotary_heads(flow, node)
    if len(x) != 3 or x[2] is None or not heads:
        return lock_operands(flow, node, "rotary embedding over an unknown number of heads")
    _, inner = unfold(flow, x[2], heads)
    flow.lock(inner, "rotary embedding turns it")
    flow.give(node.outputs[0], (x[0], x[1], x[2]))


def _rotary_heads(flow: Flow, node: ir.Node) -> int:
    if (heads := integer(node, "num_heads", 0)) or node.domain == "":
        return heads
    table, hidden = flow.shape(node.inputs[2]), flow.shape(node.inputs[0])
    if not table or not hidden or not table[-1] or not hidden[-1]:
        return 0
    return hidden[-1] // (2 * table[-1])


@resize("RotaryEmbedding", "com.microsoft::RotaryEmbedding")
def resize_rotary(cut: Cut, node: ir.Node) -> None:
    """The head count is an attribute."""
    if (heads := integer(node, "num_heads", 0)) and len(cut.axes(node.inputs[0])) == 3:
        node.attributes["num_heads"] = ir.AttrInt64("num_heads", _kept(cut, node.inputs[0], 2, heads)[0])
