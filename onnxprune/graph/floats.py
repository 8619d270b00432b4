"""A model in floats: the same function, with every weight as the numbers that it stands for, and fused nodes apart.

Layers are fitted in this twin. What is fitted is put back into the form that the weight has in the model itself
(float16, integers with scales, four bits in blocks), and the twin goes on with what it stands for after rounding, so
that later layers make up for that as well. Where weights are integers, their scales are chosen anew, by what the layer
lacks then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from onnxprune.graph.attributes import integer, integers, operator_name
from onnxprune.graph.model import constant
from onnxprune.graph.shapes import add_initializer

Array = NDArray[np.float64]
Lack = Callable[[Array], float]  # what a layer lacks with these weights, less what it lacks as it is
SCALES = (None, 1.0, 0.9, 0.8, 0.7)  # of the largest weight that isn't clipped; None: the scale that is there


class Form(Protocol):
    """How a weight is stored."""

    def read(self) -> Array:
        """The numbers that it stands for."""

    def write(self, array: Array, lack: Lack) -> Array | None:
        """Stores these numbers as nearly as can be; what is stored then, or None where that would be no gain."""

    @property
    def parts(self) -> list[ir.Value]:
        """The initializers that it is stored in."""


@dataclass(frozen=True)
class Plain:
    """An initializer of floats."""

    value: ir.Value

    def read(self) -> Array:
        return np.asarray(constant(self.value), np.float64)

    def write(self, array: Array, lack: Lack) -> Array | None:
        assert self.value.const_value is not None
        stored = array.astype(self.value.const_value.dtype.numpy())
        self.value.const_value = ir.tensor(stored, name=self.value.name)
        return stored.astype(np.float64)

    @property
    def parts(self) -> list[ir.Value]:
        return [self.value]


@dataclass(frozen=True)
class Integers:
    """`(q - zero) * scale`. `spread` brings scales and zero points to the shape of q."""

    value: ir.Value
    scale: ir.Value
    zero: NDArray[Any] | None  # the zero points, which stay
    spread: Callable[[NDArray[Any]], NDArray[Any]]
    gather: Callable[[NDArray[Any]], NDArray[Any]]  # the largest of what shares a scale, in the shape of the scales
    limits: tuple[int, int]
    unpack: Callable[[NDArray[Any]], NDArray[Any]] = lambda array: array
    pack: Callable[[NDArray[Any]], NDArray[Any]] = lambda array: array

    def read(self) -> Array:
        q = self.unpack(constant(self.value)).astype(np.float64)
        return np.asarray((q - self._zeros()) * self.spread(self._scales()), np.float64)

    def write(self, array: Array, lack: Lack) -> Array | None:
        zeros, best, found = self._zeros(), 0.0, None
        room = np.minimum(self.limits[1] - zeros, zeros - self.limits[0])
        widest = self.gather(np.abs(array) / np.maximum(room, 1))
        for share in SCALES:
            scales = self._scales() if share is None else np.where(widest > 0, share * widest, self._scales())
            kept = np.asarray(scales, constant(self.scale).dtype).astype(np.float64)
            wide = self.spread(kept)
            q = np.clip(np.rint(array / np.where(wide == 0, 1, wide)) + zeros, *self.limits)
            stands = (q - zeros) * wide
            if (missing := lack(stands)) < best:
                best, found = missing, (q, kept, stands)
        if found is None:
            return None
        q, kept, stands = found
        stands = np.asarray(stands, np.float64)
        _set(self.value, self.pack(q.astype(self.unpack(constant(self.value)).dtype)))
        _set(self.scale, kept)
        return stands

    @property
    def parts(self) -> list[ir.Value]:
        return [self.value, self.scale]

    def _scales(self) -> Array:
        return np.asarray(constant(self.scale), np.float64)

    def _zeros(self) -> Array:
        return np.zeros(()) if self.zero is None else self.spread(np.asarray(self.zero, np.float64))


@dataclass(frozen=True)
class Moved:
    """A weight whose axes are moved, split or joined before it is used."""

    inner: Form
    forward: Callable[[NDArray[Any]], NDArray[Any]]
    backward: Callable[[NDArray[Any]], NDArray[Any]]

    def read(self) -> Array:
        return np.asarray(self.forward(self.inner.read()), np.float64)

    def write(self, array: Array, lack: Lack) -> Array | None:
        stored = self.inner.write(self.backward(array), lambda other: lack(self.forward(other)))
        return None if stored is None else np.asarray(self.forward(stored), np.float64)

    @property
    def parts(self) -> list[ir.Value]:
        return self.inner.parts


@dataclass
class Twin:
    """A model in floats, and how each of its weights is stored in the model itself."""

    model: ir.Model
    forms: dict[ir.Value, Form] = field(default_factory=dict)

    def hold(self, values: Sequence[ir.Value]) -> Callable[[], None]:
        """Remembers weights as they are, in both models; what is returned puts them back, to the bit."""
        parts = [part for value in values for part in (value, *self.forms[value].parts)]
        held = [(part, part.const_value) for part in parts]

        def restore() -> None:
            for part, tensor in held:
                part.const_value = tensor

        return restore

    def write(self, value: ir.Value, array: Array, lack: Lack) -> bool:
        """Puts fitted weights into both; whether that was a gain."""
        stored = self.forms[value].write(array, lack)
        if stored is None:
            return False
        assert value.const_value is not None
        value.const_value = ir.tensor(stored.astype(value.const_value.dtype.numpy()), name=value.name)
        return True


def in_floats(model: ir.Model) -> Twin:
    """The twin of a normalised model; values that both have keep their names."""
    twin = Twin(model.clone())
    initializers = model.graph.initializers
    for value in twin.model.graph.initializers.values():
        if value.dtype is not None and value.dtype.is_floating_point():
            twin.forms[value] = Plain(initializers[value.name or ""])
    for node in list(twin.model.graph):
        if (spelling := SPELLINGS.get(operator_name(node))) is not None:
            spelling(twin, node, initializers)
    common.RemoveUnusedNodesPass()(twin.model)
    return twin


def spell_recurrent(model: ir.Model) -> ir.Model:
    """The model with recurrent layers that quantise as they go in floats: rounding makes steps of tiny differences."""
    name = "com.microsoft::DynamicQuantizeLSTM"
    if not any(operator_name(node) == name for node in model.graph):
        return model
    twin = Twin(model.clone())
    for node in list(twin.model.graph):
        if operator_name(node) == name:
            SPELLINGS[name](twin, node, model.graph.initializers)
    common.RemoveUnusedNodesPass()(twin.model)
    return twin.model


Stored = Any  # the initializers of the model itself, by name
SPELLINGS: dict[str, Callable[[Twin, ir.Node, Stored], None]] = {}


def spelling(*operators: str) -> Callable[[Callable[[Twin, ir.Node, Stored], None]], Any]:
    """Registers how an operator with weights in another form is spelt in floats."""

    def register(function: Callable[[Twin, ir.Node, Stored], None]) -> Any:
        SPELLINGS.update(dict.fromkeys(operators, function))
        return function

    return register


def _own(value: ir.Value | None, stored: Stored) -> ir.Value | None:
    """The initializer of the model itself behind one of the twin's."""
    return stored.get(value.name or "") if value is not None and value.is_initializer() else None


