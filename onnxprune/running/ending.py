"""The end of a run: the result is checked, saved, made of smaller numbers if asked, benchmarked and reported."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from onnxprune.benchmarking.bench import Comparison, bench_models, model_bytes
from onnxprune.evaluating.judge import Verdict
from onnxprune.exporting.finalise import finalise
from onnxprune.exporting.quantise import Numbers, quantise
from onnxprune.graph.files import sha256, write_json
from onnxprune.graph.model import open_model, save_model
from onnxprune.labels.units import chosen_units
from onnxprune.running.context import Context, Record, State, costs_of
from onnxprune.running.proposals import SLOWER
from onnxprune.running.report import Quality, Report, Side, decimals, latency_sides, versions, widths
from onnxprune.running.trials import contest

OVER = 1.05  # times the time asked that still counts as met


def good_enough(run: Context, useful: float) -> bool:
    """Whether a model that keeps so much is handed over."""
    return run.options.force or not run.judge.measured or useful >= run.options.floor


def save(run: Context, state: State) -> Path:
    """Writes the accepted model and its plan to the run folder."""
    save_model(finalise(state.model), run.folder / "pruned.onnx")
    write_json(run.folder / "plan.json", state.plan.to_json(sha256(run.folder / "baseline.onnx")))
    return run.folder / "pruned.onnx"


def _quantised(run: Context, whole: Path, numbers: Numbers) -> Path:
    """The result with smaller numbers, or as it was where that costs more than may be lost."""
    place = run.folder / "quantised.onnx"
    quantise(whole, place, numbers, run.train)
    verdict = run.judge.measure(open_model(place))
    over = run.allowed is not None and verdict.drop > run.allowed
    if not over and (
        good_enough(run, verdict.useful) or not good_enough(run, run.judge.measure(open_model(whole)).useful)
    ):
        return place
    lost = f"{run.judge.metric.name} falls by {verdict.drop:.{decimals(verdict.drop, run.allowed or 0.0)}f}"
    run.note(f"with {numbers} numbers {lost}: left as they were; see {place}")
    return whole


def report_of(run: Context, state: State, records: list[Record], started: float) -> Report:
    """Hands the accepted model over where it is of use, benchmarks it beside the uncut one, and writes the report."""
    run.listener.stage("saving and checking the result")
    found = save(run, state)
    if run.options.quantize is not None:
        found = _quantised(run, found, run.options.quantize)
    verdicts = [run.judge.measure(open_model(path)) for path in (run.source, found)]
    written = good_enough(run, verdicts[1].useful)
    if written:
        save_model(open_model(found), run.output)
    run.listener.stage("benchmarking before against after")
    paths = (run.source, run.output if written else found)
    providers, threads, seconds = run.options.providers, run.options.threads, run.options.bench_seconds
    results = bench_models(paths, providers, threads, seconds=seconds, shapes=run.sizes)
    latencies, memory, speedup = latency_sides(results)
    options = run.options
    costs = costs_of(chosen_units(state.model, options.granularity, options.kinds, options.protect))
    before, after = map(partial(_side, run), paths, (run.base_costs, costs), verdicts, latencies, memory)
    report = Report(
        baseline=before,
        pruned=after,
        rounds=tuple(records),
        widths=widths(run.baseline, state.model),
        target=_verdict(run, costs, results[1].against_first, verdicts[1].drop - verdicts[0].drop),
        speedup=speedup,
        notes=tuple(run.notes),
        quality=_quality(run, verdicts[1], written),
        unchecked=tuple(r["check_why"] for r in records if r["accepted"] and r["check"] != "equal"),
        contest=contest(run),
        run_dir=str(run.folder),
        options=asdict(run.options),
        versions=versions(),
        model_sha256=sha256(run.source),
        seconds=time.monotonic() - started,
    )
    write_json(run.folder / "report.json", report.to_json())
    return report


def _quality(run: Context, verdict: Verdict, written: bool) -> Quality:
    judge = run.judge
    if not judge.measured:
        return Quality(False)
    metric = judge.metric
    return Quality(
        True, metric.name, verdict.useful, run.options.floor, judge.guess, metric.higher_is_better, metric.scale,
        judge.noise, tuple(judge.unexercised), written,
    )  # fmt: skip


def _side(
    run: Context,
    path: Path,
    costs: dict[str, int],
    verdict: Verdict,
    latency: dict[str, dict[str, float]],
    memory: dict[str, int],
) -> Side:
    metric = {"name": run.judge.metric.name, "value": verdict.value} if run.judge.measured else None
    beside = run.judge.beside(open_model(path))
    return Side(str(path), costs["macs"], costs["params"], model_bytes(path), metric, beside, latency, memory)


def _verdict(run: Context, costs: dict[str, int], timed: Comparison, drop: float) -> dict[str, Any]:
    """What was asked, what was reached, and whether that is enough; time, which varies, may be 5 % over.

    A result that is slower than the uncut model is no success, whatever else it reaches.
    """
    reached = {name: cost / max(run.base_costs[name], 1) for name, cost in costs.items()}
    reached["latency"] = 1 / timed.speedup
    slower = timed.high < 1 / SLOWER and costs["macs"] < run.base_costs["macs"]
    asked = dict[str, dict[str, Any]]()
    for name, share in run.targets.items():
        within = share * (OVER if name == "latency" else 1)
        asked[name] = {"asked": share, "reached": reached[name], "met": bool(reached[name] <= within)}
    met = all(entry["met"] for entry in asked.values())
    if run.allowed is not None:
        met = met and drop <= run.allowed + 1e-9 and (bool(asked) or costs["macs"] < run.base_costs["macs"])
    rates = {"units": 1 - reached["units"], "weights": 1 - reached["params"]}
    return {
        "rates": rates,
        "resources": asked,
        "max_drop": run.allowed,
        "drop": drop if run.judge.measured else None,
        "slower": slower,
        "met": bool(met) and not slower,
    }
