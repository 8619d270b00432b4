"""Trials before the first round: the same cut in several ways, repaired and measured, and units scored as they tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onnxprune.choosing.layers import Layer, check_norm, drop_layers, free_layers, layer_norms
from onnxprune.choosing.queue import Queue, priced_layers
from onnxprune.choosing.select import Rounding, bounded, tau_for
from onnxprune.cutting.cut import cut
from onnxprune.cutting.plan import Plan
from onnxprune.errors import ModelError, UsageError
from onnxprune.graph.files import memoised
from onnxprune.labels.units import Units, chosen_units
from onnxprune.running.context import TRIED_ON, Context, State
from onnxprune.running.options import RunScope
from onnxprune.running.pricing import losses_of_groups, losses_of_layers
from onnxprune.scoring.activations import ACTIVATION_CRITERIA
from onnxprune.scoring.cost import Alive, Cost
from onnxprune.scoring.gradients import GRADIENT_CRITERIA
from onnxprune.scoring.prices import unit_losses, unit_prices
from onnxprune.scoring.score import normalise_scores, score_units

DATA_CRITERIA = {**ACTIVATION_CRITERIA, **GRADIENT_CRITERIA}
AUTO: Final = "auto"
LINED_UP_BY = "l2"  # rows are sorted before the contest, by one criterion
BETWEEN = ", "  # between the parts of the name of a way to choose
CONTESTANTS = ("obs", "flap", "l2")
FIRST_SCOPE: Final = "gradual"  # in which criteria are compared
UNMEASURED: Final = "global"  # the scope where nothing can be measured
TRIED_AT = {"macs": 0.5}  # where an allowed drop alone decides
PROBE_SAMPLES = 1024
LOW_FIDELITY = 0.5  # share of the spread that is lost, from which made-up inputs tell nothing
ALIKE = 6  # decimals to which losses are told apart
UNKNOWN = 1e30  # a loss that JSON can hold


@dataclass(frozen=True)
class Way:
    """How what goes is chosen: units are scored by a criterion, compared in a scope, and layers go with them or not."""

    criterion: str
    scope: RunScope
    layers: bool = False

    def __str__(self) -> str:
        return BETWEEN.join((self.criterion, self.scope, *(["with layers"] if self.layers else [])))


def chosen_way(run: Context) -> Way:
    """How what goes is chosen: as named, or the winner of the contest."""
    losses, ways = contest(run), _ways(run)
    if not losses:
        return ways[0]
    tried = [way for way in ways if str(way) in losses]
    return min(tried, key=lambda way: (round(losses[str(way)], ALIKE), not way.layers))  # fewer operators run faster


def _ways(run: Context) -> list[Way]:
    """What the options leave the choice between. Without data weights alone tell."""
    options = run.options
    criteria: tuple[str, ...] = (options.criterion,)
    if options.criterion == AUTO:
        criteria = CONTESTANTS if run.train is not None else (LINED_UP_BY,)
    scopes: tuple[RunScope, ...] = (UNMEASURED,) if run.calibration is None else (FIRST_SCOPE, "priced")
    scopes = scopes if options.prices else scopes[:1]
    scopes = scopes if options.scope == AUTO else (options.scope,)
    layers = (False, True) if run.layers and free_layers(run.baseline, options.protect) else (False,)
    return [Way(*each) for each in product(criteria, scopes, layers) if each[1] == "priced" or not each[2]]


def contest(run: Context) -> dict[str, float]:
    """Where there is a choice of ways, the loss after the same cut each way, repaired, before fine-tuning."""
    if len(_ways(run)) == 1:
        return {}
    found: dict[str, float] = memoised(run.folder / "contest.json", partial(_hold_contest, run))
    return found


def uncut(run: Context) -> State:
    """What the first round starts from."""
    return State(run.baseline, Plan({}, reordered=run.moved))


def _tells_nothing(run: Context, losses: Mapping[str, float]) -> bool:
    """Whether losses are on inputs that were made up, and so high there that they decide nothing."""
    return not run.judge.measured and min(losses.values()) > LOW_FIDELITY


def _hold_contest(run: Context) -> dict[str, float]:
    """Of the criteria in one scope, then of the other ways with the best of them."""
    ways, losses = _ways(run), dict[str, float]()
    first = [way for way in ways if way.scope == ways[0].scope and not way.layers]
    rest = len(ways) // len(first) - 1

    def hold(some: Iterable[Way]) -> None:
        for way in some:
            run.listener.progress(f"trying {way}", len(losses) + 1, len(first) + rest)
            losses[str(way)] = _trial(run, way)

    hold(first)
    best = min(first, key=lambda way: losses[str(way)])
    hold(way for way in ways if way.criterion == best.criterion and way not in first)
    losses = {name: loss for name, loss in losses.items() if loss < UNKNOWN} or {str(best): UNKNOWN}
    run.note(f"ways to choose by loss: {ranked(losses)}")
    usual = str(ways[0])  # without data the only criterion
    return {usual: losses[usual]} if usual in losses and _tells_nothing(run, losses) else losses


def _trial(run: Context, way: Way) -> float:
    """The loss after a cut to the targets, or to half of the MACs, and repair; `UNKNOWN` if it can't be made."""
    state = uncut(run)
    try:
        queue = queue_of(run, state, way)
    except ModelError:
        return UNKNOWN  # it needs what the model hasn't
    found = cut_to(run, state, queue, run.targets or TRIED_AT, queue.rounding, way)
    if found is None:
        return UNKNOWN
    model, step = cut(found.queue.units, found.alive)
    run.repair(model, state, found.dropped.then(step), share=TRIED_ON)
    return run.judge.measure(model, PROBE_SAMPLES).loss


