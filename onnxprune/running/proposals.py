"""The cut that a round tries: a threshold by what is asked, and by what earlier rounds cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from onnxprune.benchmarking.bench import find_providers
from onnxprune.benchmarking.latency import CORRECTIONS, SECONDS, correct, time_share
from onnxprune.benchmarking.probe import block_size
from onnxprune.choosing.queue import Queue
from onnxprune.choosing.select import Rounding, above_all
from onnxprune.choosing.threshold import (
    EVALUATIONS,
    LEAST_GAIN,
    PATIENCE,
    Move,
    Outcome,
    bisect_tau,
    gap_near,
    histogram,
    initial_tau,
    next_progress,
    published_move,
    reach,
    reaching,
    used,
)
from onnxprune.cutting.cut import cut
from onnxprune.cutting.plan import Plan
from onnxprune.graph.files import memoised
from onnxprune.labels.units import Units
from onnxprune.running.context import ROUNDS, Context, Proposal, Record, State
from onnxprune.running.options import RESOURCES
from onnxprune.running.trials import PROBE_SAMPLES, Found, cut_to, queue_of, without_layers
from onnxprune.scoring.cost import Alive, Cost

SLOWER, CHECK_SECONDS = 1.02, 0.8  # share of the uncut time that isn't chance, and how long it is measured
LITTLE = 0.1  # of what a cut saves, which a gap below its threshold may give away
MEASURED = ("drop_counted", "loss", "drop_before_tuning")


def propose(run: Context, state: State, records: list[Record]) -> Proposal | None:
    """The cut that the next round tries, from what the last ones cost; None when the run is done."""
    history = [outcome_of(record) for record in records]
    if run.targets:
        aim = next_progress(run.options.rounds or 1, history, run.options.schedule)
        if aim is None or (records and records[-1]["accepted"] and records[-1]["out_of_reach"]):
            return None  # done, or as narrow as can be
        compute = lambda: _cut_to(run, state, records, aim)  # noqa: E731
    else:
        failures = sum(not outcome.accepted for outcome in history)
        if len(history) >= (run.options.rounds or ROUNDS) or failures > PATIENCE:
            return None
        compute = lambda: _cut_within(run, state, records)  # noqa: E731
    found: Proposal = memoised(run.round_folder(len(records) + 1) / "proposal.json", compute)
    return found if found["tau"] is not None else None


def _cut_to(run: Context, state: State, records: list[Record], aim: float) -> Proposal:
    """The lowest threshold that brings every targeted resource `aim` of the way to its share."""
    run.listener.stage("choosing a threshold")
    queue = queue_of(run, state)
    shares = {name: target**aim for name, target in run.targets.items()}

    def within(wanted: Mapping[str, float], first: Rounding = queue.rounding) -> Found | None:
        for attempt in (first, Rounding(1)):  # where whole blocks can't meet the target, ragged widths may
            if (found := cut_to(run, state, queue, wanted, attempt)) is not None:
                return found
        return None

    found = within(shares) if "latency" not in shares else _cut_to_time(run, queue, shares, within)
    if found is not None:
        found = found if "latency" in shares else _no_slower(run, found, partial(within, shares))
        before = records[-1]["tau"] if records else initial_tau(queue.candidates)
        reached = ", ".join(f"{100 * share:.0f} % of the {RESOURCES[name]}" for name, share in shares.items())
        moves = [Move("performance", found.tau / max(before, 1e-30), f"the target of this round is {reached}")]
        return proposal_of(found, aim) | _told(queue, before, found, moves)
    run.note("the target is out of reach: cut as far as every layer keeps one channel")
    tau = above_all(queue.scores)
    narrowest = replace(queue, rounding=Rounding(1)).survivors(tau)
    found = Found(tau, Plan({}), queue, narrowest)
    return {**proposal_of(found, 1.0), **_told(queue, tau, found, []), "out_of_reach": True}


def _no_slower(run: Context, found: Found, cut_by: Callable[[Rounding], Found | None]) -> Found:
    """The same cut, unless it makes the model slower here: then, of cuts in other steps of width, the fastest.

    What narrow widths cost hangs on kernels, sizes and machine, so it is measured.
    """
    share = _time_of(run, found, CHECK_SECONDS)
    if share <= SLOWER or run.options.round_to is not None:
        return found
    block, tried = run.rounding.block or block_size(), [(share, found)]
    for step in dict.fromkeys((block, 2 * block, 4 * block, 1)):
        run.listener.progress(
            f"it would take {100 * share:.0f} % of the time: trying widths in steps of {step}", len(tried), 4
        )
        other = cut_by(Rounding(step))
        if other is not None and not any(_same(other, each) for _, each in tried):
            tried.append((_time_of(run, other, CHECK_SECONDS), other))
    best = min(tried, key=lambda each: each[0])
    run.note(
        f"the usual cut would take {100 * share:.0f} % of the uncut model's time"
        + (f"; one with other widths takes {100 * best[0]:.0f} %" if best[1] is not found else ", and so do others")
    )
    return best[1]


def _time_of(run: Context, found: Found, seconds: float = SECONDS) -> float:
    """The measured time of a cut, as a share of the uncut model's."""
    provider, model = find_providers(run.options.providers)[0], cut(found.queue.units, found.alive)[0]
    return time_share(run.source, model, provider, run.options.threads, run.sizes, seconds)


