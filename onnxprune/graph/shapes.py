"""Shapes of every value, found by walking the graph twice with two concrete sizes for each dynamic dimension.

Symbolic shape inference gives up on most transformers with a dynamic batch. Concrete inference doesn't: with the sizes
of the inputs given, every Shape, Gather and Concat that computes a Reshape target is a constant. What agrees between
the two walks is fixed; what differs follows a dynamic dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_node_outputs

Shape = tuple[int | None, ...]
SMALL = 4096  # elements; shape vectors and index tables are smaller, weights are not followed
BATCH_SIZES = (2, 3)
OTHER_SIZES = ((96, 128), (128, 160), (64, 160), (96, 160), (64, 224), (160, 192))  # no two in the same ratio
SCHEMES = (  # (do dynamic dimensions differ, times OTHER_SIZES, is every first one the batch): not all run at any size
    *((True, 1.0, True), (True, 1 / 8, True), (True, 1.0, False), (True, 1 / 8, False)),
    *((False, 1.0, True), (False, 1 / 8, True), (True, 1 / 16, True), (False, 1 / 16, True), (True, 2.0, True)),
    (True, 64.0, True),
)
IMAGES_FIRST, SEQUENCES_FIRST = (0, 2, 1, 3, 4, 5, 6, 7, 8), (1, 3, 6, 5, 7, 0, 2, 4, 8)
SIGNALS_FIRST = (9, *SEQUENCES_FIRST)
CONTRIB = "com.microsoft"
SAME = {  # operators of one input that decides the type and shape of their output
    *("BatchNormalization", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LayerNormalization"),
    *("LeakyRelu", "Neg", "Relu", "Selu", "Sigmoid", "Softmax", "Softplus", "Sqrt", "Tanh"),
}
LIKE_FIRST = {  # operators of onnxruntime, and which of their outputs have the shape of the first input
    **dict.fromkeys(("BiasGelu", "FastGelu", "QuickGelu", "Gelu", "RotaryEmbedding", "GroupQueryAttention"), (0,)),
    "SimplifiedLayerNormalization": (0,),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), (0, 3)),
}
TWINS = {  # operators of onnxruntime that are, for their first inputs, operators of ONNX
    "FusedConv": ("Conv", 3), "FusedGemm": ("Gemm", 3),
    "QuantizeLinear": ("QuantizeLinear", 3), "DequantizeLinear": ("DequantizeLinear", 3),
}  # fmt: skip
SCHEME_KEY = "onnxprune.sizes"  # in the metadata of a normalised model: the index of the scheme that it runs with


@dataclass(frozen=True)
class Trace:
    """One walk: the concrete type of every value, and the contents of small constants."""

    types: dict[str, TypeProto]
    contents: dict[str, NDArray[Any]]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The concrete shape of a value, or None when inference can't tell."""
        tensor = self.types[name].tensor_type if name in self.types else None
        if tensor is None or not tensor.HasField("shape"):
            return None
        if not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            return None
        return tuple(dim.dim_value for dim in tensor.shape.dim)


def dynamic_sizes(model: ir.Model, which: int) -> dict[str, int]:
    """The concrete size given to each dynamic dimension of the inputs in walk `which` (0 or 1).

    Dimensions get sizes in different ratios, so that what is computed from one isn't taken for another. A dimension
    whose name is a sum of others ("past + seq"), or that is called a total or is a mask's alone, is the sum of theirs.
    """
    differ, times, common = SCHEMES[int(model.metadata_props.get(SCHEME_KEY, 0))]
    sizes: dict[str, int] = {}
    later: list[str] = []
    others = 0
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, int) or (name := dim_name(value, axis)) in sizes or name in later:
                continue
            if axis == 0 and (common or BATCH_SIZES[which] not in sizes.values()):
                sizes[name] = BATCH_SIZES[which]
            elif "+" in name or "total" in name.lower() or "mask" in (value.name or ""):
                later.append(name)
            else:
                sizes[name] = round(OTHER_SIZES[others % len(OTHER_SIZES)][which] * times)
                others += differ
    lengths = [size for size in sizes.values() if size != BATCH_SIZES[which]]
    for name in later:
        terms = [term.strip() for term in name.split("+")]
        known = [sizes.get(term, int(term) if term.isdigit() else 0) for term in terms]
        fallback = sum(lengths) or round(OTHER_SIZES[others % len(OTHER_SIZES)][which] * times)
        sizes[name] = sum(known) if "+" in name and all(known) else fallback
    return sizes


def schemes_to_try(model: ir.Model) -> Sequence[int]:
    """The sizes to try, as indices of SCHEMES: first those of images or of sound where an input may be that."""
    dynamic = [value for value in model.graph.inputs if any(not isinstance(dim, int) for dim in value.shape or ())]
    if not dynamic:
        return ()
    first, shape = dynamic[0], list(dynamic[0].shape or ())
    if len(shape) >= 4:
        return IMAGES_FIRST
    samples = len(shape) >= 2 and not isinstance(shape[-1], int) and all(dim == 1 for dim in shape[1:-1])
    return SIGNALS_FIRST if samples and first.dtype is not None and first.dtype.is_floating_point() else SEQUENCES_FIRST


