"""plan.json: what was removed, in names of the baseline model, enough to repeat the cut or to check it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import UsageError

FORMAT = "onnxprune-plan/1"


@dataclass(frozen=True)
class Removal:
    """The positions `removed` (sorted) from one `axis` of a tensor that had `size` there."""

    axis: int
    size: int
    removed: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(not 0 <= position < self.size for position in self.removed):
            raise ValueError(f"positions outside an axis of size {self.size}")

    def kept(self) -> list[int]:
        """The positions that stay."""
        return [int(i) for i in np.setdiff1d(np.arange(self.size), self.removed)]


@dataclass(frozen=True)
class Reordering:
    """Positions of an initializer's `axis` that were moved before the cut: `order` says where each came from.

    With `along`, every position of that other axis has an order of its own: a row of `order`.
    """

    initializer: str
    axis: int
    order: NDArray[np.int64]
    along: int | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be reordered so."""
        axes = (self.axis,) if self.along is None else (self.along, self.axis)
        ranks = all(0 <= axis < len(shape) for axis in axes)
        sorts = np.array_equal(np.sort(self.order), np.broadcast_to(np.arange(self.order.shape[-1]), self.order.shape))
        return ranks and sorts and self.order.shape == tuple(shape[axis] for axis in axes)

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """The tensor with its positions moved."""
        if self.along is None:
            return np.take(array, self.order, self.axis)
        order = self.order if self.along < self.axis else self.order.T
        shape = [size if axis in (self.along, self.axis) else 1 for axis, size in enumerate(array.shape)]
        return np.take_along_axis(array, order.reshape(shape), self.axis)

    def to_json(self) -> dict[str, Any]:
        """The reordering as JSON."""
        return {"initializer": self.initializer, "axis": self.axis, "along": self.along, "order": self.order.tolist()}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Reordering:
        """The reordering in what `to_json` made."""
        order = np.array(content["order"], np.int64)
        return Reordering(content["initializer"], int(content["axis"]), order, content["along"])


@dataclass(frozen=True)
class Plan:
    """What a cut removes: positions of activation tensors by value name, nodes, and which nodes make it inexact.

    `layers` names, for each layer that was dropped, the node that added it and the value that stays in its place.
    `reordered` says how positions were moved in the model before that: the baseline has them moved already.
    """

    tensors: dict[str, tuple[Removal, ...]]
    removed_nodes: tuple[str, ...] = ()
    inexact_nodes: tuple[str, ...] = ()
    layers: tuple[tuple[str, str], ...] = ()
    reordered: tuple[Reordering, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the pruned model equals the masked baseline up to rounding."""
        return not self.inexact_nodes

    def then(self, later: Plan) -> Plan:
        """This cut followed by one of the model that it left, as one plan for the model before both."""
        tensors = dict(self.tensors)
        for name, removals in later.tensors.items():
            merged = {removal.axis: removal for removal in tensors.get(name, ())}
            for removal in removals:
                before = merged.get(removal.axis)
                if before is not None:
                    kept = before.kept()
                    gone = sorted({*before.removed, *(kept[i] for i in removal.removed)})
                    removal = Removal(removal.axis, before.size, tuple(gone))
                merged[removal.axis] = removal
            tensors[name] = tuple(merged[axis] for axis in sorted(merged))
        inexact = tuple(sorted({*self.inexact_nodes, *later.inexact_nodes}))
        nodes = (*self.removed_nodes, *later.removed_nodes)
        return Plan(tensors, nodes, inexact, (*self.layers, *later.layers), (*self.reordered, *later.reordered))

    def to_json(self, model_sha256: str) -> dict[str, Any]:
        """The plan as JSON, bound to a baseline model by its digest."""
        return {
            "format": FORMAT,
            "model_sha256": model_sha256,
            "tensors": {
                name: [{"axis": r.axis, "size": r.size, "removed": list(r.removed)} for r in removals]
                for name, removals in self.tensors.items()
            },
            "removed_nodes": list(self.removed_nodes),
            "inexact_nodes": list(self.inexact_nodes),
            "layers": [{"node": node, "kept": kept} for node, kept in self.layers],
            "reordered": [each.to_json() for each in self.reordered],
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> Plan:
        """The plan in what `to_json` made. Raises `UsageError` for anything else."""
        if content.get("format") != FORMAT:
            raise UsageError(f"not a plan of format {FORMAT}: {content.get('format')!r}")
        tensors = {
            name: tuple(Removal(r["axis"], r["size"], tuple(r["removed"])) for r in removals)
            for name, removals in content["tensors"].items()
        }
        layers = tuple((layer["node"], layer["kept"]) for layer in content.get("layers", []))
        reordered = tuple(Reordering.from_json(each) for each in content.get("reordered", []))
        return Plan(tensors, tuple(content["removed_nodes"]), tuple(content["inexact_nodes"]), layers, reordered)


def load_plan(path: Path) -> Plan:
    """Reads plan.json. Raises `UsageError` when it isn't one."""
    try:
        return Plan.from_json(json.loads(path.read_text()))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: can't be read as a plan: {error}") from error