def _same(one: Found, other: Found) -> bool:
    return one.dropped.layers == other.dropped.layers and np.array_equal(one.alive, other.alive)


def _cut_to_time(
    run: Context, queue: Queue, shares: Mapping[str, float], within: Callable[[Mapping[str, float]], Found | None]
) -> Found | None:
    """The cut whose measured time is nearest below its share of the uncut model's."""
    tried, all_layers = dict[float, Found](), queue.layers_under(math.inf)
    narrowest = replace(queue, rounding=Rounding(1)).survivors(above_all(queue.scores))
    without = frozenset(node for each in all_layers for node in each.nodes)
    least = Cost(queue.units, run.target).nanoseconds(narrowest, without) / run.base_costs["latency"]

    def cut_at(way: float) -> tuple[float, float] | None:
        found = within({**shares, "latency": least + way * (1 - least)})
        if found is None:
            return None
        share = _time_of(run, found)
        run.listener.progress(f"measuring a cut: {100 * share:.1f} % of the time", len(tried) + 1, CORRECTIONS)
        tried[share] = found
        return found.tau, share

    chosen = correct(shares["latency"], cut_at)
    return None if chosen is None else tried[chosen[1]]


def proposal_of(found: Found, progress: float | None = None) -> Proposal:
    """A cut as it is recorded: the threshold, the layers that go, and the units of each group that stay.

    Units are told by their place in their group. What was measured is what is cut: a threshold alone would choose
    again.
    """
    groups, alive = found.queue.units.groups, found.alive
    kept = {group.name: np.flatnonzero(alive[group.units]).tolist() for group in groups}
    layers = [name for name, _ in found.dropped.layers]
    return {"tau": found.tau, "layers": layers, "kept": kept} | ({} if progress is None else {"progress": progress})


def alive_of(units: Units, proposal: Proposal) -> Alive:
    """What survives the cut of a proposal for the same model."""
    alive = np.ones(units.count, bool)
    for group in units.groups:
        alive[group.units] = False
        alive[group.units[proposal["kept"][group.name]]] = True
    return alive


@dataclass
class Search:
    """Cuts of one model that are tried before a round where the allowed drop decides."""

    run: Context
    state: State
    records: list[Record]
    tried: int = 0

    def __post_init__(self) -> None:
        self.queue = queue_of(self.run, self.state)
        self.history = [outcome_of(record) for record in self.records]
        self.allowed = self.run.allowed or 0.0
        self._thinner = dict[tuple[str, ...], tuple[Plan, Queue]]()
        rounds, history = self.run.options.rounds or ROUNDS, self.history
        ending = len(history) + 1 >= rounds or len(history) >= PATIENCE
        self.tuned = self.run.epochs > 0 and not (ending and not any(outcome.accepted for outcome in history))
        self.whole = Cost(self.queue.units).macs(np.ones(self.queue.units.count, bool))
        self.failed = _rolled_back(self.run, self.records)
        self.limit = reach(history, self.allowed, self.tuned)

    def at(self, tau: float) -> Found:
        """The cut under a threshold."""
        names = tuple(each.layer.name for each in self.queue.layers_under(tau))
        if names not in self._thinner:
            self._thinner[names] = without_layers(self.run, self.state, self.queue, tau)
        dropped, rest = self._thinner[names]
        return Found(tau, dropped, rest, rest.survivors(tau))

    def drop_at(self, tau: float) -> float:
        """What a cut loses, repaired and measured.

        One that goes more than half of the way, by the logarithm of the MACs, to a cut of the same model that was
        rolled back isn't measured: it loses too much.
        """
        self.tried += 1
        self.run.listener.progress("choosing a threshold", self.tried, EVALUATIONS)
        found = self.at(tau)
        if macs_of(found) < math.sqrt(self.whole * self.failed):
            return float("inf")
        model, step = cut(found.queue.units, found.alive)
        self.run.repair(model, self.state, found.dropped.then(step))
        verdict = self.run.judge.measure(model, PROBE_SAMPLES)
        return verdict.drop if self.tuned else verdict.most  # of luck the round decides, once it is tuned

    @property
    def before(self) -> float:
        """The threshold of the last round; before the first one, what the distribution of the scores says."""
        return (
            self.history[-1].tau if self.history else initial_tau(self.queue.candidates, self.run.options.initial_tau)
        )


