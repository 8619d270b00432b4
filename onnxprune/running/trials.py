"""Trials before the first round: the same cut in several ways, repaired and measured, and units scored as they tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import product
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.benchmarking.bench import find_providers
from onnxprune.benchmarking.latency import NEAR, time_share
from onnxprune.choosing.layers import Layer, choose_layers, drop_layers, free_layers, influence_scores, weight_scores
from onnxprune.choosing.select import Rounding, bounded, tau_for
from onnxprune.cutting.cut import cut
from onnxprune.cutting.plan import Plan
from onnxprune.errors import ModelError, UsageError
from onnxprune.graph.files import memoised
from onnxprune.labels import analyse
from onnxprune.labels.units import Units, chosen_units, find_units
from onnxprune.running.context import Context, State, costs_of
from onnxprune.scoring.activations import ACTIVATION_CRITERIA
from onnxprune.scoring.cost import Cost
from onnxprune.scoring.gradients import GRADIENT_CRITERIA
from onnxprune.scoring.score import Scope, normalise_scores, score_units

DATA_CRITERIA = {**ACTIVATION_CRITERIA, **GRADIENT_CRITERIA}
AUTO: Final = "auto"
LINED_UP_BY = "l2"  # rows are sorted before the contest, by one criterion
BETWEEN = ", "  # the criterion and the scope, in the name of a way to score
CONTESTANTS = ("obs", "flap", "l2")
AUTO_SCOPES: Final[tuple[Scope, ...]] = ("global", "gradual", "priced")
FIRST_SCOPE: Final = "gradual"  # in which criteria are compared
TRIED_AT = {"macs": 0.5}  # where an allowed drop alone decides
PROBE_SAMPLES = 1024
TRIED_ON = 0.25  # of the samples and positions that repair takes: enough to tell ways apart
LOW_FIDELITY = 0.5  # share of the spread that is lost, from which made-up inputs tell nothing
UNKNOWN = 1e30  # a loss that JSON can hold


Way = tuple[str, Scope]  # how units are scored: by a criterion, and in what scope they are compared


def chosen_way(run: Context) -> Way:
    """How units are scored: as named, or the winner of the contest."""
    losses, (criteria, scopes) = contest(run), _left_open(run)
    if not losses:
        return criteria[0], scopes[0]
    winner = min(losses, key=losses.__getitem__)
    return next(way for way in product(criteria, scopes) if BETWEEN.join(way) == winner)


def _left_open(run: Context) -> tuple[tuple[str, ...], tuple[Scope, ...]]:
    """The criteria and the scopes among which the options leave the choice; one scope where nothing can be fitted.

    Without data, weights alone tell.
    """
    options = run.options
    criteria: tuple[str, ...] = (options.criterion,)
    if options.criterion == AUTO:
        criteria = CONTESTANTS if run.train is not None else (LINED_UP_BY,)
    if options.scope != AUTO:
        return criteria, (options.scope,)
    return criteria, AUTO_SCOPES if run.calibration is not None else AUTO_SCOPES[:1]


def contest(run: Context) -> dict[str, float]:
    """Where the criterion or the scope is auto, the loss after the same cut each way, repaired, before fine-tuning."""
    criteria, scopes = _left_open(run)
    if len(criteria) == len(scopes) == 1:
        return {}
    found: dict[str, float] = memoised(run.folder / "contest.json", partial(_hold_contest, run))
    return found


def without_layers(run: Context) -> State:
    """What the first round starts from: the baseline, without the layers that matter least."""
    wanted = run.layers
    if not wanted:
        return _dropping(run, [])
    layers = free_layers(run.baseline, run.options.protect)
    if wanted == "auto" and not layers:
        return _dropping(run, [])
    if run.calibration is None:
        chosen = choose_layers(layers, weight_scores(run.baseline, layers), None if wanted == "auto" else wanted)
    else:
        scores = influence_scores(run.baseline, layers, run.calibration, run.options.threads)
        if wanted == "auto":
            wanted = _how_many(run, layers, scores)
        chosen = choose_layers(layers, scores, wanted)
    run.note(f"layers dropped: {', '.join(layer.name for layer in chosen) or 'none'}")
    return _dropping(run, chosen)


def _dropping(run: Context, layers: list[Layer]) -> State:
    start = Plan({}, reordered=run.moved)
    if not layers:
        return State(run.baseline, start)
    model, dropped = drop_layers(run.baseline, [layer.name for layer in layers])
    return State(model, start.then(dropped))


def _how_many(run: Context, layers: list[Layer], scores: list[float]) -> int:
    """How many layers to drop so that with widths cut to the same target the loss is lowest: 0, 1, 2, 4, 8 …"""

    def search() -> dict[str, float]:
        counts = [0] + [2**power for power in range(len(layers).bit_length()) if 2**power <= len(layers)]
        losses = dict[str, float]()
        for number, count in enumerate(counts):
            run.listener.progress(f"trying without {count} layers", number + 1, len(counts))
            without = _dropping(run, choose_layers(layers, scores, count))
            over = count > 0 and _overshoots(run, without)
            if over and min(losses.values()) < UNKNOWN:
                break  # more would only go further than was asked
            losses[str(count)] = _trial(run, without, (LINED_UP_BY, AUTO_SCOPES[0]))
            if over:
                break
        return losses

    losses: dict[str, float] = memoised(run.folder / "layers.json", search)
    run.note(f"layers to drop, by loss: {ranked(losses)}")
    if _tells_nothing(run, losses):
        run.note("on inputs that were made up none of these cuts keeps half of what is measured: as few as can be go")
        return min(int(count) for count, loss in losses.items() if loss < UNKNOWN or min(losses.values()) >= UNKNOWN)
    return int(min(losses, key=losses.__getitem__))


def _overshoots(run: Context, state: State) -> bool:
    """Whether a model meets all targets before any width is cut; time is measured, not estimated."""
    reached = costs_of(find_units(analyse(state.model)), target=run.target)
    for name, share in (run.targets or TRIED_AT).items():
        if name == "latency":
            provider = find_providers(run.options.providers)[0]
            left = time_share(run.source, state.model, provider, run.options.threads, run.sizes)
        else:
            left = reached[name] / max(run.base_costs[name], 1)
        if left > share * NEAR:
            return False
    return True


def _tells_nothing(run: Context, losses: Mapping[str, float]) -> bool:
    """Whether losses are on inputs that were made up, and so high there that they decide nothing."""
    return not run.judge.measured and min(losses.values()) > LOW_FIDELITY


def _hold_contest(run: Context) -> dict[str, float]:
    """Of the criteria in one scope, then of the scopes with the best of them."""
    (criteria, scopes), losses = _left_open(run), dict[str, float]()
    first: Scope = FIRST_SCOPE if FIRST_SCOPE in scopes else scopes[0]

    def hold(ways: Iterable[Way]) -> None:
        for way in ways:
            name = BETWEEN.join(way)
            run.listener.progress(f"trying {name}", len(losses) + 1, len(criteria) + len(scopes) - 1)
            losses[name] = _trial(run, _dropping(run, []), way)

    hold((criterion, first) for criterion in criteria)
    best = min(criteria, key=lambda criterion: losses[BETWEEN.join((criterion, first))])
    hold((best, scope) for scope in scopes if scope != first)
    losses = {name: loss for name, loss in losses.items() if loss < UNKNOWN} or {
        BETWEEN.join((best, scopes[0])): UNKNOWN
    }
    run.note(f"ways to choose by loss: {ranked(losses)}")
    usual = BETWEEN.join((criteria[0], scopes[0]))  # without data the only criterion
    return {usual: losses[usual]} if usual in losses and _tells_nothing(run, losses) else losses


def _trial(run: Context, state: State, way: Way) -> float:
    """The loss after a cut to the targets, or to half of the MACs, and repair; `UNKNOWN` if it can't be made."""
    try:
        units, scores, rounding = scored(run, state.model, way)
    except ModelError:
        return UNKNOWN  # it needs what the model hasn't
    measures = Cost(units, run.target).measures
    limits = {name: share * run.base_costs[name] for name, share in (run.targets or TRIED_AT).items()}
    chosen = tau_for(units, scores, rounding, lambda a: all(measures[n](a) <= limit for n, limit in limits.items()))
    if chosen is None:
        return UNKNOWN
    model, step = cut(units, chosen[1])
    run.repair(model, state, step, share=TRIED_ON)
    return run.judge.measure(model, PROBE_SAMPLES).loss


def scored(run: Context, model: ir.Model, way: Way | None = None) -> tuple[Units, NDArray[np.float64], Rounding]:
    """A model's units, their scores as the run does or in another way, and how widths are rounded."""
    options = run.options
    units = chosen_units(model, options.granularity, options.kinds, options.protect)
    criterion, scope = way or chosen_way(run)
    origin = run.prices if scope == "priced" else run.origin
    scores = normalise_scores(units, _raw_scores(run, units, criterion), scope, origin)
    sizes = {name: size for name, (size, _) in run.origin.items()}
    return units, bounded(units, scores, options.keep, sizes), run.rounding


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
