"""Operators that onnxruntime's optimiser fuses, spelt out again: rows by operator of the domain com.microsoft."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from onnxprune.graph.shapes import replace_node
from onnxprune.labels.flow import integer, integers, operator_name, text
from onnxprune.training.lowering.base import Builder, attribute, first

Row = Callable[[Builder, ir.Node], ir.Value | None]
FUSED: dict[str, Row] = {}
EPSILON, MASKED = 1e-12, -10000.0  # the defaults of fused normalisations, and of what is masked in attention


def fused(*operators: str) -> Callable[[Row], Row]:
    """Registers what these operators are: a row returns the first output, or None for a form that it doesn't know."""

    def register(function: Row) -> Row:
        FUSED.update({f"com.microsoft::{name}": function for name in operators})
        return function

    return register


def unfuse(model: ir.Model) -> None:
    """Spells fused operators out, in place; forms without a row stay as they are."""
    builder = Builder(model)
    for node in list(model.graph):
        row = FUSED.get(operator_name(node))
        value = row(builder, node) if row is not None else None
        if value is not None:
            node.resize_outputs(1)  # rows have seen to it that no other is used
            replace_node(model, node, ir.node("Identity", [value], name=f"{node.name}.spelt"))


def _used(node: ir.Node, index: int) -> bool:
    return len(node.outputs) > index and bool(list(node.outputs[index].uses()) or node.outputs[index].is_graph_output())


def _input(node: ir.Node, index: int) -> ir.Value | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return value if value is not None and value.name else None


@fused("FusedConv", "FusedGemm")
def _with_activation(b: Builder, node: ir.Node) -> ir.Value | None:
    """A product, for FusedConv the sum with a fourth input, and an activation."""
    conv = node.op_type == "FusedConv"
    plain = {name: value for name, value in node.attributes.items() if not name.startswith("activation")}
    product = ir.Node("", node.op_type.removeprefix("Fused"), node.inputs[:3], plain.values(), num_outputs=1)
    product.name = f"{node.name}.product"
    b.model.graph.insert_before(node, product)
    value = product.outputs[0]
    value.name = product.name
    if conv and (other := _input(node, 3)) is not None:
        value = b.add(node, "Add", [value, other])
    kind = text(node, "activation", "")
    given = [*node.attributes["activation_params"].as_floats()] if "activation_params" in node.attributes else []
    given = given or [attribute(node, f"activation_{name}", 0.0) for name in ("alpha", "beta")]
    if kind == "Clip":
        return b.add(node, "Clip", [value, *(b.number(node, bound) for bound in given[:2])])
    if kind == "LeakyRelu":
        return b.add(node, kind, [value], alpha=given[0])
    if kind == "HardSigmoid":
        return b.add(node, kind, [value], alpha=given[0], beta=given[1])
    return b.add(node, kind, [value]) if kind in ("Relu", "Sigmoid", "Tanh") else None if kind else value


@fused("BiasGelu", "Gelu", "FastGelu", "QuickGelu")
def _gelu(b: Builder, node: ir.Node) -> ir.Value:
    """x Phi(x), its approximation by tanh, and that by a sigmoid; of the sum with a bias, if there is one."""
    x = first(node)
    if (bias := _input(node, 1)) is not None:
        x = b.add(node, "Add", [x, bias])
    if node.op_type == "QuickGelu":
        scaled = b.add(node, "Mul", [x, b.number(node, attribute(node, "alpha", 1.702))])
        return b.add(node, "Mul", [x, b.add(node, "Sigmoid", [scaled])])
    if node.op_type == "FastGelu":
        cube = b.add(node, "Mul", [b.add(node, "Mul", [x, x]), b.add(node, "Mul", [x, b.number(node, 0.044715)])])
        inner = b.add(node, "Mul", [b.add(node, "Add", [x, cube]), b.number(node, math.sqrt(2 / math.pi))])
        curve = b.add(node, "Tanh", [inner])
    else:
        curve = b.add(node, "Erf", [b.add(node, "Mul", [x, b.number(node, math.sqrt(0.5))])])
    half = b.add(node, "Mul", [x, b.number(node, 0.5)])
    return b.add(node, "Mul", [half, b.add(node, "Add", [curve, b.number(node, 1.0)])])


