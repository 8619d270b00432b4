"""Layers whose outputs are a product of inputs with weights: which inputs each position of an output is made from.

Every such layer is, at each position, `y = x W + b` in each of its groups. A kind of layer says how its inputs and
outputs lie in tensors as (positions, groups, channels), and how its weights lie as (groups, inputs, outputs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.errors import OnnxPruneError
from onnxprune.graph.model import constant
from onnxprune.labels.flow import integer, integers, operator_name, text
from onnxprune.repairing.moments import Array, Sample

Floats = NDArray[np.floating]
Rows = NDArray[np.int64]


class Unfit(OnnxPruneError):  # noqa: N818 - what is the case, not a fault
    """Why a layer can't be fitted; it stays as it was cut."""


class Product(Protocol):
    """How one node's tensors lie as a product. `rows` are positions of the output; their order is that of samples."""

    @property
    def node(self) -> ir.Node:
        """The node."""

    @property
    def source(self) -> ir.Value:
        """What is multiplied with the weights."""

    @property
    def weight(self) -> ir.Value:
        """The weights, an initializer."""

    @property
    def meets(self) -> int | None:
        """The axis of the weights that is summed up with that of the input, where that is one axis."""

    @property
    def channels_from_end(self) -> int | None:
        """Where the channels of the output lie, counted from the last axis (1); None where that isn't one axis."""

    def lay(self, output: Floats) -> Floats:
        """An output as (positions, groups, channels)."""

    def inputs(self, source: Floats, shape: tuple[int, ...], rows: Rows) -> Sample:
        """What these positions of an output of this shape are made from: (rows, groups, inputs)."""

    def matrix(self, weights: Floats) -> Floats:
        """The weights as (groups, inputs, outputs)."""

    def unlay(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        """The weights of this shape from their matrix: the inverse of `matrix`."""

    def factor(self, index: int) -> float:
        """What the product (0), or the bias (1), is multiplied with."""


@dataclass(frozen=True)
class Windowed:
    """Conv, where a window of the input makes a position, and ConvTranspose, where its outputs overlap."""

    node: ir.Node
    source: ir.Value
    weight: ir.Value

    @property
    def meets(self) -> int | None:
        return None if self._groups > 1 else 0 if self.node.op_type == "ConvTranspose" else 1

    @property
    def channels_from_end(self) -> int | None:
        return len(self.weight.const_value.shape.numpy()) - 1 if self.weight.const_value is not None else None

    def lay(self, output: Floats) -> Floats:
        flat = np.moveaxis(output, 1, -1)
        return flat.reshape(-1, self._groups, flat.shape[-1] // self._groups)

    def inputs(self, source: Floats, shape: tuple[int, ...], rows: Rows) -> Sample:
        turned, groups = self.node.op_type == "ConvTranspose", self._groups
        taps = self._turned_taps(source, shape, rows) if turned else self._taps(source, shape, rows)
        patches = np.stack(taps, 2)  # rows, channels, taps
        return np.asarray(patches.reshape(len(rows), groups, -1), np.float32)

    def matrix(self, weights: Floats) -> Floats:
        groups = self._groups
        if self.node.op_type == "ConvTranspose":  # (g i) o *k
            inner, outer = weights.shape[0] // groups, weights.shape[1]
            parts = weights.reshape(groups, inner, outer, -1).transpose(0, 1, 3, 2)
            return parts.reshape(groups, -1, outer)
        return weights.reshape(groups, len(weights) // groups, -1).swapaxes(1, 2)

    def unlay(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        groups = self._groups
        if self.node.op_type == "ConvTranspose":
            inner, outer = shape[0] // groups, shape[1]
            return matrix.reshape(groups, inner, -1, outer).transpose(0, 1, 3, 2).reshape(shape)
        return matrix.swapaxes(1, 2).reshape(shape)

    def factor(self, index: int) -> float:
        return 1.0

    @property
    def _groups(self) -> int:
        return integer(self.node, "group", 1)

    def _geometry(self, inner: tuple[int, ...], outer: tuple[int, ...]) -> tuple[list[int], ...]:
        """Kernel, steps, gaps and pads at the start and at the end; `inner` is the longer side's size with windows."""
        space = len(inner)
        assert self.weight.const_value is not None
        kernel = [int(dim) for dim in self.weight.const_value.shape.numpy()][2:]
        steps, gaps = (integers(self.node, name) or [1] * space for name in ("strides", "dilations"))
        pads = integers(self.node, "pads") or [0] * 2 * space
        mode = text(self.node, "auto_pad", "NOTSET")
        if mode == "VALID":
            pads = [0] * 2 * space
        elif mode != "NOTSET":
            spans = zip(inner, outer, steps, kernel, gaps, strict=True)
            total = [max((o - 1) * s + (k - 1) * g + 1 - i, 0) for i, o, s, k, g in spans]
            less, more = [t // 2 for t in total], [t - t // 2 for t in total]
            pads = [*less, *more] if mode == "SAME_UPPER" else [*more, *less]
        return kernel, steps, gaps, pads[:space], pads[space:]

    def _taps(self, source: Floats, shape: tuple[int, ...], rows: Rows) -> list[Floats]:
        kernel, steps, gaps, before, after = self._geometry(source.shape[2:], shape[2:])
        padded = np.pad(source, [(0, 0), (0, 0), *zip(before, after, strict=True)])
        sample, *where = np.unravel_index(rows, (shape[0], *shape[2:]))
        taps = []
        for offset in np.ndindex(*kernel):
            at = [w * step + o * gap for w, step, o, gap in zip(where, steps, offset, gaps, strict=True)]
            taps.append(padded[(sample, slice(None), *at)])
        return taps

    def _turned_taps(self, source: Floats, shape: tuple[int, ...], rows: Rows) -> list[Floats]:
        """A tap reaches an output position from the input position that it lands on it from, if there is one."""
        kernel, steps, gaps, before, _ = self._geometry(shape[2:], source.shape[2:])
        if "output_shape" in self.node.attributes:
            raise Unfit("its output_shape decides its pads")
        sample, *where = np.unravel_index(rows, (shape[0], *shape[2:]))
        taps = []
        for offset in np.ndindex(*kernel):
            reached, at = np.ones(len(rows), bool), []
            for w, o, gap, pad, step, size in zip(where, offset, gaps, before, steps, source.shape[2:], strict=True):
                start, off = np.divmod(w + pad - o * gap, step)
                reached &= (off == 0) & (start >= 0) & (start < size)
                at.append(np.clip(start, 0, size - 1))
            taps.append(np.where(reached[:, None], source[(sample, slice(None), *at)], 0))
        return taps


@dataclass(frozen=True)
class Lettered:
    """MatMul, Gemm and Einsum: axes by letters, `*` for any number of leading ones, which are positions.

    Letters of the weights that both other tensors have are groups, those of the input alone are summed up.
    """

    node: ir.Node
    source: ir.Value
    weight: ir.Value
    x: str
    w: str
    out: str

    @property
    def meets(self) -> int | None:
        return self.w.index(self._summed[0]) if len(self._summed) == 1 else None

    @property
    def channels_from_end(self) -> int | None:
        single = len(self._made) == 1 and not self._groups
        return len(self.out) - self.out.index(self._made[0]) if single else None

    def lay(self, output: Floats) -> Floats:
        axes = _axes(self.out, output.ndim)
        return _arranged(output, axes, (self._free(axes), self._groups, self._made))

    def inputs(self, source: Floats, shape: tuple[int, ...], rows: Rows) -> Sample:
        axes, out = _axes(self.x, source.ndim), _axes(self.out, len(shape))
        positions = self._free(out)
        sizes, wanted = dict(zip(axes, source.shape, strict=True)), dict(zip(out, shape, strict=True))
        if any(sizes.get(axis) != wanted[axis] for axis in positions):
            raise Unfit("its input is repeated")
        laid = _arranged(source, axes, (positions, self._groups, self._summed))
        return np.asarray(laid[rows], np.float32)

    def matrix(self, weights: Floats) -> Floats:
        return _arranged(weights, list(self.w), (self._groups, self._summed, self._made))

    def unlay(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        order = [*self._groups, *self._summed, *self._made]
        sizes = dict(zip(self.w, shape, strict=True))
        laid = matrix.reshape([sizes[axis] for axis in order])
        return laid.transpose([order.index(axis) for axis in self.w])

    def factor(self, index: int) -> float:
        name = ("alpha", "beta")[index]
        return self.node.attributes[name].as_float() if name in self.node.attributes else 1.0

    @property
    def _groups(self) -> list[str]:
        return [axis for axis in self.w if axis in self.x and axis in self.out]

    @property
    def _summed(self) -> list[str]:
        return [axis for axis in self.w if axis in self.x and axis not in self.out]

    @property
    def _made(self) -> list[str]:
        return [axis for axis in self.w if axis not in self.x]

    def _free(self, axes: list[str]) -> list[str]:
        return [axis for axis in axes if axis not in self.w]


def _axes(letters: str, rank: int) -> list[str]:
    """The name of each axis of a tensor of this rank."""
    lead = rank - len(letters.replace("*", ""))
    if lead < 0 or (lead and "*" not in letters):
        raise Unfit("the ranks of its operands aren't what they seem")
    return [*(f"*{index - lead}" for index in range(lead)), *letters.replace("*", "")]


def _arranged(array: Floats, axes: list[str], parts: tuple[list[str], list[str], list[str]]) -> Floats:
    """A tensor with its axes in three groups, each joined into one."""
    sizes = dict(zip(axes, array.shape, strict=True))
    joined = [math.prod(sizes[axis] for axis in part) for part in parts]
    return array.transpose([axes.index(axis) for part in parts for axis in part]).reshape(joined)


PRODUCTS = {"Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "com.microsoft::FusedMatMul"}


def product_of(node: ir.Node) -> Product | None:
    """A node as a product with weights that are an initializer; None for other nodes."""
    if operator_name(node) not in PRODUCTS:
        return None
    operands = [value for value in node.inputs[:2] if value is not None]
    fixed = [value for value in operands if value.is_initializer() and value.const_value is not None]
    if len(operands) != 2 or len(fixed) != 1 or not _is_float(fixed[0]):
        return None
    weight, first = fixed[0], fixed[0] is operands[0]
    source = operands[1 if first else 0]
    if node.op_type in ("Conv", "ConvTranspose"):
        return None if first else Windowed(node, source, weight)
    rank = len(weight.const_value.shape.numpy()) if weight.const_value is not None else 0
    if node.op_type == "Gemm":
        named: tuple[str, str, str] | None = _gemm(node)
    else:
        named = _einsum(node) if node.op_type == "Einsum" else _matmul(node, rank, first)
    if named is None:
        return None
    a, b, out = named
    x, w = (b, a) if first else (a, b)
    return Lettered(node, source, weight, x, w, out) if len(w) == rank else None


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _gemm(node: ir.Node) -> tuple[str, str, str]:
    return "ki" if integer(node, "transA", 0) else "ik", "ok" if integer(node, "transB", 0) else "ko", "io"


def _matmul(node: ir.Node, rank: int, first: bool) -> tuple[str, str, str] | None:
    """`*b i k, *b k o -> *b i o`, by the rank of the weights, which are the same for all axes that they lack."""
    if rank < 2 or integer(node, "transBatchA", 0) or integer(node, "transBatchB", 0):
        return None
    turned = [integer(node, name, 0) for name in ("transA", "transB")]  # of the fused one
    if any(turned):
        a, b = "*kz" if turned[0] else "*zk", "ok" if turned[1] else "ko"
        return None if first or rank != 2 else (a, b, "*zo")
    if rank == 2:
        return ("ok", "*kz", "*oz") if first else ("*k", "ko", "*o")
    lead = "abcdefgh"[: rank - 2]
    return (f"{lead}ok", f"*{lead}kz", f"*{lead}oz") if first else (f"*{lead}zk", f"{lead}ko", f"*{lead}zo")


def _einsum(node: ir.Node) -> tuple[str, str, str] | None:
    """The letters of an equation of two operands."""
    left, arrow, out = text(node, "equation", "").replace(" ", "").replace("...", "*").partition("->")
    a, comma, b = left.partition(",")
    parts = (a, b, out)
    plain = all(len(set(part)) == len(part) and part.find("*") < 1 for part in parts)
    if not arrow or not comma or not plain or (set(a) ^ set(b)) - set(out):
        return None  # a letter of one operand alone is summed up
    return parts if ("*" in out) == (("*" in a) != ("*" in b)) else None


def bias_of(product: Product, outputs: int) -> ir.Value | None:
    """The bias of a product, or one that is added to it behind it, if nothing else uses it."""
    node = product.node
    from_end = product.channels_from_end
    value = node.inputs[2] if len(node.inputs) > 2 and node.op_type != "Einsum" else None
    users = node.outputs[0].consumers()
    if value is not None:
        from_end = 1
    elif len(users) == 1 and users[0].op_type == "Add" and not node.outputs[0].is_graph_output():
        value = next((each for each in users[0].inputs if each is not None and each.is_initializer()), None)
    array = constant(value)
    if value is None or array is None or not _is_float(value) or len(value.uses()) != 1 or from_end is None:
        return None
    alone = array.size == outputs and array.ndim >= from_end and array.shape[-from_end] == outputs
    return value if alone else None
