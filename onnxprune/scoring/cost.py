"""What a model costs: multiply-accumulates (MACs), parameters and bytes.

Convention for MACs: products of convolutions, matrix products, attention and recurrent layers, nothing else.

Adds, normalisations and activations don't count; two walks over the same shapes give the same number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.benchmarking.probe import REFERENCE, Probe
from onnxprune.graph.shapes import dynamic_sizes
from onnxprune.labels.flow import integer, text
from onnxprune.labels.linear import einsum_axes
from onnxprune.labels.recurrent import GATES
from onnxprune.labels.units import Units, is_parameter

Alive = NDArray[np.bool_]
Nodes = AbstractSet[ir.Node]
Measure = Callable[..., int]  # of what survives, and of nodes that are left out
NO_NODES: Nodes = frozenset()
Size = Callable[[ir.Value], tuple[int, ...] | None]


def node_macs(node: ir.Node, size: Size) -> int:
    """The MACs of one node, given the concrete shape of each value; 0 where a shape is unknown."""
    shapes = [size(value) if value is not None else None for value in node.inputs]
    out = size(node.outputs[0])
    if node.op_type in GATES or node.op_type == "DynamicQuantizeLSTM":
        x, w, r = shapes[:3]
        return 0 if not (x and w and r) else x[0] * x[1] * (math.prod(w) + math.prod(r))
    if out is None or len(shapes) < 2 or shapes[0] is None or shapes[1] is None:
        return 0
    if node.op_type in ("Conv", "FusedConv", "ConvInteger", "DeformConv"):
        return math.prod(out) * math.prod(shapes[1][1:])
    if node.op_type == "ConvTranspose":
        return math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if node.op_type in ("MatMul", "FusedMatMul", "MatMulInteger", "MatMulNBits"):
        return math.prod(out) * shapes[0][-2 if integer(node, "transA", 0) else -1]
    if node.op_type == "Einsum":
        return _einsum_macs(node, [shape for shape in shapes if shape is not None])
    if node.op_type in ("Attention", "MultiHeadAttention", "GroupQueryAttention"):
        return _attention_macs(node, shapes, out)
    if node.op_type in ("Gemm", "FusedGemm"):
        transposed = "transA" in node.attributes and node.attributes["transA"].as_int()
        return math.prod(out) * shapes[0][0 if transposed else 1]
    return 0


def _einsum_macs(node: ir.Node, shapes: list[tuple[int, ...]]) -> int:
    """One product for every index that any letter of the equation runs over."""
    named = einsum_axes(text(node, "equation", ""), [len(shape) for shape in shapes])
    if named is None:
        return 0
    sizes: dict[str, int] = {}
    for letters, shape in zip(named[0], shapes, strict=True):
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values())


def _attention_macs(node: ir.Node, shapes: list[tuple[int, ...] | None], out: tuple[int, ...]) -> int:
    """Queries times keys and weights times values, without a cache; the packed form projects its input first."""
    q, k = shapes[:2]
    if q is None or k is None:
        return 0
    if node.op_type == "Attention" and node.domain:
        return math.prod(q) * k[1] + q[0] * q[1] ** 2 * (k[1] - out[2])
    if len(q) == 4:
        return math.prod(q[:3]) * k[2] * (q[3] + out[3])
    return q[0] * q[1] * k[1] * (q[2] + out[2])


FREE_OPS = {  # that runtimes fuse with what makes their input, or that move no numbers
    *("BatchNormalization", "Clip", "Dropout", "Flatten", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Relu"),
    *("Reshape", "Shape", "Squeeze", "Unsqueeze"),
}


def product_kind(node: ir.Node, size: Size) -> str | None:
    """The kind of a product, as `Probe` tells them apart; None for what isn't one."""
    if node.op_type in ("Conv", "FusedConv", "ConvTranspose", "DeformConv", "ConvInteger"):
        weight = size(node.inputs[1]) if node.inputs[1] is not None else None
        if weight is None:
            return "conv"
        if weight[1] == 1 and integer(node, "group", 1) > 1:
            return "depthwise"
        return "pointwise" if math.prod(weight[2:]) == 1 else "conv"
    return "matmul" if node_macs(node, size) else None


