"""A run from start to end: load, normalise, look at the uncut model, then the rounds.

Here everything is checked and loaded; `rounds.py` does the work, `ending.py` hands it over.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import filter as filter_names
from pathlib import Path

import onnx_ir as ir

from onnxprune.benchmarking.bench import find_providers
from onnxprune.choosing.sensitivity import load_sensitivity
from onnxprune.errors import UsageError
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.judge import Judge
from onnxprune.evaluating.metrics import find_metric, output_weights
from onnxprune.evaluating.sources import ImageOptions
from onnxprune.graph.model import check_outputs, files_of, open_model, save_model
from onnxprune.labels.units import prunable
from onnxprune.normalising.normalise import normalise
from onnxprune.progress import Listener
from onnxprune.running.given import HELD_BACK, Data, folders_of, load, looked_at, made_up, paths_of
from onnxprune.running.options import RunOptions
from onnxprune.running.report import Report
from onnxprune.running.rounds import Run
from onnxprune.running.trials import LINED_UP_BY
from onnxprune.running.workspace import Command, configuration, load_command, opened_workspace
from onnxprune.scoring.lineup import line_up
from onnxprune.scoring.score import CRITERIA
from onnxprune.training.losses import plan_loss


def run(
    model: str | os.PathLike[str] | None,
    data: Data | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    eval_data: Data | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    images: ImageOptions | None = None,
    options: RunOptions | None = None,
    listener: Listener | None = None,
) -> Report:
    """Prunes, repairs, fine-tunes, checks and benchmarks a model, and writes the result to `output`.

    `data` and `eval_data` are paths, `module:function`, or dicts of arrays (see `load_data`). The best accepted model
    is written even when the targets aren't met: `Report.met` tells. One that is of no use isn't, unless `force` is set:
    `Report.quality` tells. A folder that holds a run already is gone on with by `resume`, or emptied by `overwrite`;
    to go on `run(None, run_dir=FOLDER, resume=True)` is enough. Raises a subclass of `OnnxPruneError` for a model,
    data or options that can't be used; `KeyboardInterrupt` leaves the best accepted model at `output`.
    """
    listener = listener or Listener()
    if model is None:
        return _resumed(run_dir, resume, listener)
    options = options or RunOptions()
    source = Path(model)
    target = Path(output) if output is not None else source.with_suffix(".pruned.onnx")
    folder = Path(run_dir) if run_dir is not None else target.with_suffix(".onnxprune")
    _check_places(source, target, folder, [data, eval_data], options)
    notes: list[str] = []
    listener.stage("opening and normalising the model")
    baseline = normalise(open_model(source))
    units = prunable(baseline, str(source), options.granularity, options.kinds, options.protect)
    moved = line_up(units, options.criterion if options.criterion in CRITERIA else LINED_UP_BY, options.seed)
    if options.quantize == "int8" and data is None:
        raise UsageError("--quantize int8 takes ranges from data: give --data, or use --quantize dynamic")
    train, evaluation = load(baseline, data, eval_data, images, options, notes)
    if train is not None and options.epochs != 0:
        plan_loss(baseline, train, options.loss_options)  # refuses a loss that the labels don't fit, before any work
    for pattern in options.freeze:
        if not filter_names(baseline.graph.initializers, pattern):
            raise UsageError(f"--freeze {pattern}: no parameter has such a name")
    judge = _judge(baseline, evaluation, options, bool(data or eval_data), eval_data is not None)
    if judge.measured:
        listener.stage("measuring the uncut model")
        judge = looked_at(judge, notes, folders_of(eval_data or data), images or ImageOptions())
    config = configuration(source, train, evaluation, options, Command.of(source, data, eval_data, target, images))
    with opened_workspace(folder, config, resume, overwrite):
        if not (folder / "baseline.onnx").exists():
            save_model(baseline, folder / "baseline.onnx")
        calibration = train
        if train is None and (made := made_up(baseline, units, folder / "inputs.npz", options, listener, notes)):
            calibration, held = made.split(HELD_BACK, options.seed)
            judge = judge if eval_data is not None else replace(judge, evaluation=held)
        _check_measured(options, judge.measured, calibration is not None)
        for note in notes:
            listener.note(note)
        return Run(
            source, target, folder, baseline, moved, units, train, calibration, judge, options, listener, notes
        ).execute()


def _check_places(source: Path, target: Path, folder: Path, places: Sequence[Data | None], options: RunOptions) -> None:
    """Refuses what can't be read, or would be overwritten or emptied, before any work."""
    given = [each for place in places if not isinstance(place, Mapping) for each in paths_of(place)]
    given += paths_of(options.prior)
    check_outputs(source, [target], given)
    find_providers(options.providers)
    if options.prior is not None:
        load_sensitivity(Path(options.prior))
    for path in (*files_of(source), *given):
        if folder.resolve() in path.parents:
            raise UsageError(f"{path} lies in the run folder {folder}, which is emptied: choose another --run-dir")


def _judge(baseline: ir.Model, evaluation: Dataset, options: RunOptions, measured: bool, apart: bool) -> Judge:
    weights = output_weights(dict(options.weigh), [value.name or "" for value in baseline.graph.outputs])
    metric = find_metric(options.metric, evaluation, weights)
    kept = None if weights is None else tuple(weights)
    return Judge(baseline, evaluation, metric, options.threads, measured, apart, kept)


def _check_measured(options: RunOptions, measured: bool, calibrated: bool) -> None:
    """Refuses options that go by measurements where nothing can be measured."""
    if options.controller != "bisect" and not measured:
        raise UsageError(f"--controller {options.controller}: what is lost is measured: give --data")
    if options.layers and not options.layer_norm and not calibrated:
        raise UsageError("--layers: what they lose is measured: give --data; 'prune --layers' goes by weights")


def _resumed(run_dir: str | os.PathLike[str] | None, resume: bool, listener: Listener) -> Report:
    """Goes on with the run of a folder, by what it was started with."""
    if not resume or run_dir is None:
        raise UsageError("give a MODEL, or --resume and --run-dir FOLDER to go on with the run of that folder")
    command, options = load_command(Path(run_dir))
    if command.folder not in sys.path:
        sys.path.insert(0, command.folder)  # where module:function was found
    return run(
        command.model, command.data, output=command.output, eval_data=command.eval_data, run_dir=run_dir, resume=True,
        images=command.images, options=options, listener=listener,
    )  # fmt: skip