def macs_of(found: Found) -> int:
    """The MACs of a cut."""
    return Cost(found.queue.units).macs(found.alive)


def _cut_within(run: Context, state: State, records: list[Record]) -> Proposal:
    """A threshold whose cut costs no more, after repair, than fine-tuning can be hoped to win back."""
    search = Search(run, state, records)
    tau, moves = _published(search) if run.options.controller != "bisect" else _bisected(search)
    most = search.whole * (1 - LEAST_GAIN)
    if tau is not None and (macs_of(found := search.at(tau)) <= most or run.options.controller != "bisect"):
        return proposal_of(found) | _told(search.queue, search.before, found, moves)
    if search.tuned:  # fine-tuning may win back even more: the least cut that is worth a round is tried
        least = cut_to(run, state, search.queue, {"macs": most / run.base_costs["macs"]}, search.queue.rounding)
        if least and macs_of(least) > search.failed:
            moves = [Move("performance", least.tau / max(search.before, 1e-30), "the least cut that is worth a round")]
            return proposal_of(least) | _told(search.queue, search.before, least, moves)
    return {"tau": None}


def _bisected(search: Search) -> tuple[float | None, list[Move]]:
    """The highest threshold whose cut, measured, loses no more than may be hoped to be won back; then a gap near it."""
    tau = bisect_tau(search.queue.candidates, search.drop_at, search.limit)
    if tau is None:
        return None, []
    share = f"{used(search.history[-1], search.allowed):.2f} of the allowance used" if search.history else "measured"
    moves = [Move("performance", tau / max(search.before, 1e-30), share)]
    gap = gap_near(search.queue.candidates, tau) if "distribution" in search.run.options.moves else None
    if gap is not None and not _same(search.at(gap), search.at(tau)) and _gap_serves(search, tau, gap):
        moves.append(Move("distribution", gap / tau, f"gap in the scores at {gap:.3g}"))
        tau = gap
    return tau, moves


def _gap_serves(search: Search, tau: float, gap: float) -> bool:
    """Whether a gap above costs no more than is allowed, or one below gives away little of what is saved."""
    if gap > tau:
        return search.drop_at(gap) <= search.limit
    saved, given_away = (search.whole - macs_of(search.at(each)) for each in (tau, gap))
    return saved - given_away <= LITTLE * saved


def _published(search: Search) -> tuple[float, list[Move]]:
    """A threshold by the published rules; where hardly anything lies under it any more, one that reaches the next."""
    options, history = search.run.options, search.history
    first = history[0].tau if history else search.before
    tau, move = published_move(history, first, search.allowed, options.alpha, options.controller)
    moves = [move]
    if "distribution" in options.moves and history and history[-1].accepted:
        raised = reaching(search.queue.candidates, tau, 1 - used(history[-1], search.allowed))
        lost = [outcome.tau for outcome in history if not outcome.accepted]
        raised = min([raised, *(math.sqrt(tau * each) for each in lost)])  # half of the way to what was rolled back
        if raised > tau:
            moves.append(Move("distribution", raised / max(tau, 1e-30), "few scores lie below that"))
            tau = raised
    return tau, moves


def _told(queue: Queue, before: float, found: Found, moves: list[Move]) -> Proposal:
    """What a round records of its threshold: where it came from, what moved it, and the scores around it."""
    layers = [name for name, _ in found.dropped.layers]
    if layers:
        moves = [*moves, Move("structure", 1.0, f"redundant: {', '.join(layers)}")]
    return {
        "before": before,
        "moves": [each.to_json() for each in moves],
        "scores": histogram(queue.candidates, found.tau),
        "removed": _removed(found),
        "removed_layers": {name: queue.prices[name] for name in layers},
    }


def _removed(found: Found) -> dict[str, dict[str, list[Any]]]:
    """The units that a cut takes, by group: their places in it, and their scores; r is a score by tau."""
    units, alive, scores = found.queue.units, found.alive, found.queue.scores
    gone = {group.name: np.flatnonzero(~alive[group.units]) for group in units.groups}
    return {
        group.name: {
            "places": gone[group.name].tolist(),
            "scores": scores[group.units[gone[group.name]]].tolist(),
        }
        for group in units.groups
        if len(gone[group.name])
    }


def _rolled_back(run: Context, records: list[Record]) -> float:
    """The most MACs of a cut that was rolled back since the last one was accepted, of those that were measured."""
    since = takewhile(lambda record: not record["accepted"], reversed(records))
    return max((record["macs_share"] or 0.0 for record in since), default=0.0) * run.base_costs["macs"]


def outcome_of(record: Record) -> Outcome:
    """What the controllers learn from a round; what couldn't be measured counts as infinitely bad."""
    worst = {name: float("inf") if record.get(name) is None else record[name] for name in MEASURED}
    drop, loss, before = worst.values()
    return Outcome(record["tau"], drop, loss, record["accepted"], record["progress"], before)
