"""How much each group matters: a curve of the metric over the share of its units that is removed, alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.checks import check_option
from onnxprune.choosing.select import keep_best
from onnxprune.cutting.cut import cut
from onnxprune.errors import UsageError
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.judge import Judge
from onnxprune.evaluating.metrics import find_metric
from onnxprune.evaluating.sources import ImageOptions, as_dataset
from onnxprune.graph.model import open_model, save_model
from onnxprune.graph.threads import number_of_threads
from onnxprune.labels.units import Units, prunable
from onnxprune.normalising.normalise import normalise
from onnxprune.progress import Listener
from onnxprune.scoring.cost import Cost
from onnxprune.scoring.score import Scores, score_units

RATIOS = (0.25, 0.5, 0.75)
SAMPLES = 512
LEAST_LOSS = 1e-6  # of a group that seems to cost nothing


@dataclass(frozen=True)
class Curve:
    """One group alone: for each ratio, the points lost, the loss, and the MACs that go as a share of the model's."""

    group: str
    kind: str
    units: int
    ratios: tuple[float, ...]
    drops: tuple[float, ...]
    losses: tuple[float, ...]
    saved: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The curves of all groups, and what the uncut model has."""

    model: str
    metric: str
    criterion: str
    uncut: float
    loss: float
    samples: int
    curves: tuple[Curve, ...]

    def to_json(self) -> dict[str, Any]:
        """The curves as JSON."""
        return asdict(self)

    def factors(self, units: Units, seed: int = 0) -> dict[str, float]:
        """By group, what turns its scores into the loss that was measured when the largest share of it went.

        So scores of different groups compare by what their units cost, whatever the criterion takes them for. Raises
        `UsageError` when the curves are of another model.
        """
        groups = {group.name: group for group in units.groups}
        known = [curve for curve in self.curves if curve.group in groups]
        if any(curve.units != len(groups[curve.group].units) for curve in known) or not known:
            raise UsageError(f"the curves of {self.model} are of another model: measure this one again")
        scores, found = score_units(units, self.criterion, seed), dict[str, float]()
        for curve in known:
            own = np.sort(scores[groups[curve.group].units])
            gone = own[: max(1, round(curve.ratios[-1] * curve.units))].sum()
            found[curve.group] = max(curve.losses[-1] - self.loss, LEAST_LOSS) / max(float(gone), 1e-30)
        return found


def load_sensitivity(path: Path) -> Sensitivity:
    """Reads what `Sensitivity.to_json` made. Raises `UsageError` for anything else."""
    try:
        content = json.loads(path.read_text())
        curves: list[dict[str, Any]] = [
            {name: tuple(value) if isinstance(value, list) else value for name, value in curve.items()}
            for curve in content.pop("curves")
        ]
        return Sensitivity(**content, curves=tuple(Curve(**curve) for curve in curves))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: can't be read as what 'onnxprune sensitivity -o' writes: {error}") from error


@dataclass(frozen=True)
class Task:
    """What a process needs to measure groups: files of the normalised model, by name, the data and what to measure."""

    files: tuple[tuple[str, bytes], ...]
    data: Dataset
    metric: str | None
    criterion: str
    seed: int
    threads: int


def sensitivity(
    model: str | os.PathLike[str],
    data: Any,
    *,
    ratios: Sequence[float] = RATIOS,
    criterion: str = "l2",
    metric: str | None = None,
    samples: int = SAMPLES,
    parallel: int | str = 1,
    seed: int = 0,
    images: ImageOptions | None = None,
    listener: Listener | None = None,
) -> Sensitivity:
    """Removes each share in `ratios` of each group's units, one group at a time, unrepaired, and measures.

    `data` as for `run`; `samples` of its samples, drawn by the seed, are used. Without labels fidelity to the uncut
    model is measured. `parallel` is a number of processes, `dask:HOST:PORT` or `ray:ADDRESS` for a cluster that has
    onnxprune installed; results don't depend on it. Raises subclasses of `OnnxPruneError`.
    """
    listener = listener or Listener()
    check_option("ratios", ratios, tuple[float, ...])
    check_option("samples", samples, int, 1)
    check_option("parallel", parallel, int | str)
    check_option("seed", seed, int, 0)
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise UsageError(f"--ratios {','.join(f'{r:g}' for r in ratios)}: give shares between 0 and 1")
    parallel = str(parallel)
    listener.stage("opening and normalising the model")
    baseline = normalise(open_model(model))
    units = prunable(baseline, str(model))
    part = as_dataset(data, baseline, images).shuffled(seed).take(slice(0, samples))
    measured = find_metric(metric, part)
    jobs = int(parallel) if parallel.isdigit() else 0
    threads = max(1, number_of_threads() // max(1, jobs))
    with tempfile.TemporaryDirectory() as folder:
        save_model(baseline, Path(folder) / "model.onnx")
        files = tuple((path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir()))
    task = Task(files, part, metric, criterion, seed, threads)
    uncut = Judge(baseline, part, measured, threads, True).told().measure(baseline)
    found: list[Curve] = []
    for curve in _everywhere(task, len(units.groups), tuple(ratios), parallel):
        found.append(curve)
        listener.progress("measuring each group alone", len(found), len(units.groups))
    return Sensitivity(str(model), measured.name, criterion, uncut.value, uncut.loss, len(part), tuple(found))


def _everywhere(task: Task, groups: int, ratios: tuple[float, ...], parallel: str) -> Iterator[Curve]:
    """The curve of each group, in order, from wherever it is measured."""
    import joblib

    with _backend(parallel, task):
        come = "list" if parallel.startswith("ray") else "generator"  # one by one isn't known to Ray's backend
        jobs = joblib.Parallel(n_jobs=int(parallel) if parallel.isdigit() else -1, return_as=come)
        yield from jobs(joblib.delayed(measure_group)(task, index, ratios) for index in range(groups))


@contextlib.contextmanager
def _backend(parallel: str, task: Task) -> Iterator[None]:
    """Joblib set up for processes here or for a cluster. Raises `UsageError` for one that can't be reached."""
    import joblib

    kind, _, address = parallel.partition(":")
    if kind.isdigit() and int(kind) > 0 and not address:
        yield
        return
    try:
        if kind == "dask":
            from distributed import Client

            with Client(address or None, timeout="20s") as client:
                client.wait_for_workers(1, timeout=20)
                with joblib.parallel_config(backend="dask", scatter=[task]):
                    yield
            return
        if kind == "ray":
            import ray
            from ray.util.joblib import register_ray

            ray.init(address=address or None, ignore_reinit_error=True)
            register_ray()
            with joblib.parallel_config(backend="ray"):
                yield
            return
    except ImportError as error:
        raise UsageError(f"--parallel {parallel}: {error}; install 'dask[distributed]' or 'ray'") from error
    except (OSError, TimeoutError, ConnectionError) as error:
        raise UsageError(f"--parallel {parallel}: the cluster can't be reached: {error}") from error
    raise UsageError(f"--parallel {parallel}: give a number of processes, dask:HOST:PORT or ray:ADDRESS")


