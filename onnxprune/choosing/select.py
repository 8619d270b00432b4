"""From scores and a threshold to what survives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from onnxprune.benchmarking.probe import block_size
from onnxprune.errors import UsageError
from onnxprune.labels.units import Group, Units
from onnxprune.scoring.cost import Alive
from onnxprune.scoring.score import Scores

NARROWEST = 4  # channels that make a difference to a blocked convolution


@dataclass(frozen=True)
class Rounding:
    """Widths are rounded up to a multiple of `multiple`; None chooses by what a group feeds, in blocks of `block`.

    `block` None is what the CPU provider's convolutions work on here.
    """

    multiple: int | None = None
    block: int | None = None

    def up(self, group: Group, kept: int) -> int:
        """The number of units of a group to keep so that `kept` stay, and as many positions as runtimes like.

        Automatic rounding keeps whole blocks. Narrower than one block, by halves of it, may be what only convolutions
        over several positions read or write: others, 1x1 or depthwise, are no faster there. For what nothing but
        matrix products read every width is as good.
        """
        if self.multiple is not None:
            return self._whole(group, kept, self.multiple)
        block = block_size() if self.block is None else self.block
        if group.kernels == "none" or block < NARROWEST:
            return self._whole(group, kept, 1)
        while group.kernels == "spatial" and block > NARROWEST and 2 * max(kept, 1) * group.repeats <= block:
            block //= 2
        return self._whole(group, kept, block)

    @staticmethod
    def _whole(group: Group, kept: int, multiple: int) -> int:
        step = multiple // math.gcd(multiple, group.repeats)
        return min(len(group.units), -(-max(kept, 1) // step) * step)


@dataclass(frozen=True)
class Keep:
    """At least `least` and at most `most` of the units stay, as shares, of the groups whose name matches `pattern`."""

    pattern: str
    least: float
    most: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most <= 1 or self.most == 0:
            raise UsageError(
                f"--keep {self.pattern}={self.least:g}:{self.most:g}: give shares from 0 to 1, the lower one first"
            )


def bounded(units: Units, scores: Scores, keeps: Sequence[Keep], origin: Mapping[str, int] | None = None) -> Scores:
    """Scores under which no threshold cuts what must stay, and every threshold what must go.

    For each group the last of `keeps` that matches its name counts; shares are of the units that `origin` says the
    group had, or has now. Raises `UsageError` for a pattern that matches no group.
    """
    for keep in keeps:
        if not any(fnmatchcase(group.name, keep.pattern) for group in units.groups):
            raise UsageError(f"--keep {keep.pattern}: no group has such a name; 'inspect' lists them")
    result = scores.copy()
    for group in units.groups:
        matching = [keep for keep in keeps if fnmatchcase(group.name, keep.pattern)]
        if not matching:
            continue
        keep = matching[-1]
        before = (origin or {}).get(group.name, len(group.units))
        best_first = group.units[np.argsort(-scores[group.units], kind="stable")]
        result[best_first[max(1, math.floor(keep.most * before + 0.5)) :]] = -np.inf
        result[best_first[: math.ceil(keep.least * before - 1e-9)]] = np.inf
    return result


def survivors(units: Units, scores: Scores, tau: float, rounding: Rounding) -> Alive:
    """What survives when every unit with score / tau < 1 goes, each group keeps its best, and widths are rounded up."""
    alive = np.ones(units.count, bool)
    for group in units.groups:
        wanted = int((scores[group.units] >= tau).sum())
        keep_best(alive, group, scores, rounding.up(group, wanted))
    return alive


def survivors_by_share(units: Units, scores: Scores, share: float, rounding: Rounding) -> Alive:
    """What survives when `share` of the units of each group goes, lowest scores first."""
    alive = np.ones(units.count, bool)
    for group in units.groups:
        least, most = int((scores[group.units] == -np.inf).sum()), int((scores[group.units] < np.inf).sum())
        removed = int(np.clip(math.floor(share * len(group.units) + 0.5), least, most))
        keep_best(alive, group, scores, rounding.up(group, len(group.units) - removed))
    return alive


def keep_best(alive: Alive, group: Group, scores: Scores, kept: int) -> None:
    """Leaves the `kept` best units of a group alive."""
    order = np.argsort(scores[group.units], kind="stable")
    alive[group.units[order[: len(order) - kept]]] = False


def above_all(scores: Scores) -> float:
    """The lowest threshold under which all that may go goes, but the best of each group."""
    return float(np.nextafter(scores[np.isfinite(scores)].max(initial=0.0), np.inf))


def tau_for(
    units: Units, scores: Scores, rounding: Rounding, fits: Callable[[Alive], bool]
) -> tuple[float, Alive] | None:
    """The lowest threshold whose survivors fit, by bisection over the scores; None when not even the highest fits.

    `fits` must be monotone in what survives, as MACs, parameters and bytes are.
    """
    values = np.unique(scores[np.isfinite(scores)])
    if not len(values):
        return None
    candidates = np.append(values, above_all(scores))
    tau = lowest(candidates, lambda each: fits(survivors(units, scores, each, rounding)))
    if tau is None:
        return None
    return tau, given_back(units, scores, survivors(units, scores, tau, rounding), rounding, fits)


def lowest(candidates: NDArray[np.float64], fits: Callable[[float], bool]) -> float | None:
    """The lowest of sorted candidates that fits, by bisection; None when not even the highest does."""
    low, high = 0, len(candidates) - 1
    if not fits(float(candidates[high])):
        return None
    while low < high:
        middle = (low + high) // 2
        if fits(float(candidates[middle])):
            high = middle
        else:
            low = middle + 1
    return float(candidates[low])


def given_back(units: Units, scores: Scores, alive: Alive, rounding: Rounding, fits: Callable[[Alive], bool]) -> Alive:
    """What survives, and as much more as fits: whole blocks leave gaps below what was asked for.

    The group whose best removed unit has the highest score is widened first, by its next step of rounding, until none
    can be.
    """
    alive = alive.copy()
    waiting = {index: group for index, group in enumerate(units.groups) if not alive[group.units].all()}
    while waiting:
        index = max(waiting, key=lambda each: _best_removed(waiting[each], scores, alive))
        group = waiting[index]
        wider = alive.copy()
        wider[group.units] = True
        keep_best(wider, group, scores, rounding.up(group, int(alive[group.units].sum()) + 1))
        wider[scores == -np.inf] &= alive[scores == -np.inf]
        if wider.sum() == alive.sum() or not fits(wider):
            del waiting[index]
            continue
        alive = wider
        if alive[group.units].all():
            del waiting[index]
    return alive


def _best_removed(group: Group, scores: Scores, alive: Alive) -> float:
    return float(scores[group.units[~alive[group.units]]].max())
