"""Scales and shifts of normalisation: two numbers for each channel, fitted like any other weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxprune.graph.model import constant
from onnxprune.labels.flow import integer, operator_name
from onnxprune.repairing.moments import Array, Sample
from onnxprune.repairing.products import Floats, Rows

SCALED = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "InstanceNormalization"}


@dataclass(frozen=True)
class Scaling:
    """`y = n s + b` with n normalised: each channel is a group of one input and one output.

    Its input is what the node normalises; what that becomes is computed here, as the node does.
    """

    node: ir.Node
    source: ir.Value
    weight: ir.Value

    @property
    def meets(self) -> int | None:
        """Nothing is summed up."""
        return None

    @property
    def channels_from_end(self) -> int | None:
        """Where channels lie, counted from the last axis."""
        return 1

    def lay(self, output: Floats) -> Floats:
        """An output as (positions, channels, 1)."""
        flat = np.moveaxis(output, 1, -1) if self.node.op_type == "InstanceNormalization" else output
        return flat.reshape(-1, flat.shape[-1], 1)

    def inputs(self, source: Floats, shape: tuple[int, ...], rows: Rows) -> Sample:
        """The normalised input at these positions: (rows, channels, 1)."""
        x = np.asarray(source, np.float32)
        axes = tuple(range(2, x.ndim)) if self.node.op_type == "InstanceNormalization" else (-1,)
        centred = self.node.op_type == "LayerNormalization" or self.node.op_type == "InstanceNormalization"
        x = x - x.mean(axes, keepdims=True) if centred else x
        x = x / np.sqrt(np.square(x).mean(axes, keepdims=True) + self._epsilon)
        return np.asarray(self.lay(x)[rows], np.float32)

    def matrix(self, weights: Floats) -> Floats:
        """The scales as (channels, 1, 1)."""
        return weights.reshape(-1, 1, 1)

    def unlay(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `matrix`."""
        return matrix.reshape(shape)

    def factor(self, index: int) -> float:
        """Nothing is multiplied besides."""
        return 1.0

    @property
    def _epsilon(self) -> float:
        return self.node.attributes["epsilon"].as_float() if "epsilon" in self.node.attributes else 1e-5


def scaling_of(node: ir.Node) -> Scaling | None:
    """A normalisation over the last axis, or over space, with scales that are an initializer; None for other nodes."""
    if operator_name(node) not in SCALED or len(node.inputs) < 2:
        return None
    source, weight = node.inputs[0], node.inputs[1]
    array = constant(weight)
    last = node.op_type == "InstanceNormalization" or integer(node, "axis", -1) == -1
    if source is None or weight is None or array is None or array.ndim != 1 or not last:
        return None
    return Scaling(node, source, weight)
