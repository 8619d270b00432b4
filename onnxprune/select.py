"""From scores and a threshold to what survives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxprune.cost import Alive
from onnxprune.score import Scores
from onnxprune.units import Group, Units

BLOCK = 8  # channels; what the blocked convolutions of common CPUs work on


@dataclass(frozen=True)
class Rounding:
    """Widths are rounded up to a multiple of `multiple`; None chooses one for each group."""

    multiple: int | None = None

    def of(self, group: Group) -> int:
        """The multiple for a group: for automatic rounding 8, 4 or 1 for what convolutions read, 1 for the rest."""
        if self.multiple is not None:
            return self.multiple
        if not group.aligned:
            return 1
        return next((r for r in (BLOCK, BLOCK // 2) if len(group.units) * group.repeats >= 4 * r), 1)


def survivors(units: Units, scores: Scores, tau: float, rounding: Rounding) -> Alive:
    """What survives when every unit with score / tau < 1 goes, each group keeps its best, and widths are rounded up."""
    alive = np.ones(units.count, bool)
    for group in units.groups:
        wanted = int((scores[group.units] >= tau).sum())
        keep_best(alive, group, scores, round_up(group, wanted, rounding.of(group)))
    return alive


def survivors_by_share(units: Units, scores: Scores, share: float, rounding: Rounding) -> Alive:
    """What survives when `share` of the units of each group goes, lowest scores first."""
    alive = np.ones(units.count, bool)
    for group in units.groups:
        removed = min(math.floor(share * len(group.units) + 0.5), int(np.isfinite(scores[group.units]).sum()))
        keep_best(alive, group, scores, round_up(group, len(group.units) - removed, rounding.of(group)))
    return alive


def round_up(group: Group, kept: int, multiple: int) -> int:
    """The number of units to keep: at least one, and as many positions as a multiple asks for."""
    step = multiple // math.gcd(multiple, group.repeats)
    return min(len(group.units), max(1, -(-max(kept, 1) // step) * step))


def keep_best(alive: Alive, group: Group, scores: Scores, kept: int) -> None:
    """Leaves the `kept` best units of a group alive."""
    order = np.argsort(scores[group.units], kind="stable")
    alive[group.units[order[: len(order) - kept]]] = False


def tau_for(
    units: Units, scores: Scores, rounding: Rounding, fits: Callable[[Alive], bool]
) -> tuple[float, Alive] | None:
    """The lowest threshold whose survivors fit, by bisection over the scores; None when not even the highest fits.

    `fits` must be monotone in what survives, as MACs, parameters and bytes are.
    """
    values = np.unique(scores[np.isfinite(scores)])
    if not len(values):
        return None
    candidates = np.append(values, np.nextafter(values[-1], np.inf))
    low, high = 0, len(candidates) - 1
    if not fits(survivors(units, scores, float(candidates[high]), rounding)):
        return None
    while low < high:
        middle = (low + high) // 2
        if fits(survivors(units, scores, float(candidates[middle]), rounding)):
            high = middle
        else:
            low = middle + 1
    tau = float(candidates[low])
    return tau, survivors(units, scores, tau, rounding)