def _integers(
    stored: Stored, weight: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None, axis: int | None
) -> Integers | None:
    """The form of integers with one scale, or one for each position of an axis; None where that isn't all constant."""
    q, s, z = (_own(value, stored) for value in (weight, scale, zero))
    if q is None or s is None or q.const_value is None or s.const_value is None or (zero is not None and z is None):
        return None
    if len(s.uses()) != 1 or len(q.uses()) != 1 or q.const_value.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return None
    rank, count = len(q.const_value.shape.numpy()), s.const_value.size
    if count != 1 and (axis is None or q.const_value.shape.numpy()[axis] != count):
        return None
    along = [-1 if count > 1 and index == (axis or 0) % rank else 1 for index in range(rank)]
    other = tuple(index for index in range(rank) if count == 1 or index != (axis or 0) % rank)
    shape = tuple(s.const_value.shape.numpy())
    whole, limits = tuple(q.const_value.shape.numpy()), np.iinfo(q.const_value.dtype.numpy())
    return Integers(
        q, s, constant(z), lambda array: array.reshape(along if count > 1 else [1] * rank),
        lambda array: np.broadcast_to(array, whole).max(other).reshape(shape),
        (int(limits.min), int(limits.max)),
    )  # fmt: skip


def _put(twin: Twin, name: str, form: Form) -> ir.Value:
    """A new initializer of the twin for what a form stands for."""
    value = add_initializer(twin.model, f"{name}.floats", form.read().astype(np.float32))
    twin.forms[value] = form
    return value


