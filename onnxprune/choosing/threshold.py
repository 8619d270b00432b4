"""Dynamic thresholds: which tau the next round cuts at, and what moved it there.

A unit goes when score / tau < 1. Three things move tau: performance, what the rounds so far cost of what is allowed;
distribution, where the scores part; structure, what cuts of each group and layer were measured to lose, which is in
the scores themselves (`scoring/prices.py`). All are pure functions of the rounds so far, so a resumed run repeats its
decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, Final, Literal, get_args

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.scoring.score import Scores

Schedule = Literal["even", "cubic"]
Controller = Literal["bisect", "published", "published-text", "recursive", "recursive-text"]
CONTROLLERS: Final[tuple[Controller, ...]] = get_args(Controller)
MoveName = Literal["performance", "distribution", "structure"]
MOVES: Final[tuple[MoveName, ...]] = get_args(MoveName)

REACH = 3.0  # points lost before fine-tuning for each point allowed after it, until the rounds of a run show better
MOST_REACH = 6.0
CAUTION = 0.8  # of what the rounds so far showed that fine-tuning wins back
PATIENCE = 2  # rounds that may be rolled back before a run stops
EVALUATIONS = 8  # cuts tried and measured when a threshold is bisected
LEAST_SHARE = 0.05  # of the units, which the first threshold takes at least
MOST_SHARE = 0.3  # of the units that are left, which a later one reaches for where nothing of what is allowed was used
CLEAR = 3.0  # times as large: scores that part so far from one to the next have a gap between them
NEAR_GAP = 4.0  # times tau, up or down, within which a gap moves it
FAR = 100  # times from the first guess, which then says nothing
BINS = 24  # of the histogram of scores that a round records
WIDEST = 40  # characters of a bar of it
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


@dataclass(frozen=True)
class Move:
    """What moved a threshold: its name, what tau was multiplied with, and on what evidence."""

    name: MoveName
    factor: float
    evidence: str

    def to_json(self) -> dict[str, Any]:
        """The move as JSON."""
        return asdict(self)


def said(before: float, after: float, moves: Sequence[Move]) -> str:
    """A round's moves in words."""
    parts = [each.evidence + (f" (x{each.factor:.2f})" if 5e-3 < abs(each.factor - 1) < FAR else "") for each in moves]
    return f"tau {before:.3g} -> {after:.3g}: {', '.join(parts)}"


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
    "std": lambda scores: float(scores.std()),
    "quantile": _quantile,
    "energy": _energy,
    "otsu": _otsu,
}


def check_initial(rule: str) -> None:
    """Raises `UsageError` for what is no rule for a first threshold."""
    name, _, rate = rule.partition(":")
    known = name in INITIAL and (not rate or (_is_number(rate) and 0 <= float(rate) < 1))
    if not known and not (_is_number(rule) and float(rule) > 0):
        raise UsageError(
            f"--initial-tau {rule}: there is none; known: {', '.join(INITIAL)}, one of them and a rate (mean:0.1), or "
            "a number above 0"
        )


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def initial_tau(scores: Scores, rule: str = "deviation") -> float:
    """The first threshold: a number, or from the distribution of all scores that are finite; 0 where there are none.

    With a rate it is lowered by that share: `mean:0.1` is `theta = mean(f) (1 - rate)`.
    """
    if _is_number(rule):
        return float(rule)
    finite, (name, _, rate) = scores[np.isfinite(scores)], rule.partition(":")
    return INITIAL[name](finite) * (1 - float(rate or 0)) if len(finite) else 0.0


def used(outcome: Outcome, allowed: float) -> float:
    """The share of what is allowed that a round used: 1 is just what is allowed, 2 stands for twice that and more."""
    if not np.isfinite(outcome.drop):
        return 2.0
    return float(np.clip(outcome.drop / allowed, 0, 2)) if allowed > 0 else 2.0 * (outcome.drop > 0)


