"""From an inference graph to one whose every operator has a gradient, and that computes the same.

A row for each operator that ONNX Runtime can't differentiate, next to its relatives. Rows see a graph whose sizes are
all known (`at_sizes`): what depends on sizes alone is a constant there.
"""

from onnxprune.training.lowering import elementwise, normalization, recurrent, reductions, spatial
from onnxprune.training.lowering.base import FLAT, LOWERINGS, Lowerer, behind, lower
from onnxprune.training.lowering.sizes import at_sizes
from onnxprune.training.lowering.standard import spell_out

__all__ = [
    "FLAT",
    "LOWERINGS",
    "Lowerer",
    "at_sizes",
    "behind",
    "elementwise",
    "lower",
    "normalization",
    "recurrent",
    "reductions",
    "spatial",
    "spell_out",
]
