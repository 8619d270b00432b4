"""Prices: what each unit loses in quality for what it saves in cost, from a few cuts of each group that were measured.

A cut that loses least for what it must save is, by Lagrange, a threshold on the ratio of the two: one for the units of
all groups, and for whole layers. Both numbers are shares, of what the uncut model explains and of what it costs, so
that a price has no unit and means the same in every model and in every round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune.labels.units import Group, Units
from onnxprune.scoring.cost import Spending
from onnxprune.scoring.score import Scores, rank

TRIED = (0.5, 0.9)  # shares of a group's units that are removed to measure what that costs
LEAST_LOSS = 1e-6  # of the spread of the outputs: less can't be told from rounding
LEAST_SAVED = 1e-12
LEAST_WORTH = 1e-9  # of the best unit's of a group, so that units of no worth, too, share what was measured


def kept_at(group: Group, share: float) -> int:
    """How many units of a group stay when about this share of them goes; at least one."""
    return max(1, len(group.units) - round(share * len(group.units)))


def unit_losses(units: Units, raw: Scores, curves: Mapping[str, Sequence[float]]) -> Scores:
    """What the removal of each unit adds to the loss, lowest of its group first; infinity for what can't be removed.

    `raw` ranks the units of each group and says how much more the one is worth than the other; `curves` have what was
    lost by each group when shares of `TRIED` went. Groups without a curve cost what the median group does.
    """
    losses, factors = np.full(units.count, np.inf), list[float]()
    unknown = list[tuple[Group, Scores]]()
    for group in units.groups:
        worth = raw[group.units] * len(group.units) / (len(group.units) - rank(raw[group.units]))
        if not np.isfinite(worth).all() or group.name not in curves:
            unknown.append((group, worth))
            continue
        losses[group.units] = _along(group, raw, worth, curves[group.name], factors)
    for group, worth in unknown:
        losses[group.units] = worth * (float(np.median(factors)) if factors else 1.0)
    return losses


def _along(group: Group, raw: Scores, worth: Scores, curve: Sequence[float], factors: list[float]) -> Scores:
    """What was measured, shared out among the units in proportion to their worth."""
    order = np.argsort(raw[group.units], kind="stable")
    ordered = np.maximum(
        worth[order], LEAST_WORTH * max(float(worth.max()), LEAST_SAVED)
    )  # what is lost falls to somebody
    found, start, lost, factor = np.zeros(len(order)), 0, 0.0, 0.0
    for share, loss in zip(TRIED, curve, strict=True):
        end = len(order) - kept_at(group, share)
        if end > start:
            factor = max(loss - lost, LEAST_LOSS) / max(float(ordered[start:end].sum()), 1e-30)
            found[start:end] = factor * ordered[start:end]
            start, lost = end, max(loss, lost)
    found[start:] = factor * ordered[start:] if factor else np.inf
    factors.append(max(lost, LEAST_LOSS) / max(float(ordered[:start].sum()), 1e-30))
    result = np.empty(len(order))
    result[order] = np.maximum.accumulate(found)  # the next one costs no less
    return result


def unit_prices(units: Units, losses: Scores, spending: Spending) -> Scores:
    """What each unit loses for each share of the cost that it saves; infinity for what can't be removed."""
    prices, everything = np.full(units.count, np.inf), np.ones(units.count, bool)
    whole = spending(everything)
    for group in units.groups:
        rest = everything.copy()
        rest[group.units[1:]] = False
        saved = (whole - spending(rest)) / max(len(group.units) - 1, 1)
        prices[group.units] = losses[group.units] / max(saved, LEAST_SAVED)
    return prices
