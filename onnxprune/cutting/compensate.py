"""What a mask alone can't show: nodes that average over a cut axis compute, in the masked model, over what is left.

A pruned model normalises over fewer channels than a masked one does. With the means of the masked model taken over the
channels that are left, both must agree to rounding again, so that cuts of layer-normalised models can be checked too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.cutting.plan import Removal
from onnxprune.graph.model import constant
from onnxprune.graph.shapes import Shapes, add_initializer, replace_node
from onnxprune.labels.flow import integer, integers

SHUT = -1e4  # a bias of a gate that is closed then

Compensation = Callable[["Builder"], bool]
COMPENSATIONS: dict[str, Compensation] = {}


def compensate(
    model: ir.Model, names: Sequence[str], removed: Mapping[str, Sequence[Removal]], shapes: Shapes
) -> list[str]:
    """Rewrites the named nodes of a masked model; the names of those for which that can't be done.

    `removed` holds what a plan removes, and `shapes` what is known, by the value names of the unmasked model.
    """
    nodes = {node.name: node for node in model.graph}
    left = []
    for name in names:
        node = nodes[name]
        rewrite = COMPENSATIONS.get(node.op_type)
        if rewrite is None or not rewrite(Builder(model, node, removed, shapes)):
            left.append(name)
    return left


def compensation(*operators: str) -> Callable[[Compensation], Compensation]:
    """Registers how these operators are rewritten. The function returns False where it can't."""

    def register(function: Compensation) -> Compensation:
        COMPENSATIONS.update(dict.fromkeys(operators, function))
        return function

    return register