@fused("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
def _skip_norm(b: Builder, node: ir.Node) -> ir.Value | None:
    """The normalised sum of input, skip and bias; the sum itself is the fourth output."""
    if _used(node, 1) or _used(node, 2):
        return None
    simple = node.op_type != "SkipLayerNormalization"
    total = b.add(node, "Add", [first(node), _some(node, 1)])
    if (bias := _input(node, 3 if simple else 4)) is not None:
        total = b.add(node, "Add", [total, bias])
    if _used(node, 3):
        node.outputs[3].replace_all_uses_with(total, replace_graph_outputs=True)
    epsilon = attribute(node, "epsilon", EPSILON)
    if simple:
        square = b.mean(node, b.add(node, "Mul", [total, total]), [-1])
        size = b.add(node, "Sqrt", [b.add(node, "Add", [square, b.number(node, epsilon)])])
        return b.add(node, "Mul", [b.add(node, "Div", [total, size]), _some(node, 2)])
    parameters = [value for index in (2, 3) if (value := _input(node, index)) is not None]
    return b.add(node, "LayerNormalization", [total, *parameters], axis=-1, epsilon=epsilon)


@fused("EmbedLayerNormalization")
def _embedding(b: Builder, node: ir.Node) -> ir.Value | None:
    """The normalised sum of the embeddings of words, positions, and segments if there are any."""
    if _used(node, 1):
        return None  # what it makes of the mask
    ids, segments, words, positions, kinds = (_input(node, index) for index in range(5))
    assert ids is not None and words is not None and positions is not None
    if (given := _input(node, 8)) is not None:
        placed = b.add(node, "Gather", [positions, given])
    else:
        length = b.add(node, "Slice", [b.add(node, "Shape", [ids]), b.integers(node, 1), b.integers(node, 2)])
        placed = b.add(node, "Slice", [positions, b.integers(node, 0), length, b.integers(node, 0)])
    total = b.add(node, "Add", [b.add(node, "Gather", [words, ids]), placed])
    if segments is not None and kinds is not None:
        total = b.add(node, "Add", [total, b.add(node, "Gather", [kinds, segments])])
    if _used(node, 2):
        node.outputs[2].replace_all_uses_with(total, replace_graph_outputs=True)
    parameters = [value for index in (5, 6) if (value := _input(node, index)) is not None]
    return b.add(node, "LayerNormalization", [total, *parameters], axis=-1, epsilon=attribute(node, "epsilon", EPSILON))


@fused("Attention")
def _packed_attention(b: Builder, node: ir.Node) -> ir.Value | None:
    """Attention behind one projection to queries, keys and values, with a mask of the keys, (batch, keys), if any."""
    x, weight, bias, mask, past, added = (_input(node, index) for index in range(6))
    assert x is not None and weight is not None
    if past is not None or integer(node, "unidirectional", 0) or integer(node, "do_rotary", 0) or _used(node, 1):
        return None
    if weight.shape is None or (mask is not None and (mask.shape is None or len(mask.shape) != 2)):
        return None
    sizes = integers(node, "qkv_hidden_sizes") or [int(str(weight.shape[1])) // 3] * 3
    projected = b.add(node, "MatMul", [x, weight])
    if bias is not None:
        projected = b.add(node, "Add", [projected, bias])
    q, k, v = b.add_all(node, "Split", [projected, b.integers(node, *sizes)], 3, axis=-1)
    extra = [added] if added is not None else []
    if mask is not None:
        missing = b.add(node, "Sub", [b.number(node, 1.0), b.add(node, "Cast", [mask], to=int(ir.DataType.FLOAT))])
        factor = b.number(node, attribute(node, "mask_filter_value", MASKED))
        extra.append(b.add(node, "Unsqueeze", [b.add(node, "Mul", [missing, factor]), b.integers(node, 1, 2)]))
    return _attention(b, node, q, k, v, extra)


@fused("MultiHeadAttention")
def _heads(b: Builder, node: ir.Node) -> ir.Value | None:
    """Attention of queries, keys and values that have been projected; a bias is for the three of them."""
    q, k, v, bias, mask, added = (_input(node, index) for index in range(6))
    others = [_input(node, index) for index in range(6, len(node.inputs))]
    if q is None or k is None or v is None or mask is not None or any(value is not None for value in others):
        return None
    if (
        integer(node, "unidirectional", 0)
        or _used(node, 1)
        or any(x.shape is not None and len(x.shape) != 3 for x in (k, v))
    ):
        return None
    if bias is not None:
        if bias.shape is None or not isinstance(bias.shape[0], int):
            return None
        sizes = [bias.shape[0] // 3] * 3
        parts = b.add_all(node, "Split", [bias, b.integers(node, *sizes)], 3, axis=0)
        q, k, v = (b.add(node, "Add", pair) for pair in zip((q, k, v), parts, strict=True))  # type: ignore[arg-type]
    return _attention(b, node, q, k, v, [added] if added is not None else [])


def _attention(b: Builder, node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value, added: list[ir.Value]) -> ir.Value:
    """softmax(q k / sqrt(size of a head) + what is added) v, head by head (Vaswani et al. 2017, section 3.2)."""
    heads = integer(node, "num_heads", 1)

    def apart(x: ir.Value, *order: int) -> ir.Value:
        return b.add(node, "Transpose", [b.reshape(node, x, 0, 0, heads, -1)], perm=list(order))

    queries = apart(q, 0, 2, 1, 3)
    if scale := attribute(node, "scale", 0.0):
        factor = b.number(node, scale)
    else:
        size = b.add(node, "Slice", [b.add(node, "Shape", [queries]), b.integers(node, 3), b.integers(node, 4)])
        root = b.add(node, "Sqrt", [b.add(node, "Cast", [size], to=int(ir.DataType.FLOAT))])
        factor = b.add(node, "Reciprocal", [root])
    scores = b.add(node, "MatMul", [b.add(node, "Mul", [queries, factor]), apart(k, 0, 2, 3, 1)])
    for value in added:
        scores = b.add(node, "Add", [scores, value])
    product = b.add(node, "MatMul", [b.add(node, "Softmax", [scores], axis=-1), apart(v, 0, 2, 1, 3)])
    return b.reshape(node, b.add(node, "Transpose", [product], perm=[0, 2, 1, 3]), 0, 0, -1)


def _some(node: ir.Node, index: int) -> ir.Value:
    value = _input(node, index)
    assert value is not None
    return value
