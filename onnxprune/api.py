"""The small operations behind the commands `prune` and `inspect`, for Python."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxprune.checks import check_option
from onnxprune.choosing.layers import choose_layers, drop_layers, find_layers, free_layers, weight_scores
from onnxprune.choosing.select import Keep, Rounding, bounded, keep_best, survivors_by_share
from onnxprune.cutting.cut import cut
from onnxprune.cutting.plan import Plan, load_plan
from onnxprune.cutting.verify import Outcome, check_cut, mask_oracle
from onnxprune.errors import DifferentError, ModelError, NotComparableError, UsageError
from onnxprune.exporting.finalise import join_copies
from onnxprune.graph.files import sha256, write_json
from onnxprune.graph.model import check_outputs, digest, open_model, save_model
from onnxprune.labels import analyse
from onnxprune.labels.convolution import SPACE
from onnxprune.labels.solve import Granularity
from onnxprune.labels.units import Units, find_units, prunable
from onnxprune.normalising.normalise import normalise
from onnxprune.repairing.find import unrepairable
from onnxprune.scoring.cost import Alive, Cost, node_macs
from onnxprune.scoring.lineup import line_up, reorder
from onnxprune.scoring.score import Scope, normalise_scores, score_units, stored, weight_values
from onnxprune.training.forward import untrainable


@dataclass(frozen=True)
class PruneResult:
    """What one cut did: costs before and after, the plan, and what the comparison with the masked baseline says.

    `check` is `equal` or `not comparable`, and `why` says what couldn't be compared; a different model isn't written.
    """

    macs: tuple[int, int]
    params: tuple[int, int]
    plan: Plan
    output: str
    check: Outcome
    why: str = ""

    @property
    def compared(self) -> bool:
        """Whether everything could be compared, and was equal."""
        return self.check == "equal"

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
            "compared": self.compared,
            "check": self.check,
            "why": self.why,
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
    kinds: Sequence[str] = (),
    protect: Sequence[str] = (),
    keep: Sequence[Keep] = (),
    layers: int | Literal["auto"] | None = None,
    seed: int = 0,
    plan: str | os.PathLike[str] | None = None,
    baseline: str | os.PathLike[str] | None = None,
) -> PruneResult:
    """One cut by weights alone: removes `ratio` of each group's units, or of all of them under scope "global".

    `round_to` rounds widths up to a multiple (None: what convolutions like). `kinds` restricts the cut to some kinds of
    groups; parameters that match one of the patterns in `protect`, by their name or their node's, keep their shape.
    `keep` bounds the share of units that stays, for groups by name. `layers` layers, those of the smallest weights, are
    dropped first; with a ratio of 0 nothing else goes. Writes the pruned model to `output`, the plan to `plan` and the
    normalised model whose names and positions the plan uses to `baseline`. The result has been run in onnxruntime and
    compared with the mask oracle. Raises subclasses of `OnnxPruneError`.
    """
    if not 0 <= ratio < 1 or (ratio == 0 and not layers):
        raise UsageError(f"--ratio {ratio:g}: give the share of units to remove, between 0 and 1")
    check_option("scope", scope, Scope)
    check_option("round_to", round_to, int | None, 1)
    check_option("layers", layers, int | Literal["auto"] | None, 0)
    check_option("seed", seed, int, 0)
    check_outputs(model, [output, plan, baseline])
    normal = normalise(open_model(model))
    units = prunable(normal, str(model), granularity, kinds, protect)
    moved = line_up(units, criterion, seed)
    thinner, dropped = _without_layers(normal, layers, protect)
    if dropped.layers:
        units = prunable(thinner, str(model), granularity, kinds, protect)
    scores = bounded(units, normalise_scores(units, score_units(units, criterion, seed), scope), keep)
    if scope == "layer":
        alive = survivors_by_share(units, scores, ratio, Rounding(round_to))
    else:
        alive = _share_of_all(units, scores, ratio, Rounding(round_to))
    pruned, cut_plan = cut(units, alive)
    done = Plan({}, reordered=moved).then(dropped).then(cut_plan)
    return _finish(normal, pruned, done, (units, alive), output, plan, baseline)


def _without_layers(
    model: ir.Model, layers: int | Literal["auto"] | None, protect: Sequence[str]
) -> tuple[ir.Model, Plan]:
    if not layers:
        return model, Plan({})
    found = free_layers(model, protect)
    scores = weight_scores(model, found)
    if layers == "auto":  # those that stand out as small
        layers = int((np.array(scores) < np.mean(scores or [0]) - np.std(scores or [0])).sum())
    return drop_layers(model, [layer.name for layer in choose_layers(found, scores, layers)])


def _finish(
    normal: ir.Model,
    pruned: ir.Model,
    done: Plan,
    cut_of: tuple[Units, Alive],
    output: str | os.PathLike[str],
    plan: str | os.PathLike[str] | None,
    baseline: str | os.PathLike[str] | None,
) -> PruneResult:
    """Checks a cut and writes what was asked for."""
    checked = check_cut(normal, pruned, done)
    units, alive = cut_of
    whole = find_units(analyse(normal)) if done.layers else units
    everything, before, after = np.ones(whole.count, bool), Cost(whole), Cost(units)
    macs, params = (before.macs(everything), after.macs(alive)), (before.params(everything), after.params(alive))
    result = PruneResult(macs, params, done, str(output), checked.outcome, checked.why)
    if baseline is not None:
        save_model(normal, Path(baseline))
    if plan is not None:
        write_json(Path(plan), done.to_json(digest(normal)))
    join_copies(pruned)
    save_model(pruned, Path(output))
    return result


def apply(
    plan: str | os.PathLike[str],
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    new_plan: str | os.PathLike[str] | None = None,
    baseline: str | os.PathLike[str] | None = None,
) -> PruneResult:
    """Repeats the cut of `plan` on a model of the same architecture, whatever its weights.

    Writes the pruned model to `output`; `new_plan` and `baseline` as `plan` and `baseline` of `prune`. Raises
    `UsageError` when the plan isn't one, and `ModelError` when it doesn't fit the model.
    """
    check_outputs(model, [output, new_plan, baseline], [plan])
    wanted = load_plan(Path(plan))
    normal = normalise(open_model(model))
    reorder(normal, wanted.reordered)
    thinner, dropped = drop_layers(normal, [name for name, _ in wanted.layers])
    granularities: tuple[Granularity, ...] = ("auto", "rows", "columns")
    for granularity in granularities:
        units = find_units(analyse(thinner, granularity))
        alive = _alive_by(wanted, units)
        pruned, cut_plan = cut(units, alive)
        if cut_plan.tensors == wanted.tensors:
            done = Plan({}, reordered=wanted.reordered).then(dropped).then(cut_plan)
            return _finish(normal, pruned, done, (units, alive), output, new_plan, baseline)
    differing = sorted(
        name
        for name in {**cut_plan.tensors, **wanted.tensors}
        if cut_plan.tensors.get(name) != wanted.tensors.get(name)
    )
    raise ModelError(f"the plan doesn't fit the model: {differing[0]!r} and {len(differing) - 1} more can't be cut so")


def _alive_by(plan: Plan, units: Units) -> Alive:
    """What survives when everything that a plan removes goes. Raises `ModelError` for a value that doesn't fit."""
    alive = np.ones(units.count, bool)
    values = {value.name: value for value in units.solution.flow.axes}
    for name, removals in plan.tensors.items():
        for removal in removals:
            axes = units.solution.axes(values[name]) if name in values else ()
            vector = axes[removal.axis] if removal.axis < len(axes) else None
            if vector is None or len(vector) != removal.size:
                raise ModelError(
                    f"the plan doesn't fit the model: it cuts {name!r} along axis {removal.axis} of size {removal.size}"
                )
            alive[vector[list(removal.removed)]] = False
    return alive


