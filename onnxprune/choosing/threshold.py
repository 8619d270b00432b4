"""Dynamic thresholds: which tau the next round cuts at, moved by what the last rounds cost.

A unit goes when score / tau < 1. Both controllers start from the distribution of the scores and are pure functions of
the rounds so far, so a resumed run repeats its decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxprune.scoring.score import Scores

Schedule = Literal["even", "cubic"]

REACH = 3.0  # points lost before fine-tuning for each point allowed after it, until the rounds of a run show better
MOST_REACH = 6.0
CAUTION = 0.8  # of what the rounds so far showed that fine-tuning wins back
PATIENCE = 2  # rounds that may be rolled back before a run stops
EVALUATIONS = 8  # cuts tried and measured when a threshold is bisected
LEAST_SHARE = 0.05  # of the units, which the first threshold takes at least
HYSTERESIS = 0.02  # relative moves of tau that aren't made
LEAST_GAIN = 0.02  # share of MACs that a round must save to be worth it


@dataclass(frozen=True)
class Outcome:
    """What a round did: the threshold, the points that count as lost, the loss, whether kept.

    `progress` is how far its cut went on the way to the targets, 0 to 1, on a logarithmic scale. `before` is the points
    lost before fine-tuning, NaN when unknown.
    """

    tau: float
    drop: float
    loss: float
    accepted: bool
    progress: float
    before: float = float("nan")


def _deviation(scores: Scores) -> float:
    """Mean minus one standard deviation (Guo et al. 2016, Dynamic Network Surgery, section 3.2)."""
    return float(max(scores.mean() - scores.std(), np.quantile(scores, LEAST_SHARE)))


def _quantile(scores: Scores) -> float:
    """A fifth of the units lies below."""
    return float(np.quantile(scores, 0.2))


def _energy(scores: Scores) -> float:
    """What lies below holds a twentieth of the sum of all scores."""
    ordered = np.sort(scores)
    return float(ordered[np.searchsorted(np.cumsum(ordered), 0.05 * ordered.sum())])


def _otsu(scores: Scores) -> float:
    """Parts the scores into two classes of the least variance within (Otsu 1979, equation 12)."""
    ordered, below = np.sort(scores), np.arange(1, len(scores))
    sums = np.cumsum(ordered)[:-1]
    means = sums / below, (ordered.sum() - sums) / (len(scores) - below)
    between = below * (len(scores) - below) * (means[1] - means[0]) ** 2
    return float(ordered[int(np.argmax(between)) + 1]) if len(scores) > 1 else float(ordered[0])


INITIAL: dict[str, Callable[[Scores], float]] = {
    "deviation": _deviation,
    "mean": lambda scores: float(scores.mean()),
    "quantile": _quantile,
    "energy": _energy,
    "otsu": _otsu,
}


def initial_tau(scores: Scores, rule: str = "deviation") -> float:
    """The first threshold, from the distribution of all scores that are finite; 0 where there are none."""
    finite = scores[np.isfinite(scores)]
    return INITIAL[rule](finite) if len(finite) else 0.0


def published_tau(tau: float, loss: float, allowed: float, alpha: float = 0.9) -> float:
    """The published rule, `tau' = alpha tau + (1 - alpha) L / eps`.

    L is the loss on calibration data, eps the tolerated drop in points, alpha the decay. Moves of less than a fiftieth
    are not made (hysteresis), so that noise in the loss doesn't move the threshold.
    """
    moved = alpha * tau + (1 - alpha) * loss / max(allowed, 1e-9)
    return tau if abs(moved - tau) < HYSTERESIS * abs(tau) else moved


def reach(history: Sequence[Outcome], allowed: float, tuned: bool) -> float:
    """How many points the next cut may cost before fine-tuning.

    Without fine-tuning just what is allowed. With it, as many times more as the worst round so far won back, with some
    caution; half of that for every round that was rolled back without a measurement.
    """
    if not tuned or not allowed:
        return allowed
    measured = [outcome for outcome in history if np.isfinite(outcome.before) and np.isfinite(outcome.drop)]
    gains = [outcome.before / max(outcome.drop, allowed / MOST_REACH) for outcome in measured]
    factor = CAUTION * min(gains) if gains else REACH
    blind = sum(not outcome.accepted for outcome in history) - sum(not outcome.accepted for outcome in measured)
    return allowed * float(np.clip(factor / 2**blind, 1.0, MOST_REACH))


def bisect_tau(
    scores: Scores, drop_at: Callable[[float], float], allowed: float, evaluations: int = EVALUATIONS
) -> float | None:
    """The highest threshold whose measured drop stays within `allowed`, by bisection over the ranks of the scores.

    `drop_at(tau)` cuts, repairs and measures; it is called at most `evaluations` times and is monotone up to noise.
    None when even the first units cost too much.
    """
    candidates = np.unique(scores[np.isfinite(scores)])
    if not len(candidates):
        return None
    candidates = np.append(candidates[1:], np.nextafter(candidates[-1], np.inf))
    low, high, best = 0, len(candidates) - 1, None
    for _ in range(evaluations):
        if low > high:
            break
        middle = (low + high) // 2
        if drop_at(float(candidates[middle])) <= allowed:
            best, low = float(candidates[middle]), middle + 1
        else:
            high = middle - 1
    return best


def next_progress(rounds: int, history: Sequence[Outcome], schedule: Schedule = "even") -> float | None:
    """How far the next round goes on the way to the targets; None when done or out of patience.

    In equal steps, or `cubic`: `1 - (1 - t/n)^3` after round t of n (Zhu and Gupta 2017, To prune, or not to prune,
    equation 1), most in the first rounds. After a round that was rolled back the next one goes half of the way from
    what is accepted.
    """
    reached = max([outcome.progress for outcome in history if outcome.accepted], default=0.0)
    failed = [outcome.progress for outcome in history if not outcome.accepted]
    if reached >= 1 or len(failed) > PATIENCE or len(history) >= rounds + PATIENCE:
        return None
    beyond = [progress for progress in failed if progress > reached]
    if beyond:
        return (reached + min(beyond)) / 2
    left = max(1, rounds - len(history))
    if schedule == "cubic":
        return 1 - (1 - 1 / left) ** 3 * (1 - reached)
    return min(1.0, reached + (1 - reached) / left)