def product_width(node: ir.Node, kind: str, size: Size) -> float:
    """How wide a product is: the root of what it reads times what it makes, or the channels of a depthwise one."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    weight = (size(value) if value is not None else None) or (1, 1)
    if kind == "depthwise":
        return weight[0]
    return math.sqrt(math.prod(weight[-2:] if kind == "matmul" else weight[:2]))


def _stepped(width: int, step: int) -> int:
    """A width rounded up to a multiple of `step`; kernels that work in steps aren't used below one."""
    return -(-width // step) * step if width > step else width


class Cost:
    """What a model costs when only some components survive, without cutting it.

    With a `target` its time there is a cost too. Nodes that are left out, `without`, cost nothing, nor do initializers
    that only they read.
    """

    def __init__(self, units: Units, target: Probe | None = None) -> None:
        self._target = target
        solution = units.solution
        self._axes = {value: solution.axes(value) for value in solution.flow.axes}
        self._concrete = solution.shapes.concrete
        self._nodes = list(units.model.graph)
        self._parameters = [
            (value, value.dtype.bitwidth / 8, is_parameter(value))
            for value in units.model.graph.initializers.values()
            if value.dtype is not None
        ]
        self._prunable = np.zeros(units.count, bool)
        for group in units.groups:
            self._prunable[group.units] = True
        self._located = units.parameters
        self._batch = 1
        first = next((v for v in units.model.graph.inputs if not v.is_initializer() and v.shape), None)
        if first is not None and first.shape is not None and not isinstance(first.shape[0], int):
            self._batch = next(iter(dynamic_sizes(units.model, 0).values()))

    @property
    def measures(self) -> dict[str, Measure]:
        """The costs that a target can name."""
        return {
            "macs": self.macs, "params": self.params, "size": self.bytes, "units": self.units,
            "latency": self.nanoseconds,
        }  # fmt: skip

    def nanoseconds(self, alive: Alive, without: Nodes = NO_NODES) -> int:
        """What a run should take on the target, by its probe: products of widths rounded up to its steps, and the rest.

        Reading weights takes time too, most of it where they are used at few positions. An estimate whose ratios are
        better than itself; 0 without a target.
        """
        return 0 if self._target is None else self._time(alive, self._target, without)

    def _time(self, alive: Alive, target: Probe, without: Nodes = NO_NODES) -> int:
        size, total = self._sizes(alive), 0.0
        rounded = {step: self._sizes(alive, step) for step in set(target.steps.values())}
        for node in self._left(without):
            if (kind := product_kind(node, size)) is not None:
                wide = rounded[target.steps[kind]]
                read = sum(math.prod(wide(v) or ()) for v in node.inputs if v is not None and v.is_initializer())
                total += target.overhead + read / target.weights
                speed = target.speed_at(kind, product_width(node, kind, wide))
                total += node_macs(node, wide) / speed / self._batch
            elif node.op_type not in FREE_OPS and (out := size(node.outputs[0])) is not None:
                total += target.overhead + math.prod(out) / target.elements / self._batch
        return round(total)

    def _left(self, without: Nodes) -> list[ir.Node]:
        return [node for node in self._nodes if node not in without] if without else self._nodes

    def _held(self, without: Nodes) -> list[tuple[ir.Value, float, bool]]:
        if not without:
            return self._parameters
        return [each for each in self._parameters if not (users := set(each[0].consumers())) or not users <= without]

    def macs(self, alive: Alive, without: Nodes = NO_NODES) -> int:
        """Multiply-accumulates of one run at batch size 1 (or the model's own fixed batch)."""
        size = self._sizes(alive)
        return sum(node_macs(node, size) for node in self._left(without)) // self._batch

    def params(self, alive: Alive, without: Nodes = NO_NODES) -> int:
        """Floating-point numbers and quantised weights in the initializers."""
        size = self._sizes(alive)
        return sum(math.prod(size(value) or (0,)) for value, _, counted in self._held(without) if counted)

    def units(self, alive: Alive, without: Nodes = NO_NODES) -> int:
        """The units that may go and are still there, but for those that nodes which are left out hold all of."""
        left = self._prunable & alive
        if without:
            held = {value for value, _, _ in self._held(without)}
            kept = [vector for value, _, vector in self._located if value in held]
            left &= np.isin(np.arange(len(left)), np.concatenate(kept)) if kept else False
        return int(left.sum())

    def bytes(self, alive: Alive, without: Nodes = NO_NODES) -> int:
        """Bytes of the initializers."""
        size = self._sizes(alive)
        return round(sum(math.prod(size(value) or ()) * width for value, width, _ in self._held(without)))

    def of_groups(self, units: Units) -> list[float]:
        """The share of the time that goes with all but one unit of each group; of the parameters, where none goes.

        The time is an estimate for the target, or for `REFERENCE`, which is the same on all machines.
        """
        everything, cost = np.ones(units.count, bool), partial(self._time, target=self._target or REFERENCE)
        total, params = cost(everything), self.params(everything)
        shares = []
        for group in units.groups:
            rest = everything.copy()
            rest[group.units[1:]] = False
            saved = (total - cost(rest)) / max(total, 1) or (params - self.params(rest)) / max(params, 1)
            shares.append(max(saved, 1e-12))
        return shares

    def _sizes(self, alive: Alive, step: int = 1) -> Callable[[ir.Value], tuple[int, ...] | None]:
        """The shape of each value, with axes that lost units rounded up to a multiple of `step` from there on."""
        known: dict[ir.Value, tuple[int, ...] | None] = {}

        def size(value: ir.Value) -> tuple[int, ...] | None:
            if value not in known:
                shape = self._concrete(value)
                axes = self._axes.get(value, ())
                if shape is not None and len(axes) == len(shape):
                    shape = tuple(
                        dim if vector is None else min(_stepped(int(alive[vector].sum()), step), dim)
                        for dim, vector in zip(shape, axes, strict=True)
                    )
                known[value] = shape
            return known[value]

        return size


class Spending:
    """What is spent of the resources that count, as a share of what the `whole` model spends (this or the uncut)."""

    def __init__(
        self, units: Units, resources: Sequence[str], target: Probe | None, whole: Mapping[str, int] | None = None
    ) -> None:
        cost, everything = Cost(units, target), np.ones(units.count, bool)
        self._measures = {name: cost.measures[name] for name in resources}
        self.whole = whole or {name: max(measure(everything), 1) for name, measure in self._measures.items()}

    def shares(self, alive: Alive, without: Nodes = NO_NODES) -> dict[str, float]:
        """The share of each resource."""
        return {name: measure(alive, without) / self.whole[name] for name, measure in self._measures.items()}

    def __call__(self, alive: Alive, without: Nodes = NO_NODES) -> float:
        """The mean share."""
        found = self.shares(alive, without)
        return sum(found.values()) / len(found)