def _replace(twin: Twin, old: ir.Value, node: ir.Node, after: ir.Node) -> None:
    """Lets a new node make a value, under its name, behind another node."""
    name, kind, shape = old.name, old.type, old.shape
    twin.model.graph.insert_after(after, node)
    new = node.outputs[0]
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name, new.type, new.shape = f"{name}.old", name, kind, shape


@spelling("DequantizeLinear")
def _dequantised(twin: Twin, node: ir.Node, stored: Stored) -> None:
    """A constant one is an initializer, with what only moves its axes behind it."""
    scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if integer(node, "block_size", 0):
        return
    form: Form | None = _integers(stored, node.inputs[0], scale, zero, integer(node, "axis", 1))
    value = node.outputs[0]
    while form is not None:
        users = value.consumers()
        moved = _moved(users[0], form) if len(users) == 1 and not value.is_graph_output() else None
        if moved is None:
            break
        value, form = users[0].outputs[0], moved
    if form is not None:
        floats = _put(twin, value.name or "", form)
        if value.is_graph_output():
            return
        value.replace_all_uses_with(floats)


def _moved(node: ir.Node, form: Form) -> Form | None:
    """A form behind a node that moves, splits or joins axes; None behind any other."""
    if node.op_type == "Transpose" and not node.domain:
        rank = form.read().ndim
        order = integers(node, "perm") or list(range(rank))[::-1]
        back = np.argsort(order)
        return Moved(form, lambda array: array.transpose(order), lambda array: array.transpose(back))
    target = (
        constant(node.inputs[1]) if node.op_type in ("Reshape", "Unsqueeze", "Squeeze") and node.inputs[1:] else None
    )
    if target is None or node.domain:
        return None
    before = form.read().shape
    if node.op_type == "Reshape":
        if (np.asarray(target) == 0).any():
            return None
        after = np.empty(before, bool).reshape([int(size) for size in target]).shape
    else:
        move = np.expand_dims if node.op_type == "Unsqueeze" else np.squeeze
        after = move(np.empty(before, bool), tuple(int(axis) for axis in target)).shape
    return Moved(form, lambda array: array.reshape(after), lambda array: array.reshape(before))


@spelling("MatMulInteger", "ConvInteger")
def _integer_product(twin: Twin, node: ir.Node, stored: Stored) -> None:
    """`x -> DynamicQuantizeLinear -> product -> Cast -> Mul by both scales` is the product of x."""
    quantise, cast = node.inputs[0].producer() if node.inputs[0] is not None else None, _only_user(node, "Cast")
    scaled = _only_user(cast, "Mul") if cast is not None else None
    if quantise is None or quantise.op_type != "DynamicQuantizeLinear" or cast is None or scaled is None:
        return
    other = next((value for value in scaled.inputs if value is not cast.outputs[0]), None)
    scales = other.producer() if other is not None else None
    if scales is None or scales.op_type != "Mul" or quantise.outputs[1] not in scales.inputs:
        return
    scale = next((value for value in scales.inputs if value is not quantise.outputs[1]), None)
    zero, axis = node.inputs[3] if len(node.inputs) > 3 else None, -1 if node.op_type == "MatMulInteger" else 0
    form = _integers(stored, node.inputs[1], scale, zero, axis)
    if form is None:
        return
    weight = _put(twin, node.inputs[1].name or "" if node.inputs[1] is not None else "", form)
    made = ir.Node(
        "", node.op_type.removesuffix("Integer"), [quantise.inputs[0], weight], node.attributes.values(),
        name=f"{node.name}.floats",
    )  # fmt: skip
    _replace(twin, scaled.outputs[0], made, scaled)


def _only_user(node: ir.Node, operator: str) -> ir.Node | None:
    users = node.outputs[0].consumers()
    return users[0] if len(users) == 1 and users[0].op_type == operator else None