def dim_name(value: ir.Value, axis: int) -> str:
    """A name for a dynamic dimension of an input: its own, or one made of the input's name."""
    assert value.shape is not None
    dim = value.shape[axis]
    return str(getattr(dim, "value", None) or f"{value.name}.{axis}")


def input_shape(value: ir.Value, sizes: dict[str, int]) -> tuple[int, ...]:
    """The concrete shape of a graph input under `sizes`."""
    shape = value.shape or ()
    return tuple(dim if isinstance(dim, int) else sizes[dim_name(value, axis)] for axis, dim in enumerate(shape))


def trace(model: ir.Model, which: int, known: Mapping[str, TypeProto] | None = None) -> Trace:
    """Walks the graph with the sizes of walk `which` and infers every value's concrete shape and small contents.

    Types that are `known` already aren't inferred.
    """
    sizes = dynamic_sizes(model, which)
    walk = Trace(dict(known or {}), {})
    for value in model.graph.inputs:
        if value.dtype is not None and value.shape is not None:
            walk.types[value.name or ""] = helper.make_tensor_type_proto(int(value.dtype), input_shape(value, sizes))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        walk.types[value.name or ""] = helper.make_tensor_type_proto(int(tensor.dtype), tuple(tensor.shape.numpy()))
        if tensor.size <= SMALL:
            walk.contents[value.name or ""] = tensor.numpy()
    opsets = [helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    for node in model.graph:
        _infer(ir.serde.serialize_node(node), walk, opsets)
    return walk


def _infer(node: onnx.NodeProto, walk: Trace, opsets: list[onnx.OperatorSetIdProto]) -> None:
    inputs = [name for name in node.input if name]
    if node.op_type == "Shape" and (shape := walk.shape(inputs[0])) is not None:
        start = next((a.i for a in node.attribute if a.name == "start"), 0)
        end = next((a.i for a in node.attribute if a.name == "end"), len(shape))
        outputs = [np.array(shape[start:end], np.int64)]
    elif inputs and all(name in walk.contents for name in inputs):
        outputs = _evaluate(node, walk, opsets)
    else:
        outputs = []
    for name, array in zip(node.output, outputs, strict=False):
        walk.types[name] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        if array.size <= SMALL:
            walk.contents[name] = array
    if outputs or not all(name in walk.types for name in inputs) or all(name in walk.types for name in node.output):
        return
    _infer_types(node, walk, opsets)


def _evaluate(node: onnx.NodeProto, walk: Trace, opsets: list[onnx.OperatorSetIdProto]) -> list[NDArray[Any]]:
    try:
        return evaluate_node(node, [walk.contents[name] if name else None for name in node.input], opsets)
    except Exception:  # an operator the reference lacks: its shape may still be inferred
        return []


def evaluate_node(
    node: onnx.NodeProto, arrays: Sequence[NDArray[Any] | None], opsets: list[onnx.OperatorSetIdProto]
) -> list[NDArray[Any]]:
    """The outputs of one node on constant inputs, by the ONNX reference implementation."""
    inputs = {name: array for name, array in zip(node.input, arrays, strict=True) if array is not None}
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    outputs = [helper.make_value_info(name, TypeProto()) for name in node.output]
    model = helper.make_model(helper.make_graph([node], "constant", infos, outputs), opset_imports=opsets)
    evaluator: Any = ReferenceEvaluator(model)
    return [np.asarray(array) for array in evaluator.run(None, inputs)]


def _infer_types(node: onnx.NodeProto, walk: Trace, opsets: list[onnx.OperatorSetIdProto]) -> None:
    if node.domain == "" and node.op_type in SAME and len(node.output) == 1:
        walk.types[node.output[0]] = walk.types[node.input[0]]
        return
    if node.domain == CONTRIB or node.op_type == "SimplifiedLayerNormalization":
        return _infer_contrib(node, walk, opsets)
    _infer_by_schema(node, walk, opsets)


def _infer_contrib(node: onnx.NodeProto, walk: Trace, opsets: list[onnx.OperatorSetIdProto]) -> None:
    """The shapes of onnxruntime's own operators, which onnx has no schema of."""
    first = walk.types[node.input[0]]
    ints = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type in LIKE_FIRST and (node.op_type != "GroupQueryAttention" or node.input[1]):
        for index in LIKE_FIRST[node.op_type]:
            if index < len(node.output) and node.output[index]:
                walk.types[node.output[index]] = first
    elif node.op_type == "MatMulNBits" and (shape := walk.shape(node.input[0])) is not None:
        walk.types[node.output[0]] = helper.make_tensor_type_proto(
            first.tensor_type.elem_type, (*shape[:-1], ints["N"])
        )
    elif node.op_type == "FusedMatMul" and not (ints.get("transBatchA") or ints.get("transBatchB")):
        _infer_matmul(node, walk, ints)
    elif node.op_type in TWINS:
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.domain, twin.op_type = "", TWINS[node.op_type][0]
        del twin.input[TWINS[node.op_type][1] :]
        known = {attribute.name for attribute in node.attribute} & set(onnx.defs.get_schema(twin.op_type).attributes)
        kept = [attribute for attribute in twin.attribute if attribute.name in known]
        del twin.attribute[:]
        twin.attribute.extend(kept)
        _infer_by_schema(twin, walk, opsets)


def _infer_matmul(node: onnx.NodeProto, walk: Trace, ints: dict[str, int]) -> None:
    a, b = (walk.shape(name) for name in node.input[:2])
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return
    rows, columns = a[-1 if ints.get("transA") else -2], b[-2 if ints.get("transB") else -1]
    shape = (*np.broadcast_shapes(a[:-2], b[:-2]), rows, columns)
    walk.types[node.output[0]] = helper.make_tensor_type_proto(walk.types[node.input[0]].tensor_type.elem_type, shape)


def _infer_by_schema(node: onnx.NodeProto, walk: Trace, opsets: list[onnx.OperatorSetIdProto]) -> None:
    version = next((entry.version for entry in opsets if entry.domain == node.domain), 0)
    inputs = [name for name in node.input if name]
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        types = infer_node_outputs(
            schema,
            node,
            {name: walk.types[name] for name in inputs},
            {name: numpy_helper.from_array(walk.contents[name]) for name in inputs if name in walk.contents},
            opset_imports=opsets,
        )
    except Exception:  # no schema or no inference: the shape stays unknown, and rules lock what they can't see
        return
    walk.types.update(types)


@dataclass(frozen=True)
class Shapes:
    """What both walks agree on: for every value its shape, None where a dimension is dynamic."""

    first: Trace
    second: Trace

    def __call__(self, value: ir.Value) -> Shape | None:
        """The shape of a value, with None for dynamic dimensions; None when even the rank is unknown."""
        tensor = value.const_value if value.is_initializer() else None
        if tensor is not None:
            return tuple(tensor.shape.numpy())
        a, b = self.first.shape(value.name or ""), self.second.shape(value.name or "")
        if a is None or b is None or len(a) != len(b):
            return None
        return tuple(x if x == y else None for x, y in zip(a, b, strict=True))

    def pairs(self, value: ir.Value) -> list[tuple[int, int]]:
        """The sizes of a value's axes in either walk; of a value whose shape is known."""
        known = self(value) or ()
        if value.is_initializer():
            return [(size or 0, size or 0) for size in known]
        a, b = self.first.shape(value.name or ""), self.second.shape(value.name or "")
        return list(zip(a or (), b or (), strict=True))

    def concrete(self, value: ir.Value) -> tuple[int, ...] | None:
        """The shape of a value with every dynamic dimension at its first concrete size."""
        tensor = value.const_value if value.is_initializer() else None
        return tuple(tensor.shape.numpy()) if tensor is not None else self.first.shape(value.name or "")

    def element_type(self, value: ir.Value) -> ir.DataType | None:
        """The element type of a computed value, or None when it isn't known."""
        found = self.first.types.get(value.name or "")
        return ir.DataType(found.tensor_type.elem_type) if found is not None else None

    def contents(self, value: ir.Value) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """What a small computed value holds in either walk, or None when it isn't a constant there."""
        a, b = (walk.contents.get(value.name or "") for walk in (self.first, self.second))
        return None if a is None or b is None or a.shape != b.shape else (a, b)


Runner = Callable[[int, list[ir.Value]], dict[str, TypeProto]]  # the types of values in a walk, by running the model


def infer_shapes(model: ir.Model, run: Runner | None = None) -> Shapes:
    """The shapes of every value of a model: inferred, and where inference can't tell, seen in a `run`."""
    walks = [trace(model, which) for which in ((0, 1) if dynamic_sizes(model, 0) else (0,))]
    if run is not None:
        made = [value for node in model.graph for value in node.outputs if value.uses()]
        for which, walk in enumerate(walks):
            if unknown := [value for value in made if walk.shape(value.name or "") is None]:
                walks[which] = trace(model, which, run(which, unknown))
    return Shapes(walks[0], walks[-1])


def add_initializer(model: ir.Model, name: str, array: NDArray[Any]) -> ir.Value:
    """Adds an initializer under a name not yet taken and returns its value."""
    graph, unique, count = model.graph, name, 0
    while unique in graph.initializers:
        count += 1
        unique = f"{name}.{count}"
    tensor = ir.tensor(np.asarray(array, order="C"), name=unique)
    value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def replace_node(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    """Puts `new` where `old` is; the output keeps its name, uses and place among the graph outputs."""
    model.graph.insert_before(old, new)
    name, kind, shape = old.outputs[0].name, old.outputs[0].type, old.outputs[0].shape
    old.outputs[0].replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    model.graph.remove(old, safe=True)
    new.outputs[0].name, new.outputs[0].type, new.outputs[0].shape = name, kind, shape