@dataclass(frozen=True)
class Verification:
    """Whether a pruned model equals its masked baseline: `equal`, `different` or `not comparable`, and why.

    `difference` is relative to the largest output, where both must agree, and `tolerance` what it may be. Behind
    `open_nodes`, which mix what was cut with what is left, it is `open_difference`. `inexact_nodes` are all that mix.
    """

    outcome: Outcome
    difference: float
    tolerance: float
    inexact_nodes: tuple[str, ...]
    open_nodes: tuple[str, ...]
    open_difference: float
    why: str

    @property
    def passed(self) -> bool:
        """Whether both compute the same."""
        return self.outcome == "equal"

    @property
    def exit_status(self) -> int:
        """0 equal, 8 different, 9 not comparable."""
        return {"equal": 0, "different": DifferentError.exit_status}.get(self.outcome, NotComparableError.exit_status)

    def to_json(self) -> dict[str, Any]:
        """The verification as JSON."""
        comparable = self.outcome != "not comparable"
        return {**asdict(self), "passed": self.passed, "comparable": comparable, "exit_status": self.exit_status}


def verify(
    baseline: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    plan: str | os.PathLike[str],
    seeds: Sequence[int] = (0, 1, 2),
) -> Verification:
    """Runs the mask oracle: the baseline with everything in the plan set to zero against the pruned model.

    On signed random inputs, one set for each seed. Raises `ModelError` when a model can't be used and `UsageError` when
    the plan isn't one, or is of another baseline, or without a seed, which would compare nothing.
    """
    check_option("seeds", seeds, tuple[int, ...])
    if not seeds or min(seeds) < 0:
        raise UsageError(f"--seeds {len(seeds)}: give one set of inputs or more, of seeds from 0")
    wanted, owner = load_plan(Path(plan)), json.loads(Path(plan).read_text()).get("model_sha256")
    before, after = open_model(baseline), open_model(pruned)
    if owner != digest(before) and owner != sha256(Path(baseline)):
        raise UsageError(f"{plan} is the plan of another baseline: its model_sha256 isn't that of {baseline}")
    result = mask_oracle(before, after, wanted, tuple(seeds))
    return Verification(
        result.outcome, result.difference, result.allowed, wanted.inexact_nodes, result.open_nodes,
        result.open_difference, result.why,
    )  # fmt: skip