@dataclass
class Builder:
    """Builds nodes in front of the one that is rewritten."""

    model: ir.Model
    node: ir.Node
    removed: Mapping[str, Sequence[Removal]]
    shapes: Shapes

    def value(self, index: int = 0) -> ir.Value:
        """An input of the node."""
        value = self.node.inputs[index]
        assert value is not None
        return value

    @property
    def name(self) -> str:
        """The name that the first input had before masks were put on it."""
        return (self.value().name or "").split(".masked")[0]

    @property
    def rank(self) -> int | None:
        """The rank of the first input."""
        shape = self.shapes.first.shape(self.name)
        return None if shape is None else len(shape)

    def keep(self, axes: Sequence[int]) -> tuple[NDArray[np.bool_], float] | None:
        """A mask over the first input, and the share that is left along these axes; None if nothing went."""
        rank, mask, share = self.rank, np.ones((), bool), 1.0
        for removal in self.removed.get(self.name, ()):
            if rank is None:
                return None
            along = np.ones(removal.size, bool)
            along[list(removal.removed)] = False
            mask = mask & along.reshape([-1 if axis == removal.axis else 1 for axis in range(rank)])
            if removal.axis in axes:
                share *= float(along.mean())
        return (mask, share) if share < 1 else None

    def add(self, op: str, *inputs: ir.Value | NDArray[np.generic] | float, **attributes: int) -> ir.Value:
        """A new node in front of this one; numbers become constants of the model's type."""
        values = [each if isinstance(each, ir.Value) else self.constant(each) for each in inputs]
        name = f"{self.node.name}.over{len(self.model.graph)}"
        new = ir.node(op, values, attributes, name=name)
        new.outputs[0].name = name
        self.model.graph.insert_before(self.node, new)
        return new.outputs[0]

    def constant(self, array: NDArray[np.generic] | float) -> ir.Value:
        """A constant; numbers that aren't integers or truths get the type of the first input."""
        found = np.asarray(array)
        if found.dtype.kind == "f":
            kind = self.shapes.first.types.get(self.name)
            found = found.astype(ir.DataType(kind.tensor_type.elem_type).numpy() if kind else np.float32)
        return add_initializer(self.model, f"{self.node.name}.constant", found)

    def sum(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """The sum over these axes, which keep size one."""
        return self.add("ReduceSum", value, np.array(axes, np.int64), keepdims=1)

    def size(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """How many positions a value has along these axes, in its own type."""
        shape = self.add("Gather", self.add("Shape", value), np.array(axes, np.int64), axis=0)
        return self.add("CastLike", self.add("ReduceProd", shape, keepdims=0), value)

    def normalised(
        self, value: ir.Value, axes: Sequence[int], mask: NDArray[np.bool_], share: float, center: bool
    ) -> ir.Value:
        """`(x - mean) / sqrt(variance + epsilon)`, or without the mean, over the positions that are left."""
        count = self.add("Mul", self.size(value, axes), share)
        if center:
            value = self.add("Sub", value, self.add("Div", self.sum(value, axes), count))
        value = self.add("Where", mask, value, 0.0)
        variance = self.add("Div", self.sum(self.add("Mul", value, value), axes), count)
        default = 1e-12 if self.node.op_type.startswith("Skip") else 1e-5
        epsilon = self.node.attributes["epsilon"].as_float() if "epsilon" in self.node.attributes else default
        return self.add("Div", value, self.add("Sqrt", self.add("Add", variance, epsilon)))

    def affine(self, value: ir.Value, *parameters: int, lead: int = 0) -> ir.Value:
        """Multiplied with the first of the inputs that are named, plus the others; `lead` axes of size one behind."""
        for place, index in enumerate(parameters):
            if index < len(self.node.inputs) and (parameter := self.node.inputs[index]) is not None:
                if lead:
                    parameter = self.add("Reshape", parameter, np.array([-1, *[1] * lead], np.int64))
                value = self.add("Add" if place else "Mul", value, parameter)
        return value

    def replace(self, value: ir.Value) -> bool:
        """Puts a value in the place of the node's first output."""
        replace_node(self.model, self.node, ir.node("Identity", [value], name=self.node.name))
        return True


@compensation("ReduceMean")
def mean(build: Builder) -> bool:
    """Divides by what is left."""
    axes = integers(build.node, "axes")
    if axes is None and len(build.node.inputs) > 1:
        axes = [int(axis) for axis in np.ravel(constant(build.node.inputs[1]))]
    rank = build.rank
    if rank is None or (kept := build.keep([axis % rank for axis in axes or range(rank)])) is None:
        return False
    copy = ir.Node("", "ReduceMean", build.node.inputs, build.node.attributes.values(), name=f"{build.node.name}.all")
    copy.outputs[0].name = copy.name
    build.model.graph.insert_before(build.node, copy)
    return build.replace(build.add("Div", copy.outputs[0], kept[1]))


@compensation("ReduceMax", "ReduceMin", "ReduceLogSumExp")
def extreme(build: Builder) -> bool:
    """What is masked must not be the largest."""
    kept = build.keep(range(build.rank or 0))
    if kept is None:
        return False
    least = np.inf if build.node.op_type == "ReduceMin" else -np.inf
    build.node.replace_input_with(0, build.add("Where", kept[0], build.value(), np.array(least)))
    return True


@compensation("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def layer_norm(build: Builder) -> bool:
    """Normalises over what is left of the last axes."""
    if build.rank is None or any(output.uses() for output in build.node.outputs[1:]):
        return False
    axes = range(integer(build.node, "axis", -1) % build.rank, build.rank)
    if (kept := build.keep(axes)) is None:
        return False
    value = build.normalised(build.value(), axes, *kept, center=build.node.op_type == "LayerNormalization")
    return build.replace(build.affine(value, 1, 2))


@compensation("InstanceNormalization")
def instance_norm(build: Builder) -> bool:
    """Normalises over what is left of the axes behind the channels."""
    if build.rank is None or (kept := build.keep(axes := range(2, build.rank))) is None:
        return False
    value = build.normalised(build.value(), axes, *kept, center=True)
    return build.replace(build.affine(value, 1, 2, lead=build.rank - 2))


@compensation("GroupNormalization")
def group_norm(build: Builder) -> bool:
    """Normalises over what is left inside each group of channels."""
    groups = integer(build.node, "num_groups", 1)
    if build.rank is None or (kept := build.keep([1])) is None:
        return False
    mask, share = kept
    inside = mask.size // groups
    split = build.add("Reshape", build.value(), np.array([0, groups, inside, -1], np.int64))
    value = build.normalised(split, (2, 3), mask.reshape(1, groups, inside, 1), share, center=True)
    value = build.add("Reshape", value, build.add("Shape", build.value()))
    return build.replace(build.affine(value, 1, 2, lead=build.rank - 2))


@compensation("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
def skip_layer_norm(build: Builder) -> bool:
    """The sum, masked, then normalised over what is left of the last axis."""
    if build.rank is None or (kept := build.keep([build.rank - 1])) is None:
        return False
    centered = build.node.op_type == "SkipLayerNormalization"
    total, bias = build.add("Add", build.value(), build.value(1)), 4 if centered else 3
    if bias < len(build.node.inputs) and build.node.inputs[bias] is not None:
        total = build.add("Add", total, build.value(bias))
    total = build.add("Where", kept[0], total, 0.0)
    value = build.normalised(total, [build.rank - 1], *kept, center=centered)
    if len(build.node.outputs) > 3:
        build.node.outputs[3].replace_all_uses_with(total)
    return build.replace(build.affine(value, 2, 3) if centered else build.affine(value, 2))


@compensation("DynamicQuantizeLSTM")
def quantised_recurrent(build: Builder) -> bool:
    """What is masked must be zero inside as well, where states are rounded by their range: its output gate is shut."""
    outputs = [output.name.split(".masked")[0] for output in build.node.outputs if output.name]
    gone = [removal for name in outputs for removal in build.removed.get(name, ())]
    bias = constant(build.node.inputs[3]) if len(build.node.inputs) > 3 else None
    if not gone or bias is None:
        return False
    shut = np.array(bias)
    shut[:, gone[0].size + np.array(gone[0].removed)] = SHUT  # gates lie in the order input, output, forget, cell
    build.node.replace_input_with(3, build.add("Identity", shut))
    return True


@compensation("LSTM", "GRU", "RNN")
def recurrent(build: Builder) -> bool:
    """What is masked must not come back through the recurrence: its columns of R are zero."""
    outputs = [output.name.split(".masked")[0] for output in build.node.outputs if output.name]
    gone = [removal for name in outputs for removal in build.removed.get(name, ())]
    if not gone:
        return False
    keep = np.ones(gone[0].size, bool)
    keep[list(gone[0].removed)] = False
    build.node.replace_input_with(2, build.add("Where", keep, build.value(2), 0.0))
    return True
