"""The small operations behind the commands `prune` and `inspect`, for Python."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx_ir.passes import common

from onnxprune.cost import Cost
from onnxprune.cut import cut
from onnxprune.errors import UsageError
from onnxprune.files import check_writable, write_json
from onnxprune.labels import analyse
from onnxprune.labels.solve import Granularity
from onnxprune.model import digest, open_model, save_model
from onnxprune.normalise import normalise
from onnxprune.plan import Plan
from onnxprune.score import Scope, normalise_scores, score_units
from onnxprune.select import Rounding, keep_best, round_up, survivors_by_share
from onnxprune.units import Units, find_units, prunable
from onnxprune.verify import check_cut


@dataclass(frozen=True)
class PruneResult:
    """What one cut did: costs before and after, and the plan."""

    macs: tuple[int, int]
    params: tuple[int, int]
    plan: Plan
    output: str

    def to_json(self) -> dict[str, Any]:
        """The result as JSON; the plan itself is in its own file."""
        sides = {
            name: {"macs": self.macs[i], "params": self.params[i]} for i, name in enumerate(("baseline", "pruned"))
        }
        return {
            **sides,
            "output": self.output,
            "exact": self.plan.exact,
            "inexact_nodes": list(self.plan.inexact_nodes),
        }


def prune(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    ratio: float = 0.5,
    *,
    criterion: str = "l2",
    scope: Scope = "layer",
    round_to: int | None = 1,
    granularity: Granularity = "auto",
    seed: int = 0,
    plan: str | os.PathLike[str] | None = None,
    baseline: str | os.PathLike[str] | None = None,
) -> PruneResult:
    """One cut by weights alone: removes `ratio` of each group's units, or of all of them under scope "global".

    `round_to` rounds widths up to a multiple (None: what convolutions like). Writes the pruned model to `output`, the
    plan to `plan` and the normalised model whose value names the plan uses to `baseline`. The result has been run in
    onnxruntime and, where exact, compared with the mask oracle. Raises subclasses of `OnnxPruneError`.
    """
    if not 0 < ratio < 1:
        raise UsageError(f"--ratio {ratio:g}: give the share of units to remove, between 0 and 1")
    paths = [Path(p) for p in (output, plan, baseline) if p is not None]
    for path in paths:
        check_writable(path)
        if path.exists() and Path(model).exists() and path.samefile(model):
            raise UsageError(f"the output {path} is the input; choose another")
    normal = normalise(open_model(model))
    units = prunable(normal, str(model), granularity)
    scores = normalise_scores(units, score_units(units, criterion, seed), scope)
    if scope == "layer":
        alive = survivors_by_share(units, scores, ratio, Rounding(round_to))
    else:
        alive = _share_of_all(units, scores, ratio, Rounding(round_to))
    cost, everything = Cost(units), np.ones(units.count, bool)
    pruned, done = cut(units, alive)
    check_cut(normal, pruned, done)
    result = PruneResult(
        (cost.macs(everything), cost.macs(alive)), (cost.params(everything), cost.params(alive)), done, str(output)
    )
    if baseline is not None:
        save_model(normal, Path(baseline))
    if plan is not None:
        write_json(Path(plan), done.to_json(digest(normal)))
    common.DeduplicateInitializersPass()(pruned)
    save_model(pruned, Path(output))
    return result


def _share_of_all(units: Units, scores: np.ndarray[Any, Any], ratio: float, rounding: Rounding) -> np.ndarray[Any, Any]:
    """The lowest `ratio` of all units go, except that every group keeps one."""
    ids = np.concatenate([group.units for group in units.groups])
    order = ids[np.argsort(scores[ids], kind="stable")]
    best = {int(group.units[np.argmax(scores[group.units])]) for group in units.groups}
    free = np.array([unit for unit in order if int(unit) not in best])
    gone = np.zeros(units.count, bool)
    gone[free[: round(ratio * len(ids))]] = True
    alive = np.ones(units.count, bool)
    for group in units.groups:
        kept = int((~gone[group.units]).sum())
        keep_best(alive, group, scores, round_up(group, kept, rounding.of(group)))
    return alive


@dataclass(frozen=True)
class Inspection:
    """What could be pruned: groups, locks, and how much of the model they reach."""

    groups: tuple[dict[str, Any], ...]
    locks: tuple[dict[str, Any], ...]
    macs: int
    params: int
    reachable_macs: float
    reachable_params: float
    opset: int

    def to_json(self) -> dict[str, Any]:
        """The inspection as JSON."""
        return {
            "groups": list(self.groups), "locks": list(self.locks), "macs": self.macs, "params": self.params,
            "reachable": {"macs": self.reachable_macs, "params": self.reachable_params}, "opset": self.opset,
        }  # fmt: skip


def inspect(model: str | os.PathLike[str], granularity: Granularity = "auto") -> Inspection:
    """Analyses a model without changing anything. Raises `ModelError` for one that can't be used."""
    normal = normalise(open_model(model))
    units = find_units(analyse(normal, granularity))
    cost, everything = Cost(units), np.ones(units.count, bool)
    macs, params = cost.macs(everything), cost.params(everything)
    groups = []
    smallest = everything.copy()
    for group in units.groups:
        alone = everything.copy()
        alone[group.units[1:]] = False
        smallest[group.units[1:]] = False
        groups.append(
            {
                "name": group.name,
                "kind": group.kind,
                "units": len(group.units),
                "exact": group.exact,
                "members": list(group.members),
                "macs": macs - cost.macs(alone),
                "params": params - cost.params(alone),
            }
        )
    return Inspection(
        tuple(groups), tuple(_locks(units)), macs, params,
        1 - cost.macs(smallest) / max(macs, 1), 1 - cost.params(smallest) / max(params, 1),
        normal.opset_imports.get("", 0),
    )  # fmt: skip


def _locks(units: Units) -> list[dict[str, Any]]:
    """Locked axes of parameters, with the reason and the node that locks them."""
    reasons = units.solution.lock_reasons()
    found = []
    for value, axis, vector in units.parameters:
        locked = [int(c) for c in np.unique(vector) if units.solution.locked[c]]
        if locked and locked[0] in reasons and "spatial" not in reasons[locked[0]].reason:
            lock = reasons[locked[0]]
            found.append(
                {"value": value.name, "axis": axis, "positions": len(locked), "reason": lock.reason, "node": lock.node}
            )
    return found
