"""A walk through a model with all calibration batches at once, and where its samples come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.evaluating.evaluate import Batch, run_session
from onnxprune.graph.model import open_session
from onnxprune.graph.threads import session_options


class Walk:
    """A walk through a model: what later nodes need is held for each batch.

    So fitting one layer after the other takes about as long as running the model twice, not once for each layer.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Batch], threads: int | None) -> None:
        self.model, self.threads = model, threads
        self.order = {node: index for index, node in enumerate(model.graph)}
        self.nodes = list(model.graph)
        self.at = 0
        self.held = [dict(feed) for feed in feeds]

    def reach(self, node: ir.Node) -> None:
        """Computes everything that `node` and those behind it need from the nodes before it."""
        target = self.order[node]
        before = self.nodes[self.at : target]
        fresh = [value.name or "" for each in before for value in each.outputs if self._needed(value, target)]
        if fresh:
            for held, arrays in zip(self.held, self.run(fresh), strict=True):
                held.update(zip(fresh, arrays, strict=True))
        self.at = target
        values = {value.name: value for each in self.nodes[:target] for value in each.outputs}
        for name in [name for name in self.held[0] if name in values and not self._needed(values[name], target)]:
            for held in self.held:
                del held[name]

    def _needed(self, value: ir.Value, target: int) -> bool:
        """Whether a node from `target` on, or one inside a subgraph, uses a value."""
        return any(self.order.get(user, target) >= target for user in value.consumers())

    def run(self, names: Sequence[str]) -> Iterator[list[NDArray[Any]]]:
        """These values for each batch, computed from what is held."""
        graph = ir.convenience.extract(self.model.graph, list(self.held[0]), list(names))
        for value in graph.inputs:
            array = self.held[0][value.name or ""]
            value.type = value.type or ir.TensorType(ir.DataType.from_numpy(array.dtype))
            value.shape = ir.Shape(array.shape)
        session = open_session(ir.Model(graph, ir_version=self.model.ir_version), session_options(self.threads))
        for held in self.held:
            yield run_session(session, held)

    def values(self, names: Sequence[str]) -> Iterator[dict[str, NDArray[Any]]]:
        """The same by name, of which some may be held or constant already."""
        unheld = [name for name in dict.fromkeys(names) if name not in self.held[0]]
        found = self.run(unheld) if unheld else iter([[] for _ in self.held])
        for held, arrays in zip(self.held, found, strict=True):
            computed = dict(zip(unheld, arrays, strict=True))
            yield {name: computed.get(name, held.get(name)) for name in names}  # type: ignore[misc]