@dataclass(frozen=True)
class Found:
    """A cut that was chosen: layers that go first, then what stays of the units of the rest."""

    tau: float
    dropped: Plan
    queue: Queue
    alive: Alive


def cut_to(
    run: Context, state: State, queue: Queue, shares: Mapping[str, float], rounding: Rounding, way: Way | None = None
) -> Found | None:
    """The lowest threshold under which no resource is more than its share of the uncut model's; None where none is."""
    limits = {name: share * run.base_costs[name] for name, share in shares.items()}
    queue = replace(queue, rounding=rounding)
    measures, dropped = Cost(queue.units, run.target).measures, Plan({})
    if queue.layers:
        tau = queue.tau_within(lambda alive, without: all(measures[n](alive, without) <= limits[n] for n in limits))
        if tau is None:
            return None
        dropped, queue = without_layers(run, state, queue, tau, way)
        measures = Cost(queue.units, run.target).measures
    scores, units = queue.scores, queue.units
    chosen = tau_for(units, scores, rounding, lambda alive: all(measures[n](alive) <= limits[n] for n in limits))
    return None if chosen is None else Found(chosen[0], dropped, queue, chosen[1])


def without_layers(run: Context, state: State, queue: Queue, tau: float, way: Way | None = None) -> tuple[Plan, Queue]:
    """The layers whose price is under a threshold as a plan, and the queue of the model without them."""
    gone = queue.layers_under(tau)
    if not gone:
        return Plan({}), replace(queue, layers=())
    model, dropped = drop_layers(state.model, [each.layer.name for each in gone])
    thinner = State(model, state.plan.then(dropped), state.tuned)
    return dropped, replace(queue_of(run, thinner, way, queue.curves), rounding=queue.rounding)


def queue_of(
    run: Context, state: State, way: Way | None = None, known: Mapping[str, Sequence[float]] | None = None
) -> Queue:
    """What may go of a model, in the order in which the run takes it, or another way would.

    Where layers of it have just been dropped what was `known` of its groups isn't measured again, and no more layers
    go.
    """
    options, way = run.options, way or chosen_way(run)
    units = chosen_units(state.model, options.granularity, options.kinds, options.protect)
    raw = _raw_scores(run, units, way.criterion)
    sizes = {name: size for name, (size, _) in run.origin.items()}
    if way.scope != "priced":
        scores = normalise_scores(units, raw, way.scope, run.origin)
        by_norm = _by_norm(run, state, units) if options.layer_norm is not None and known is None else {}
        return Queue(units, bounded(units, scores, options.keep, sizes), run.rounding, **by_norm)
    layers = free_layers(state.model, options.protect) if way.layers and known is None else []
    new = tuple(group for group in units.groups if group.name not in (known or {}))
    curves = {**(known or {}), **losses_of_groups(run, state, replace(units, groups=new), raw)}
    spending = run.spending(units)
    losses = unit_losses(units, raw, curves)
    scores = bounded(units, unit_prices(units, losses, spending), options.keep, sizes)
    priced = priced_layers(units, layers, losses_of_layers(run, state, layers) if layers else {})
    most = _most_layers(run, state, layers)
    return Queue(units, scores, run.rounding, losses, priced, spending, most, curves=curves)


def _most_layers(run: Context, state: State, layers: Sequence[Layer]) -> int:
    """How many of these layers may go, beside those that went already."""
    return len(layers) if run.layers == "auto" else max(0, int(run.layers) - len(state.plan.layers))


def _by_norm(run: Context, state: State, units: Units) -> dict[str, Any]:
    """Of a queue, layers that go by the norm of their weights."""
    layers, (order, share) = free_layers(state.model, run.options.protect), check_norm(run.options.layer_norm or "")
    norms = layer_norms(state.model, layers, order)
    priced = priced_layers(units, layers, dict.fromkeys(norms, 0.0))
    least = None if share is None else share * max(norms.values(), default=0.0)
    return {"layers": priced, "norms": norms, "least_norm": least, "most": _most_layers(run, state, layers)}


def _raw_scores(run: Context, units: Units, criterion: str) -> NDArray[np.float64]:
    if criterion not in DATA_CRITERIA:
        return score_units(units, criterion, run.options.seed)
    if run.train is None:
        raise UsageError(f"--criterion {criterion} needs data: give --data")
    return DATA_CRITERIA[criterion](units, run.train)


def ranked(losses: Mapping[str, float]) -> str:
    """Losses in words, the lowest first."""
    said = {name: f"{loss:.4f}" if loss < UNKNOWN else "can't be made" for name, loss in losses.items()}
    return ", ".join(f"{name} {said[name]}" for name in sorted(losses, key=losses.__getitem__))