def measure_group(task: Task, index: int, ratios: tuple[float, ...]) -> Curve:
    """The curve of one group."""
    units, scores, judge = _prepared(task)
    group, cost = units.groups[index], Cost(units)
    everything = np.ones(units.count, bool)
    whole, verdicts, saved = cost.macs(everything), [], []
    for ratio in ratios:
        alive = everything.copy()
        keep_best(alive, group, scores, max(1, len(group.units) - round(ratio * len(group.units))))
        verdicts.append(judge.measure(cut(units, alive)[0]))
        saved.append(1 - cost.macs(alive) / max(whole, 1))
    return Curve(
        group.name, group.kind, len(group.units), ratios, tuple(v.drop for v in verdicts),
        tuple(v.loss for v in verdicts), tuple(saved),
    )  # fmt: skip


def _prepared(task: Task) -> tuple[Units, Scores, Judge]:
    files = tuple((name, hashlib.sha256(content).hexdigest()) for name, content in task.files)
    key = (files, task.data.digest(), task.metric, task.criterion, task.seed, task.threads)
    if _PREPARED.get("key") != key:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in task.files:
                (Path(folder) / name).write_bytes(content)
            model = open_model(Path(folder) / "model.onnx")
            units = prunable(model, "the model")
            judge = Judge(model, task.data, find_metric(task.metric, task.data), task.threads, True).told()
            judge.measure(model, 1)  # everything is read while the files are there
            scores = score_units(units, task.criterion, task.seed)
        _PREPARED.update(key=key, value=(units, scores, judge))
    return _PREPARED["value"]  # type: ignore[no-any-return]


_PREPARED: dict[str, Any] = {}  # of the last task that this process worked for


def check_plot(path: Path) -> None:
    """Raises `UsageError` where matplotlib isn't installed, or can't write such a file."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise UsageError(f"--plot {path}: give a name that ends in .png, .svg or another of {', '.join(sorted(kinds))}")


def plot(found: Sensitivity, path: Path) -> None:
    """Draws the curves, the most sensitive groups in colour. Raises `UsageError` as `check_plot` does."""
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    order = sorted(found.curves, key=lambda curve: -max(curve.drops))
    for rank, curve in enumerate(order):
        named = rank < 10
        axes.plot(
            (0, *curve.ratios), (0, *(-drop for drop in curve.drops)), marker="o", markersize=3,
            color=None if named else "lightgray", label=curve.group if named else None, zorder=2 if named else 1,
        )  # fmt: skip
    axes.set(
        xlabel="share of the group's units removed", ylabel=f"change of {found.metric}", title=Path(found.model).name
    )
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
