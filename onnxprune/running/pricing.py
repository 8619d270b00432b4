"""Measured before each round: what cuts of each group alone, and each layer alone, lose once they are repaired."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from onnxprune.choosing.layers import Layer, drop_layers
from onnxprune.choosing.select import keep_best
from onnxprune.cutting.cut import cut
from onnxprune.cutting.plan import Plan
from onnxprune.errors import ModelError
from onnxprune.graph.files import memoised
from onnxprune.labels.units import Group, Units
from onnxprune.repairing.reconstruct import reconstruct
from onnxprune.running.context import TRIED_ON, Context, State
from onnxprune.scoring.prices import TRIED, kept_at
from onnxprune.scoring.score import Scores

T = TypeVar("T")

SAMPLES, FEWEST = 256, 16  # on which a cut is fitted and measured: the fewer, the more work all trials are
WORK = 2e12  # MACs of a pass of all trials over them: minutes
MOST = 96  # groups, and layers, that are measured: those that cost most


def losses_of_groups(run: Context, state: State, units: Units, raw: Scores) -> dict[str, list[float]]:
    """What is lost, of the spread of the outputs, when shares of `TRIED` of each group alone go and are repaired.

    Scores `raw` say what goes first of a group. Kept in the run folder. Groups that can't be measured are left out.
    """

    def measure() -> dict[str, list[float]]:
        groups, found = _dearest(run, units), dict[str, list[float]]()
        samples = _samples(run, len(TRIED) * len(groups))
        before = _loss(run, state.model, samples)
        for number, group in enumerate(groups):
            run.listener.progress("pricing units", number + 1, len(groups))
            curve = [_without_units(run, state, units, raw, group, share, samples) - before for share in TRIED]
            if np.isfinite(curve).all():
                found[group.name] = curve
        return found

    return _kept(run, state, "units", [group.name for group in units.groups], raw.tobytes(), measure)


def losses_of_layers(run: Context, state: State, layers: Sequence[Layer]) -> dict[str, float]:
    """What is lost, of the spread of the outputs, without each layer alone, once that is repaired."""

    def measure() -> dict[str, float]:
        samples, found = _samples(run, len(layers[:MOST])), dict[str, float]()
        before = _loss(run, state.model, samples)
        for number, layer in enumerate(layers[:MOST]):
            run.listener.progress("pricing layers", number + 1, len(layers[:MOST]))
            try:
                model, step = drop_layers(state.model, [layer.name])
                lost = _repaired(run, state, model, step, {layer.kept.name or ""}, samples) - before
            except ModelError:
                continue  # what can't run without it stays
            if math.isfinite(lost):
                found[layer.name] = lost
        return found

    return _kept(run, state, "layers", [layer.name for layer in layers], b"", measure)


def _kept(run: Context, state: State, what: str, names: list[str], more: bytes, measure: Callable[[], T]) -> T:
    """What was measured of the same model before, or is now."""
    told = json.dumps([state.plan.to_json(""), state.tuned, names], sort_keys=True).encode() + more
    path = run.folder / f"prices-of-{what}-{hashlib.sha256(told).hexdigest()[:12]}.json"
    found: T = memoised(path, measure)
    return found


def _dearest(run: Context, units: Units) -> list[Group]:
    """The groups with the most to save."""
    spending, everything = run.spending(units), np.ones(units.count, bool)

    def spent(group: Group) -> float:
        rest = everything.copy()
        rest[group.units[1:]] = False
        return spending(rest)

    return sorted((group for group in units.groups if len(group.units) > 1), key=spent)[:MOST]


def _without_units(
    run: Context, state: State, units: Units, raw: Scores, group: Group, share: float, samples: int
) -> float:
    alive = np.ones(units.count, bool)
    keep_best(alive, group, raw, kept_at(group, share))
    model, step = cut(units, alive)
    return _repaired(run, state, model, step, set(step.tensors), samples)


def _repaired(run: Context, state: State, model: ir.Model, step: Plan, names: set[str], samples: int) -> float:
    assert run.calibration is not None
    whole, plan = run.reference(state, step)
    part, threads = run.calibration.take(slice(0, samples)), run.options.threads
    reconstruct(model, whole, plan, part, threads, memory=run.memory, share=TRIED_ON, reading=names)
    return _loss(run, model, samples)


def _loss(run: Context, model: ir.Model, samples: int) -> float:
    """What of the outputs' spread isn't explained."""
    return 1 - run.judge.measure(model, samples).fidelity


def _samples(run: Context, trials: int) -> int:
    return int(np.clip(WORK / max(trials * run.base_costs["macs"], 1), FEWEST, SAMPLES))
