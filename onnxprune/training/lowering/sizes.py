"""A graph at given sizes of its inputs: every shape is known, and what depends on shapes alone is a constant."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from onnxprune.evaluating.evaluate import all_shapes
from onnxprune.graph.shapes import Shapes, add_initializer


def at_sizes(
    model: ir.Model, sizes: Mapping[str, Sequence[int]], trained: Collection[str] = ()
) -> tuple[ir.Model, Shapes]:
    """A copy of a model whose inputs have these shapes, and the shapes of all its values.

    What is known then is a constant, unless it hangs on initializers that are `trained`.
    """
    graph = model.clone()
    for value in graph.graph.inputs:
        if (size := sizes.get(value.name or "")) is not None:
            value.shape = ir.Shape(size)
    shapes = all_shapes(graph)
    changing = {graph.graph.initializers[name] for name in trained}
    for node in list(graph.graph):
        if not changing.isdisjoint(node.inputs) and node.op_type not in ("Shape", "Size"):
            changing.update(node.outputs)
        for value in node.outputs:
            known = shapes.contents(value) if value not in changing and not value.is_graph_output() else None
            if known is not None:
                value.replace_all_uses_with(add_initializer(graph, f"{value.name}.known", known[0]))
            elif (shape := shapes(value)) is not None and (kind := shapes.element_type(value)) is not None:
                value.shape, value.type = ir.Shape(shape), ir.TensorType(kind)
    common.RemoveUnusedNodesPass()(graph)
    return graph, shapes
