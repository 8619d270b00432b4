"""Scores, thresholds and widths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from onnxprune.choosing.layers import find_layers
from onnxprune.choosing.queue import Queue, priced_layers
from onnxprune.choosing.select import Keep, Rounding, bounded, survivors, survivors_by_share, tau_for
from onnxprune.choosing.threshold import (
    INITIAL,
    Controller,
    Outcome,
    bisect_tau,
    drawn,
    gap_near,
    histogram,
    initial_tau,
    next_progress,
    published_move,
    published_tau,
    reach,
    used,
)
from onnxprune.cutting.cut import cut
from onnxprune.errors import ModelError, UsageError
from onnxprune.graph.model import open_model
from onnxprune.labels import analyse
from onnxprune.labels.units import Units, find_units
from onnxprune.normalising.normalise import normalise
from onnxprune.running.proposals import outcome_of
from onnxprune.scoring.cost import Cost, Spending
from onnxprune.scoring.prices import TRIED, kept_at, unit_losses, unit_prices
from onnxprune.scoring.score import CRITERIA, SCOPES, WEIGHT_CRITERIA, Scope, normalise_scores, score_units
from tests.conftest import MODELS
from tests.graphs import graph

MLP = "(float[N,6] x, float[6,8] w, float[8] b, float[8,5] v) => (float[N,5] y) { h = Gemm(x, w, b) y = MatMul(h, v) }"


def units_of(name: str) -> Units:
    return find_units(analyse(normalise(open_model(MODELS / f"{name}.onnx"))))


def test_weight_scores_follow_their_equations() -> None:
    units = find_units(analyse(graph(MLP)))
    (group,) = units.groups
    w = units.model.graph.initializers["w"].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    v = units.model.graph.initializers["v"].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    columns = w.T
    equations = {
        "l1": lambda m: np.abs(m).sum(1),
        "l2": lambda m: (m**2).sum(1),
        "sensitivity": lambda m: np.abs(m).sum(1) / np.sqrt((m**2).sum(1)),
        "logistic": lambda m: (1 / (1 + np.exp(-np.abs(m)))).mean(1),
    }
    for name, equation in equations.items():
        expected = sum(equation(m) / equation(m).mean() for m in (columns, v))
        np.testing.assert_allclose(score_units(units, name)[group.units], expected, rtol=1e-6)


def test_fpgm_and_lamp_equal_their_equations() -> None:
    units = find_units(analyse(graph(MLP)))
    (group,) = units.groups
    w, v = (units.model.graph.initializers[n].const_value.numpy().astype(np.float64) for n in "wv")  # type: ignore[union-attr]
    fpgm, lamp = np.zeros(len(group.units)), np.zeros(len(group.units))
    for slices in (w.T, v):
        apart = np.array([sum(np.linalg.norm(a - b) for b in slices) for a in slices])
        squares = (slices**2).sum(1)
        fpgm += apart / apart.mean()
        lamp += [s / squares[squares >= s].sum() for s in squares]
    np.testing.assert_allclose(score_units(units, "fpgm")[group.units], fpgm, rtol=1e-5)
    np.testing.assert_allclose(score_units(units, "lamp")[group.units], lamp, rtol=1e-5)


def test_bn_score_is_the_scale() -> None:
    units = units_of("digits_resnet")
    scores = score_units(units, "bn")
    group = next(g for g in units.groups if g.name == "blocks.0.conv1.weight")
    gamma = np.abs(units.model.graph.initializers["blocks.0.bn1.weight"].const_value.numpy())  # type: ignore[union-attr]
    np.testing.assert_allclose(np.sort(scores[group.units]), np.sort(gamma), rtol=1e-6)


def test_bn_score_refuses_a_model_without() -> None:
    with pytest.raises(ModelError, match="BatchNormalization"):
        score_units(units_of("digits_mlp"), "bn")


def test_random_scores_follow_the_seed() -> None:
    units = units_of("digits_mlp")
    a, b, c = (score_units(units, "random", seed) for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("scope", SCOPES)
def test_every_criterion_and_scope_reaches_half_of_the_macs(criterion: str, scope: Scope) -> None:
    units = units_of("digits_resnet")
    cost, everything = Cost(units), np.ones(units.count, bool)
    scores = normalise_scores(units, score_units(units, criterion), scope)
    found = tau_for(units, scores, Rounding(1), lambda alive: cost.macs(alive) <= cost.macs(everything) / 2)
    assert found is not None
    assert 0.4 * cost.macs(everything) < cost.macs(found[1]) <= 0.5 * cost.macs(everything)


@pytest.mark.parametrize("name", ["digits_resnet", "digits_mlp", "digits_vit", "digits_gru"])
def test_predicted_costs_are_those_of_the_cut_model(name: str) -> None:
    units = units_of(name)
    alive = survivors_by_share(units, score_units(units), 0.4, Rounding(1))
    model, _ = cut(units, alive)
    again = find_units(analyse(model))
    everything = np.ones(again.count, bool)
    trained = [value for value in model.graph.initializers.values() if ".fill" not in (value.name or "")]
    tensors = [value.const_value for value in trained]  # states of zeros aren't
    floats = sum(tensor.size for tensor in tensors if tensor.dtype.is_floating_point() and len(tensor.shape))
    assert Cost(units).params(alive) == floats
    assert Cost(units).macs(alive) == Cost(again).macs(everything)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9, 0.99])
def test_the_share_of_each_group_goes_and_one_unit_stays(share: float) -> None:
    units = units_of("digits_resnet")
    alive = survivors_by_share(units, score_units(units), share, Rounding(1))
    for group in units.groups:
        n = len(group.units)
        assert alive[group.units].sum() == max(1, n - int(share * n + 0.5))


def test_widths_are_rounded_up() -> None:
    units = units_of("digits_resnet")
    alive = survivors_by_share(units, score_units(units), 0.6, Rounding(8))
    assert all(alive[group.units].sum() % 8 == 0 for group in units.groups)
    assert all(alive[group.units].sum() >= 0.4 * len(group.units) for group in units.groups)


@pytest.mark.parametrize(("scope", "spared"), [("global", False), ("gradual", True)])
def test_gradual_takes_a_part_where_global_takes_all_but_one(scope: Scope, spared: bool) -> None:
    """Where the units of a group are alike."""
    units = units_of("digits_mlp")
    group = units.groups[0]
    scores = normalise_scores(units, np.ones(units.count), scope)[group.units]
    kept = int((scores >= 2 * scores.min()).sum())
    assert kept == (pytest.approx(len(group.units) / 2, abs=1) if spared else 0)


def test_prices_share_out_what_was_measured() -> None:
    """The units that went in a trial cost together what was lost in it, and those behind them no less."""
    units = units_of("digits_resnet")
    raw = score_units(units)
    curves = {group.name: [0.02 * (index + 1), 0.3] for index, group in enumerate(units.groups)}
    losses = unit_losses(units, raw, curves)
    for group in units.groups:
        ordered = losses[group.units[np.argsort(raw[group.units], kind="stable")]]
        gone = len(group.units) - kept_at(group, TRIED[0])
        assert ordered[:gone].sum() == pytest.approx(curves[group.name][0])
        assert (np.diff(ordered) >= 0).all()
    assert np.allclose(unit_losses(units, 1000 * raw, curves)[np.isfinite(losses)], losses[np.isfinite(losses)])


def test_what_was_lost_falls_to_units_that_were_thought_worthless() -> None:
    units = units_of("digits_resnet")
    group, raw = units.groups[0], score_units(units)
    raw[group.units] = 0.0
    losses = unit_losses(units, raw, {each.name: [0.2, 0.3] for each in units.groups})[group.units]
    gone = len(group.units) - kept_at(group, TRIED[0])
    assert np.sort(losses)[:gone].sum() == pytest.approx(0.2)


def test_prices_spare_what_saves_little() -> None:
    """Of groups whose units lose the same, those go first that save most of what is asked for."""
    units = units_of("digits_resnet")
    spending, everything = Spending(units, ("macs",), None), np.ones(units.count, bool)
    prices = unit_prices(units, np.ones(units.count), spending)
    saved = {}
    for group in units.groups:
        rest = everything.copy()
        rest[group.units[1:]] = False
        saved[group.name] = (spending(everything) - spending(rest)) / (len(group.units) - 1)
    first = {group.name: float(prices[group.units].min()) for group in units.groups}
    dear, cheap = (pick(saved, key=saved.__getitem__) for pick in (max, min))
    assert first[dear] < first[cheap]
    assert all(first[name] == pytest.approx(1 / saved[name]) for name in saved)


def test_a_layer_is_cheaper_to_drop_the_less_is_left_of_it() -> None:
    """What its units lost and saved is behind it; without nodes and the weights that only they read less is spent."""
    units = units_of("digits_resnet")
    spending, everything = Spending(units, ("macs",), None), np.ones(units.count, bool)
    losses = np.full(units.count, 0.001)
    layers = find_layers(units.model)
    priced = priced_layers(units, layers, {layer.name: 0.1 for layer in layers})
    inside = [group for each in priced for group in each.inside]
    assert inside
    thin = everything.copy()
    thin[inside[0].units[2:]] = False
    queue = Queue(units, losses, Rounding(1), losses, priced, spending, most=len(layers))
    owner = next(each for each in priced if inside[0] in each.inside)
    rest = spending(everything) - spending(everything, owner.nodes)
    left = spending(thin) - spending(thin, owner.nodes)
    assert 0 < left < rest
    assert not queue.layers_under(0.0) and len(queue.layers_under(np.inf)) >= len(layers) - 1
    assert queue.prices[owner.layer.name] == pytest.approx(0.1 / rest)


def test_a_unit_goes_when_its_score_is_under_tau() -> None:
    units = units_of("digits_mlp")
    scores = normalise_scores(units, score_units(units), "global")
    tau = float(np.median(scores[np.isfinite(scores)]))
    alive = survivors(units, scores, tau, Rounding(1))
    finite = np.isfinite(scores)
    assert (alive[finite] == (scores[finite] >= tau)).all()


def test_bisection_finds_the_highest_threshold_that_costs_no_more_than_allowed() -> None:
    scores = np.concatenate([np.arange(1.0, 101.0), [np.inf]])
    calls = []

    def drop(tau: float) -> float:
        calls.append(tau)
        return tau / 10

    tau = bisect_tau(scores, drop, 4.25, evaluations=8)
    assert tau == 42.0
    assert len(calls) <= 8


def test_bisection_gives_up_when_the_first_unit_costs_too_much() -> None:
    assert bisect_tau(np.arange(10.0), lambda tau: 9.0, 1.0) is None


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("published", 0.9 * 0.5 + 0.1 * 0.2 * 0.5),
        ("published-text", 0.9 * 0.5 + 0.1 * 1.8 * 0.5),
        ("recursive", 0.9 * 0.7 + 0.1 * 0.2 * 0.5),
        ("recursive-text", 0.9 * 0.7 + 0.1 * 1.8 * 0.5),
    ],
)
def test_the_published_rules(rule: Controller, wanted: float) -> None:
    """tau = tau_0 alpha + (1 - alpha) L / eps, at a fifth of the allowance; tau_0 is 0.5, tau 0.7 now."""
    assert published_tau(0.5, 0.7, 0.2, 0.9, rule) == pytest.approx(wanted)
    for share in (0.3, 1.6):  # as printed a larger loss raises tau, as the text has it a larger loss lowers it
        change = published_tau(0.5, 0.7, share, 0.9, rule) - published_tau(0.5, 0.7, share / 2, 0.9, rule)
        assert change < 0 if rule.endswith("-text") else change > 0
    assert published_tau(0.5, 0.5, 1.0, 0.9, rule) == pytest.approx(0.5)  # all of it used: nothing moves


def test_rounds_that_were_rolled_back_halve_the_threshold_until_one_is_kept() -> None:
    kept, lost = Outcome(8.0, 0.5, 0.1, True, 0.0), Outcome(8.0, 3.0, 0.1, False, 0.0)
    tau = {count: published_move([kept, *[lost] * count], 8.0, 1.0, 0.9, "published")[0] for count in (0, 1, 2)}
    assert tau[1] < tau[0] and tau[2] == pytest.approx(tau[1] / 2)
    assert published_move([lost, kept], 8.0, 1.0, 0.9, "published")[0] == pytest.approx(tau[0])


def test_what_is_used_of_the_allowance() -> None:
    assert used(Outcome(1.0, 0.5, 0.1, True, 0.0), 2.0) == 0.25
    assert used(Outcome(1.0, -0.5, 0.1, True, 0.0), 2.0) == 0.0
    assert used(Outcome(1.0, float("inf"), 0.1, False, 0.0), 2.0) == 2.0
    assert [used(Outcome(1.0, drop, 0.1, True, 0.0), 0.0) for drop in (-1.0, 0.0, 0.1)] == [0.0, 0.0, 2.0]


@given(hnp.arrays(np.float64, 30, elements=st.floats(1.0, 2.0)), st.floats(0.001, 1000.0))
def test_a_clear_gap_near_tau_is_found_at_any_scale(scores: NDArray[np.float64], scale: float) -> None:
    low, high = scale * scores, scale * 20 * scores
    both = np.concatenate([low, high, [np.inf]])
    for tau in (float(low.max()), float(high.min())):
        gap = gap_near(both, tau)
        assert gap is not None and low.max() < gap < high.min()
    assert gap_near(low, float(np.median(low))) is None
    assert gap_near(both, 1000 * float(high.max())) is None  # far from there


def test_a_histogram_holds_all_scores_and_tau() -> None:
    found = histogram(np.array([1.0, 2.0, 4.0, 100.0, np.inf]), 3.0)
    assert sum(found["counts"]) == 4 and found["below"] == 2 and found["tau"] == 3.0
    assert len(found["edges"]) == len(found["counts"]) + 1
    assert histogram(np.array([np.inf]), 1.0)["counts"] == []
    lines = drawn(found).splitlines()
    assert "2 of 4 below" in lines[0] and sum("tau" in line for line in lines[1:]) == 1
    assert "above all" in drawn(histogram(np.array([1.0, 2.0]), 9.0)) and drawn(histogram(np.array([np.inf]), 1.0))


def test_published_scores_of_weights() -> None:
    """The published examples: |w|_1 / |w|_2 of (0.8, 0.5), of one weight, of four equal ones; f(w) of nine weights."""

    def score(name: str, rows: list[list[float]]) -> NDArray[np.float64]:
        return WEIGHT_CRITERIA[name].score(np.array(rows)[None])

    assert score("sensitivity", [[0.8, 0.5]])[0] == pytest.approx(1.378, abs=1e-3)
    assert score("sensitivity", [[3.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]) == pytest.approx([1.0, 2.0])
    weights = [[each] for each in (0.5, 0.3, 0.1, 0.2, 0.4, 0.7, 0.1, 0.6, 0.8)]
    assert score("signed", weights) == pytest.approx(
        [0.622, 0.574, 0.525, 0.550, 0.599, 0.668, 0.525, 0.646, 0.690], abs=6e-4
    )
    assert (score("signed", weights) > 0.3).all()  # theta 0.3 keeps all
    assert score("magnitude", [[0.5, -0.1], [-1.0, -1.0]]) == pytest.approx([0.3, 1.0])


def test_thresholds_in_the_unit_of_the_weights() -> None:
    """In the scope raw a unit goes when its own score is under tau, whatever its group."""
    units = units_of("digits_mlp")
    raw = score_units(units, "magnitude")
    scores = normalise_scores(units, raw, "raw")
    finite = np.isfinite(scores)
    assert (scores[finite] == raw[finite]).all()
    tau = initial_tau(scores, "mean")
    assert tau == pytest.approx(raw[finite].mean())
    alive = survivors(units, scores, tau, Rounding(1))
    assert (alive[finite] == (raw[finite] / tau >= 1)).all()


@pytest.mark.parametrize(("rate", "gone"), [(0.1, 2), (0.0, 5)])
def test_theta_from_a_rate(rate: float, gone: int) -> None:
    """The nine weights of the published example: with a rate of 0.1 theta is 0.540, and two go."""
    weights = np.array([0.5, 0.3, 0.1, 0.2, 0.4, 0.7, 0.1, 0.6, 0.8])
    scores = 1 / (1 + np.exp(-weights))
    theta = initial_tau(scores, f"mean:{rate}")
    assert theta == pytest.approx(scores.mean() * (1 - rate)) and int((scores < theta).sum()) == gone
    assert theta == pytest.approx({0.1: 0.540, 0.0: 0.600}[rate], abs=2e-3)
    assert initial_tau(scores, "0.3") == 0.3


def test_initial_tau_comes_from_the_distribution() -> None:
    scores = np.array([1.0, 2.0, 3.0, 4.0, np.inf])
    assert initial_tau(scores) == pytest.approx(2.5 - np.std([1, 2, 3, 4]))
    assert initial_tau(scores, "mean") == 2.5
    assert initial_tau(scores, "quantile") == pytest.approx(1.6)
    assert initial_tau(np.array([np.inf])) == 0
    many = np.array([0.01] * 50 + [1.0] * 10)
    assert initial_tau(many, "energy") == 1.0 and initial_tau(many[::-1].copy(), "otsu") == 1.0


@pytest.mark.parametrize("rule", INITIAL)
@given(hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1e6)))
def test_the_first_tau_lies_among_the_scores(rule: str, scores: NDArray[np.float64]) -> None:
    least = 0.0 if rule == "std" else scores.min()
    assert least * (1 - 1e-9) - 1e-9 <= initial_tau(scores, rule) <= scores.max() * (1 + 1e-9)


def test_tau_backs_off_after_a_round_that_was_rolled_back() -> None:
    failed = Outcome(1.0, 5.0, 1.0, False, 0.0)
    assert reach([], 1.0, True) > reach([failed], 1.0, True) > reach([failed, failed], 1.0, True) >= 1.0
    assert reach([], 1.0, False) == 1.0


def test_a_cut_is_as_bold_as_fine_tuning_was_seen_to_be_good() -> None:
    weak, strong = (Outcome(1.0, drop, 1.0, drop < 1, 0.0, before=6.0) for drop in (2.0, 0.6))
    assert reach([weak], 1.0, True) < reach([], 1.0, True) < reach([strong], 1.0, True)
    assert reach([strong, weak], 1.0, True) == reach([weak], 1.0, True)
    assert reach([strong, weak], 0.0, True) == reach([replace(strong, drop=0.0)], 0.0, True) == 0.0


def test_a_cut_that_was_rolled_back_is_not_tried_again() -> None:
    """A round whose drop is within what is allowed, but not with its error: the next cut may cost less than it did."""
    record = {"tau": 1.0, "drop": 0.8, "drop_counted": 1.33, "loss": 0.1, "drop_before_tuning": 2.8, "accepted": False,
              "progress": 0.0}  # fmt: skip
    assert reach([outcome_of(record)], 1.0, True) < 2.8


def test_progress_to_a_target() -> None:
    kept, failed = Outcome(1, 0, 0, True, 0.5), Outcome(1, 9, 0, False, 1.0)
    assert next_progress(1, []) == 1.0
    assert next_progress(2, []) == 0.5
    assert next_progress(2, [kept]) == 1.0
    assert next_progress(2, [kept, failed]) == 0.75
    assert next_progress(1, [Outcome(1, 0, 0, True, 1.0)]) is None
    assert next_progress(1, [failed, failed, failed]) is None


def test_the_cubic_schedule() -> None:
    history: list[Outcome] = []
    for t in range(1, 5):
        progress = next_progress(4, history, "cubic")
        assert progress == pytest.approx(1 - (1 - t / 4) ** 3)
        history.append(Outcome(1, 0, 0, True, progress))
    assert next_progress(4, history, "cubic") is None


def test_bounds_hold_whatever_the_threshold() -> None:
    units = units_of("digits_resnet")
    scores = normalise_scores(units, score_units(units), "global")
    first, second = units.groups[0], units.groups[1]
    keeps = [Keep("*", 0.25), Keep(first.name, 0.5, 0.5), Keep(second.name, 0.0, 0.75)]
    held = bounded(units, scores, keeps)
    for tau in (-1.0, 0.0, float(np.median(scores[np.isfinite(scores)])), 1e9):
        alive = survivors(units, held, tau, Rounding(1))
        for group in units.groups:
            share = alive[group.units].mean()
            low, high = {first.name: (0.5, 0.5), second.name: (0.0, 0.75)}.get(group.name, (0.25, 1.0))
            assert low <= share <= high, (group.name, tau)
    everywhere = survivors_by_share(units, held, 0.9, Rounding(1))
    assert everywhere[first.units].mean() == 0.5
    halved = bounded(units, scores, [Keep("*", 0.5)], {group.name: 2 * len(group.units) for group in units.groups})
    assert (halved == np.inf).all()  # half of what there was before the last round: all of it
    with pytest.raises(UsageError, match="wing"):
        bounded(units, scores, [Keep("wing*", 0.5)])