def published_tau(first: float, last: float, share: float, alpha: float, rule: Controller = "published") -> float:
    """The published rule, `tau = tau_0 alpha + (1 - alpha) L / eps`, with the share used of it for L / eps.

    Tau is counted in first thresholds, so that both terms have one unit. As printed a larger loss gives a larger
    threshold (`published`); the text around it says the opposite, that less goes when quality falls
    (`published-text`, with 2 - L / eps: both agree where just what is allowed was used). Anchored to the first
    threshold, as printed, or to the `last` one (`recursive`, `recursive-text`).
    """
    anchor = first if rule.startswith("published") else last
    return alpha * anchor + (1 - alpha) * (2 - share if rule.endswith("-text") else share) * first


def published_move(
    history: Sequence[Outcome], first: float, allowed: float, alpha: float, rule: Controller
) -> tuple[float, Move]:
    """The threshold before the next round's distribution is looked at, and the move that led to it.

    Rounds that were rolled back since the last one was accepted halve it, each.
    """
    if not history:
        return first, Move("performance", 1.0, "the first threshold, from the distribution of the scores")
    last, failed = history[-1], len(list(takewhile(lambda each: not each.accepted, reversed(history))))
    halved = 0.5 ** (failed if rule.startswith("published") else min(failed, 1))
    tau, share = published_tau(first, last.tau, used(last, allowed), alpha, rule) * halved, used(last, allowed)
    evidence = f"{share:.2f} of the allowance used" + (f", {failed} rounds rolled back" if failed else "")
    return tau, Move("performance", tau / max(last.tau, 1e-30), evidence)


def reaching(scores: Scores, tau: float, room: float) -> float:
    """A threshold under which enough of the units go: the more, the more `room` there is, of what is allowed.

    Once all below the first threshold are gone, a rule that stays near it would cut nothing any more.
    """
    finite = scores[np.isfinite(scores)]
    share = max(LEAST_SHARE, MOST_SHARE * room)
    return max(tau, float(np.quantile(finite, share))) if len(finite) else tau


def gap_near(scores: Scores, tau: float) -> float | None:
    """The middle of the widest gap between scores near tau, where it is clear: what lies in a gap is cut by any tau.

    None where there is none.
    """
    values = np.unique(scores[np.isfinite(scores) & (scores > 0)])
    if len(values) < 2:
        return None
    low, high = values[:-1], values[1:]
    ratios = np.where((high >= tau / NEAR_GAP) & (low <= tau * NEAR_GAP), high / low, 0.0)
    best = int(np.argmax(ratios))
    return float(np.sqrt(low[best] * high[best])) if ratios[best] >= CLEAR else None


def histogram(scores: Scores, tau: float) -> dict[str, Any]:
    """Edges and counts of the scores, evenly on a logarithmic scale, and tau, as a round records them."""
    values = scores[np.isfinite(scores) & (scores > 0)]
    if not len(values):
        return {"edges": [], "counts": [], "tau": tau, "below": 0}
    edges = np.geomspace(values.min(), max(values.max(), values.min() * (1 + 1e-9)), BINS + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    below = int((scores[np.isfinite(scores)] < tau).sum())
    return {"edges": edges.tolist(), "counts": counts.tolist(), "tau": tau, "below": below}


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


def drawn(scores: dict[str, Any]) -> str:
    """A histogram as lines of text, with tau where it lies."""
    edges, counts, tau = scores["edges"], scores["counts"], scores["tau"]
    most, marked, lines = max(counts, default=1), False, [f"scores, {scores['below']} of {sum(counts)} below tau"]
    for edge, upper, count in zip(edges, edges[1:], counts, strict=False):
        here = not marked and tau <= upper
        marked = marked or here
        bar = "#" * math.ceil(WIDEST * count / most)
        lines.append(f"{edge:>10.3g} {bar:<{WIDEST}} {count:>6}" + (f"  <- tau {tau:.3g}" if here else ""))
    return "\n".join(lines if marked or not counts else [*lines, f"{'':>10} tau {tau:.3g} lies above all"])


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
