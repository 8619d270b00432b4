"""Dynamic thresholds: which tau the next round cuts at, moved by what the last rounds cost.

A unit goes when score / tau < 1. Both controllers start from the distribution of the scores and are pure functions of
the rounds so far, so a resumed run repeats its decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.score import Scores

REACH = 3.0  # points lost before fine-tuning for each point allowed after it, until the rounds of a run show better
MOST_REACH = 6.0
CAUTION = 0.8  # of what the rounds so far showed that fine-tuning wins back
PATIENCE = 2  # rounds rolled back in a row before a run stops
EVALUATIONS = 8  # cuts tried and measured when a threshold is bisected
LEAST_GAIN = 0.02  # share of MACs that a round must save to be worth it


@dataclass(frozen=True)
class Outcome:
    """What a round did: the threshold, the points lost against the uncut model, the loss, whether it was kept.

    `progress` is how far its cut went on the way to the targets, 0 to 1, on a logarithmic scale. `before` is the points
    lost before fine-tuning, NaN when unknown.
    """

    tau: float
    drop: float
    loss: float
    accepted: bool
    progress: float
    before: float = float("nan")


def initial_tau(scores: Scores) -> float:
    """Mean minus one standard deviation of the scores (Guo et al. 2016, Dynamic Network Surgery, section 3.2)."""
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return 0.0
    return float(max(finite.mean() - finite.std(), np.quantile(finite, 0.05)))


def published_tau(tau: float, loss: float, allowed: float, alpha: float = 0.9) -> float:
    """The published rule, `tau' = alpha tau + (1 - alpha) L / eps`.

    L is the loss on calibration data, eps the tolerated drop in points, alpha the decay.
    """
    return alpha * tau + (1 - alpha) * loss / max(allowed, 1e-9)


def reach(history: Sequence[Outcome], allowed: float, tuned: bool) -> float:
    """How many points the next cut may cost before fine-tuning.

    Without fine-tuning just what is allowed. With it, as many times more as the worst round so far won back, with some
    caution; half of that for every round that was rolled back without a measurement.
    """
    if not tuned:
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


def next_progress(rounds: int, history: Sequence[Outcome]) -> float | None:
    """How far the next round goes on the way to the targets, in equal steps; None when done or out of patience.

    After a round that was rolled back the next one goes half of the way from what is accepted.
    """
    reached = max([outcome.progress for outcome in history if outcome.accepted], default=0.0)
    failed = [outcome.progress for outcome in history if not outcome.accepted]
    if reached >= 1 or len(failed) > PATIENCE or len(history) >= rounds + PATIENCE:
        return None
    beyond = [progress for progress in failed if progress > reached]
    if beyond:
        return (reached + min(beyond)) / 2
    return min(1.0, reached + (1 - reached) / max(1, rounds - len(history)))
