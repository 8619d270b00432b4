"""Checking models that are too large to hold: every large weight is stood in for by a product of two small matrices.

Whether a cut is right depends on which positions went, not on the numbers that stood there. A stand-in is computed when
its consumer runs and freed after it, so that a model of any size is checked in the memory of its largest tensor.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import onnx_ir as ir
from onnxruntime import InferenceSession

from onnxprune.evaluating.evaluate import unoptimised
from onnxprune.graph.model import KEPT, SIZE_BEFORE, open_session, weight_bytes
from onnxprune.graph.shapes import add_initializer

LARGE = 2**29  # bytes of weights above which a model is checked with stand-ins
HEAVY = 2**20  # bytes of a weight that is stood in for
RANK = 4


def needed(*models: ir.Model) -> bool:
    """Whether models are to be compared with stand-ins: large, and known to come from the same weights."""
    if max(map(weight_bytes, models)) <= LARGE or min(model.opset_imports.get("", 0) for model in models) < 15:
        return False
    weights = [{value.name: _shape_before(value) for value in _heavy(model)} for model in models]
    return all(found == weights[0] for found in weights)


def _heavy(model: ir.Model) -> list[ir.Value]:
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    values = model.graph.initializers.values()
    return [v for v in values if v.dtype in floats and v.const_value is not None and _bytes_before(v) > HEAVY]


def _bytes_before(value: ir.Value) -> int:
    """The size of an initializer before it was cut."""
    assert value.dtype is not None
    return int(math.prod(_shape_before(value)) * value.dtype.bitwidth // 8)


def _shape_before(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    shape = tuple(int(dim) for dim in value.const_value.shape.numpy())
    return tuple(value.meta.get(SIZE_BEFORE, shape))


def stand_in_session(model: ir.Model) -> InferenceSession:
    """A session of a copy of the model whose heavy weights are stood in for."""
    copy = model.clone()
    for original, value in zip(_heavy(model), _heavy(copy), strict=True):
        value.meta.update(original.meta)
        users = list(value.uses())
        for node, index in users:
            node.replace_input_with(index, _product(copy, value, node))
        if users:
            copy.graph.initializers.pop(value.name or "")
    return open_session(copy, unoptimised())


def _product(model: ir.Model, value: ir.Value, user: ir.Node) -> ir.Value:
    """`w[a,b] = u[a,r] v[r,b]` in front of the node that reads it, and not before the node's other input is there."""
    before, kept = _shape_before(value), value.meta.get(KEPT)
    at = min(range(1, max(2, len(before))), key=lambda i: math.prod(before[:i]) + math.prod(before[i:]))
    rng = np.random.default_rng(zlib.crc32((value.name or "").encode()))
    scale = (max(before) / math.prod(before) / RANK) ** 0.25
    u, v = (rng.standard_normal((*part, RANK)).astype(np.float32) * scale for part in (before[:at], before[at:]))
    for axis, positions in enumerate(kept or ()):
        if positions is not None:
            u, v = (u.take(positions, axis), v) if axis < at else (u, v.take(positions, axis - at))
    left = add_initializer(model, f"{value.name}.u", u.reshape(-1, RANK))
    right = add_initializer(model, f"{value.name}.v", np.ascontiguousarray(v.reshape(-1, RANK).T))
    shape = add_initializer(model, f"{value.name}.shape", np.array([*u.shape[:-1], *v.shape[:-1]], np.int64))

    def add(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=f"{user.name}.stand{len(model.graph)}")
        node.outputs[0].name = node.name
        model.graph.insert_before(user, node)
        return node.outputs[0]

    other = next((each for each in user.inputs if each is not None and not each.is_initializer()), None)
    if other is not None:
        size = add("Shape", other, start=0, end=1)
        end = add_initializer(model, f"{value.name}.end", np.array([2**31 - 1], np.int64))
        left = add("Slice", left, add("Sub", size, size), end)
    product = add("Reshape", add("MatMul", left, right), shape)
    return product if value.dtype == ir.DataType.FLOAT else add("Cast", product, to=int(value.dtype or 1))