@spelling("com.microsoft::DynamicQuantizeLSTM")
def _quantised_lstm(twin: Twin, node: ir.Node, stored: Stored) -> None:
    """`w[d,i,(g h)], r[d,h,(g h)]` with scales and zero points for each direction, or for each of its columns."""
    weights = list[ir.Value]()
    for index, at in ((1, 8), (2, 10)):
        form = _integers_by_direction(stored, *(node.inputs[i] for i in (index, at, at + 1)))
        if form is None:
            return
        turn: Callable[[NDArray[Any]], NDArray[Any]] = lambda array: array.swapaxes(1, 2)  # noqa: E731
        name = node.inputs[index].name or ""  # type: ignore[union-attr]
        weights.append(_put(twin, name, Moved(form, turn, turn)))
    inputs = [node.inputs[0], *weights, *node.inputs[3:8]]
    made = ir.Node(
        "", "LSTM", inputs, node.attributes.values(), num_outputs=len(node.outputs), name=f"{node.name}.floats"
    )
    twin.model.graph.insert_after(node, made)
    for old, new in zip(node.outputs, made.outputs, strict=True):
        name, kind, shape = old.name, old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name, new.type, new.shape = f"{name}.old" if name else name, name, kind, shape


def _integers_by_direction(
    stored: Stored, weight: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None
) -> Integers | None:
    q, s, z = (_own(value, stored) for value in (weight, scale, zero))
    if q is None or s is None or z is None or q.const_value is None or s.const_value is None:
        return None
    shape, scales = tuple(q.const_value.shape.numpy()), tuple(s.const_value.shape.numpy())
    columns = len(scales) == 2 and scales[1] > 1
    limits = np.iinfo(q.const_value.dtype.numpy())
    return Integers(
        q, s, constant(z), lambda array: array.reshape(shape[0], 1, -1),
        lambda array: np.broadcast_to(array, shape).max(1 if columns else (1, 2)).reshape(scales),
        (int(limits.min), int(limits.max)),
    )  # fmt: skip