def _share_of_all(units: Units, scores: np.ndarray[Any, Any], ratio: float, rounding: Rounding) -> np.ndarray[Any, Any]:
    """The lowest `ratio` of all units go, except that every group keeps one."""
    ids = np.concatenate([group.units for group in units.groups])
    order = ids[np.argsort(scores[ids], kind="stable")]
    best = {int(group.units[np.argmax(scores[group.units])]) for group in units.groups}
    free = np.array([unit for unit in order if int(unit) not in best and scores[unit] < np.inf], int)
    gone = scores == -np.inf
    gone[free[: round(ratio * len(ids))]] = True
    alive = np.ones(units.count, bool)
    for group in units.groups:
        kept = int((~gone[group.units]).sum())
        keep_best(alive, group, scores, rounding.up(group, kept))
    return alive


@dataclass(frozen=True)
class Inspection:
    """What could be pruned: groups, layers, locks, and how much of the model they reach."""

    groups: tuple[dict[str, Any], ...]
    layers: tuple[dict[str, Any], ...]
    locks: tuple[dict[str, Any], ...]
    macs: int
    params: int
    reachable_macs: float
    reachable_params: float
    opset: int
    untrainable: dict[str, str]
    repairable_macs: float
    unrepairable: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The inspection as JSON."""
        return {
            "groups": list(self.groups), "layers": list(self.layers), "locks": list(self.locks), "macs": self.macs,
            "params": self.params, "reachable": {"macs": self.reachable_macs, "params": self.reachable_params},
            "opset": self.opset, "untrainable": self.untrainable,
            "repairable": {"macs": self.repairable_macs}, "unrepairable": self.unrepairable,
        }  # fmt: skip


def inspect(model: str | os.PathLike[str], granularity: Granularity = "auto") -> Inspection:
    """Analyses a model without changing anything. Raises `ModelError` for one that can't be used.

    A group's `macs` and `params` are what goes with all but one of its units. A lock names a parameter's axis, how many
    of its positions are locked, how many numbers they hold, the reason and the node that locks it. `untrainable` are
    the parameters that fine-tuning leaves as they are, with the reason; `unrepairable` the nodes that repair without
    training does, and `repairable_macs` the share of the MACs with weights that is in all others.
    """
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
    layers = [
        {"name": layer.name, "kind": "layer", "params": layer.params, "nodes": len(layer.nodes)}
        for layer in find_layers(normal)
    ]
    left = unrepairable(normal)
    return Inspection(
        tuple(groups), tuple(layers), tuple(_locks(units)), macs, params,
        1 - cost.macs(smallest) / max(macs, 1), 1 - cost.params(smallest) / max(params, 1),
        normal.opset_imports.get("", 0), untrainable(normal), _repairable(units, left), left,
    )  # fmt: skip


def _repairable(units: Units, left: dict[str, str]) -> float:
    """The share of the MACs with weights that isn't in the nodes that are `left` alone by repair."""
    weights, size = set(weight_values(units.model)), units.solution.shapes.concrete
    macs = {
        node.name or "": node_macs(node, size)
        for node in units.model.graph
        if any(stored(value) in weights for value in node.inputs)
    }
    return 1 - sum(macs.get(name, 0) for name in left) / max(sum(macs.values()), 1)


def _locks(units: Units) -> list[dict[str, Any]]:
    """Locked axes of parameters, with the reason and the node that locks them."""
    reasons = units.solution.lock_reasons()
    found = []
    for value, axis, vector in units.parameters:
        locked = units.solution.locked[vector]
        first = next((reasons[c] for c in vector[locked].tolist() if c in reasons), None)
        if first is None or value.const_value is None or first.reason == SPACE:
            continue
        numbers = value.const_value.size * int(locked.sum()) // len(vector)
        where = {"value": value.name, "axis": axis, "positions": int(locked.sum()), "numbers": numbers}
        found.append({**where, "reason": first.reason, "node": first.node})
    return found
