"""The cut that a round tries: a threshold by what is asked, and by what earlier rounds cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import takewhile

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
    Outcome,
    bisect_tau,
    initial_tau,
    next_progress,
    published_tau,
    reach,
)
from onnxprune.cutting.cut import cut
from onnxprune.cutting.plan import Plan
from onnxprune.graph.files import memoised
from onnxprune.labels.units import Units
from onnxprune.running.context import ROUNDS, Context, Proposal, Record, State
from onnxprune.running.trials import PROBE_SAMPLES, Found, cut_to, queue_of, without_layers
from onnxprune.scoring.cost import Alive, Cost

SLOWER, CHECK_SECONDS = 1.02, 0.8  # share of the uncut time that isn't chance, and how long it is measured
MEASURED = ("drop_counted", "loss", "drop_before_tuning")


def propose(run: Context, state: State, records: list[Record]) -> Proposal | None:
    """The cut that the next round tries, from what the last ones cost; None when the run is done."""
    history = [outcome_of(record) for record in records]
    if run.targets:
        aim = next_progress(run.options.rounds or 1, history, run.options.schedule)
        if aim is None or (records and records[-1]["accepted"] and records[-1]["out_of_reach"]):
            return None  # done, or as narrow as can be
        compute = lambda: _cut_to(run, state, aim)  # noqa: E731
    else:
        failures = sum(not outcome.accepted for outcome in history)
        if len(history) >= (run.options.rounds or ROUNDS) or failures > PATIENCE:
            return None
        compute = lambda: _cut_within(run, state, records)  # noqa: E731
    found: Proposal = memoised(run.round_folder(len(records) + 1) / "proposal.json", compute)
    return found if found["tau"] is not None else None


def _cut_to(run: Context, state: State, aim: float) -> Proposal:
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
        return proposal_of(found if "latency" in shares else _no_slower(run, found, partial(within, shares)), aim)
    run.note("the target is out of reach: cut as far as every layer keeps one channel")
    tau = above_all(queue.scores)
    narrowest = replace(queue, rounding=Rounding(1)).survivors(tau)
    return {**proposal_of(Found(tau, Plan({}), queue, narrowest), 1.0), "out_of_reach": True}


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


def _cut_within(run: Context, state: State, records: list[Record]) -> Proposal:
    """A threshold whose cut costs no more, after repair, than fine-tuning can be hoped to win back.

    It goes at most half of the way, by the logarithm of the MACs, to a cut of the same model that was rolled back, or
    where nothing lies in between as little further as can be.
    """
    queue, way = queue_of(run, state), dict[tuple[str, ...], tuple[Plan, Queue]]()
    history, allowed = [outcome_of(record) for record in records], run.allowed or 0.0

    def found_at(tau: float) -> Found:
        names = tuple(each.layer.name for each in queue.layers_under(tau))
        if names not in way:
            way[names] = without_layers(run, state, queue, tau)
        dropped, rest = way[names]
        return Found(tau, dropped, rest, rest.survivors(tau))

    def macs(found: Found) -> int:
        return Cost(found.queue.units).macs(found.alive)

    if run.options.controller == "published":
        last = history[-1] if history else None
        moved = initial_tau(queue.scores, run.options.initial_tau) if last is None else _moved(run, last)
        moved *= 0.5 ** sum(not o.accepted for o in history)
        return proposal_of(found_at(moved))
    tried = 0

    def drop_at(tau: float) -> float:
        nonlocal tried
        tried += 1
        run.listener.progress("choosing a threshold", tried, EVALUATIONS)
        found = found_at(tau)
        if macs(found) < fewest:
            return float("inf")
        model, step = cut(found.queue.units, found.alive)
        run.repair(model, state, found.dropped.then(step))
        verdict = run.judge.measure(model, PROBE_SAMPLES)
        return verdict.drop if tuned else verdict.most  # of luck the round decides, once it is tuned

    ending = len(history) + 1 >= (run.options.rounds or ROUNDS) or len(history) >= PATIENCE
    tuned = run.epochs > 0 and not (ending and not any(outcome.accepted for outcome in history))
    whole = Cost(queue.units).macs(np.ones(queue.units.count, bool))
    most, failed = whole * (1 - LEAST_GAIN), _rolled_back(run, records)
    fewest = math.sqrt(whole * failed)
    tau = bisect_tau(queue.candidates, drop_at, reach(history, allowed, tuned))
    if tau is not None and macs(found := found_at(tau)) <= most:
        return proposal_of(found)
    if tuned:  # fine-tuning may win back even more: the least cut that is worth a round is tried
        least = cut_to(run, state, queue, {"macs": most / run.base_costs["macs"]}, queue.rounding)
        if least and macs(least) > failed:
            return proposal_of(least)
    return {"tau": None}


def _rolled_back(run: Context, records: list[Record]) -> float:
    """The most MACs of a cut that was rolled back since the last one was accepted, of those that were measured."""
    since = takewhile(lambda record: not record["accepted"], reversed(records))
    return max((record["macs_share"] or 0.0 for record in since), default=0.0) * run.base_costs["macs"]


def _moved(run: Context, last: Outcome) -> float:
    if not math.isfinite(last.loss):  # of a round whose training failed
        return last.tau
    return published_tau(last.tau, last.loss, run.allowed or 0.0, run.options.alpha)


def outcome_of(record: Record) -> Outcome:
    """What the controllers learn from a round; what couldn't be measured counts as infinitely bad."""
    worst = {name: float("inf") if record.get(name) is None else record[name] for name in MEASURED}
    drop, loss, before = worst.values()
    return Outcome(record["tau"], drop, loss, record["accepted"], record["progress"], before)