@spelling("com.microsoft::MatMulNBits")
def _packed_product(twin: Twin, node: ir.Node, stored: Stored) -> None:
    """`w[o,n,bytes]` of 4 or 8 bits in blocks, `scales[o,n]`, zero points of the same bits or none: x W' + b."""
    bits, inner, outer = (integer(node, name, default) for name, default in (("bits", 4), ("K", 0), ("N", 0)))
    block = integer(node, "block_size", 0)
    q, s = _own(node.inputs[1], stored), _own(node.inputs[2], stored)
    given = [value for value in node.inputs[3:5] if value is not None]
    if q is None or s is None or bits not in (4, 8) or given or not block or q.const_value is None:
        return  # zero points and orders of their own
    blocks, packed = -(-inner // block), tuple(q.const_value.shape.numpy())
    scales = tuple(s.const_value.shape.numpy()) if s.const_value is not None else ()
    zero = np.full((), 2 ** (bits - 1))

    def unpack(array: NDArray[Any]) -> NDArray[Any]:
        flat = np.ascontiguousarray(array).view(np.uint8).reshape(outer, blocks, -1)
        return flat if bits == 8 else np.stack([flat & 15, flat >> 4], -1).reshape(outer, blocks, block)

    def pack(array: NDArray[Any]) -> NDArray[Any]:
        whole = array.astype(np.uint8)
        pairs = whole.reshape(outer, blocks, -1, 2)
        return (whole if bits == 8 else pairs[..., 0] | pairs[..., 1] << 4).reshape(packed)

    form = Integers(
        q, s, zero, lambda array: array.reshape(outer, blocks, 1) if array.size > 1 else array,
        lambda array: np.broadcast_to(array, (outer, blocks, block)).max(2).reshape(scales),
        (0, 2**bits - 1), unpack, pack,
    )  # fmt: skip

    def backward(array: NDArray[Any]) -> NDArray[Any]:
        return np.pad(array.T, ((0, 0), (0, blocks * block - inner))).reshape(outer, blocks, block)

    whole = Moved(form, lambda array: array.reshape(outer, -1)[:, :inner].T, backward)
    weight = _put(twin, q.name or "", whole)
    product = ir.Node("", "MatMul", [node.inputs[0], weight], name=f"{node.name}.floats")
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    if bias is None:
        return _replace(twin, node.outputs[0], product, node)
    product.outputs[0].name = f"{node.name}.product"
    twin.model.graph.insert_after(node, product)
    add = ir.Node("", "Add", [product.outputs[0], bias], name=f"{node.name}.bias")
    return _replace(twin, node.outputs[0], add, product)


@spelling("com.microsoft::FusedConv", "com.microsoft::FusedGemm")
def _fused_product(twin: Twin, node: ir.Node, stored: Stored) -> None:
    """The product, a sum that may follow, and the activation."""
    known = {name: node.attributes[name] for name in node.attributes if not name.startswith("activation")}
    activation = node.attributes["activation"].as_string() if "activation" in node.attributes else ""
    single = [f"activation_{letter}" for letter in ("alpha", "beta") if f"activation_{letter}" in node.attributes]
    parameters = [node.attributes[name].as_float() for name in single]
    if "activation_params" in node.attributes:
        parameters = list(node.attributes["activation_params"].as_floats())
    names = {"Relu": [], "Tanh": [], "Sigmoid": [], "LeakyRelu": ["alpha"], "HardSigmoid": ["alpha", "beta"]}
    if activation not in (*names, "", "Clip"):
        return
    kind, count = node.op_type.removeprefix("Fused"), 3
    steps = [ir.Node("", kind, node.inputs[:count], list(known.values()), name=f"{node.name}.product")]
    if len(node.inputs) > count and node.inputs[count] is not None:
        steps.append(ir.Node("", "Add", [steps[-1].outputs[0], node.inputs[count]], name=f"{node.name}.sum"))
    if activation == "Clip":
        bounds = [add_initializer(twin.model, f"{node.name}.bound", np.array(each, np.float32)) for each in parameters]
        steps.append(ir.Node("", "Clip", [steps[-1].outputs[0], *bounds], name=f"{node.name}.activation"))
    elif activation:
        given = [ir.AttrFloat32(name, value) for name, value in zip(names[activation], parameters, strict=False)]
        steps.append(ir.Node("", activation, [steps[-1].outputs[0]], given, name=f"{node.name}.activation"))
    _in_steps(twin, node, steps)


def _in_steps(twin: Twin, node: ir.Node, steps: list[ir.Node]) -> None:
    """Puts nodes in the place of one, whose first output the last of them makes."""
    for step in steps[:-1]:
        step.outputs[0].name = step.name
        twin.model.graph.insert_before(node, step)
    _replace(twin, node.outputs[0], steps[-1], node)


@spelling("com.microsoft::SkipLayerNormalization", "com.microsoft::SkipSimplifiedLayerNormalization")
def _skip_normalisation(twin: Twin, node: ir.Node, stored: Stored) -> None:
    """The sum, and what normalises it."""
    simple = "Simplified" in node.op_type
    inputs = [*node.inputs, None, None, None][:5]
    bias = inputs[3] if simple else inputs[4]
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:3]):
        return
    steps = [ir.Node("", "Add", inputs[:2], name=f"{node.name}.skip")]
    if bias is not None:
        steps.append(ir.Node("", "Add", [steps[-1].outputs[0], bias], name=f"{node.name}.sum"))
    total = steps[-1].outputs[0]
    operator, scales = ("SimplifiedLayerNormalization", inputs[2:3]) if simple else ("LayerNormalization", inputs[2:4])
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-12
    given = [ir.AttrFloat32("epsilon", epsilon), ir.AttrInt64("axis", -1)]
    steps.append(ir.Node("", operator, [total, *scales], given, name=f"{node.name}.normalised"))
    _in_steps(twin, node, steps)
    if len(node.outputs) > 3 and node.outputs[3].name:
        old, name = node.outputs[3], node.outputs[3].name
        old.replace_all_uses_with(total, replace_graph_outputs=True)
        old.name, total.name = f"{name}.old", name


def _set(value: ir.Value, array: NDArray[Any]) -> None:
    assert value.const_value is not None
    value.const_value = ir.tensor(array.astype(value.const_value.dtype.numpy()), name=value.name)
