"""Runs of several models in turns, timed. It stands alone: `bench --target` sends this file to devices as it is.

There it needs Python 3.8, numpy and onnxruntime, and prints one JSON object: what `bench_models` makes its figures of.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple  # noqa: UP035 - devices have old Pythons

WARM_UP = 5
FEWEST_RUNS, MOST_RUNS = 20, 2000  # of a model, in all parts
FEWEST_PARTS, MOST_PARTS = 4, 10
LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
ON_GPU = ("CUDAExecutionProvider", "TensorrtExecutionProvider")

Rows = List[List[List[float]]]  # noqa: UP006 - by model and part


def interleave(
    openers: Sequence[Callable[[], Any]],
    feeds: Dict[str, Any],  # noqa: UP006
    seconds: float,
    enough: Callable[[Rows], bool] = lambda rows: False,
) -> Tuple[Rows, List[Tuple[float, float]]]:  # noqa: UP006
    """Seconds of every run by model and part; and for each model those of opening its session and of its first run.

    Runs take turns, so that whatever else the machine does hits all models, and the order turns too. Where a session
    lies in memory changes its time by a percent or two, and the first to be opened tends to be the slowest: so in each
    part all are opened anew, in another order. All parts have the same number of runs, as many as the seconds allow;
    `enough` may end it after any part but the first few.
    """
    rows: Rows = [[] for _ in openers]
    starts: List[Tuple[float, float]] = []  # noqa: UP006
    part, parts, runs = 0, FEWEST_PARTS, 0
    while part < parts and not (part >= FEWEST_PARTS and enough(rows)):
        sessions, opened, once = _open_all(openers, feeds, part)
        if not runs:
            starts = opened
            apart = sum(load + first for load, first in starts) + WARM_UP * once
            parts = int(min(MOST_PARTS, max(FEWEST_PARTS, seconds / apart)))
            runs = int(max(FEWEST_RUNS / parts, min(MOST_RUNS / parts, seconds / parts / once)))
        for row in rows:
            row.append([])
        for run in range(runs):
            turn = run % len(sessions)
            for index in [*range(turn, len(sessions)), *range(turn)]:
                before = time.perf_counter()
                sessions[index].run(None, dict(feeds))
                rows[index][-1].append(time.perf_counter() - before)
        part += 1
        del sessions
    return rows, starts


def _open_all(
    openers: Sequence[Callable[[], Any]],
    feeds: Dict[str, Any],  # noqa: UP006
    part: int,
) -> Tuple[List[Any], List[Tuple[float, float]], float]:  # noqa: UP006
    """The sessions, warm; seconds of opening each and of its first run; and seconds of a later run of all of them."""
    sessions: List[Any] = [None] * len(openers)  # noqa: UP006
    starts = [(0.0, 0.0)] * len(openers)
    for place in range(len(openers)):
        index = (place + part) % len(openers)
        before = time.perf_counter()
        sessions[index] = openers[index]()
        opened = time.perf_counter()
        sessions[index].run(None, dict(feeds))
        starts[index] = (opened - before, time.perf_counter() - opened)
    before = time.perf_counter()
    for session in sessions:
        for _ in range(WARM_UP):
            session.run(None, dict(feeds))
    return sessions, starts, (time.perf_counter() - before) / WARM_UP


class Bound:
    """A session whose inputs and outputs stay where the execution provider keeps them: its device, if it has one."""

    def __init__(self, onnxruntime: Any, session: Any) -> None:
        self.ort, self.session = onnxruntime, session
        self.binding: Any = None
        self.device = "cuda" if session.get_providers()[0] in ON_GPU else "cpu"

    def run(self, names: Any, feeds: Dict[str, Any]) -> None:  # noqa: UP006
        """Runs on the inputs of the first call; the results are left where they are."""
        if self.binding is None:
            self.binding = self.session.io_binding()
            for name, array in feeds.items():
                self.binding.bind_ortvalue_input(name, self.ort.OrtValue.ortvalue_from_numpy(array, self.device, 0))
            for output in self.session.get_outputs():
                self.binding.bind_output(output.name, self.device)
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()


def open_as(onnxruntime: Any, path: str, provider: str, settings: Dict[str, Any]) -> Any:  # noqa: UP006
    """A session as the settings have it: threads, optimization, provider_options and bound (see `bench.Runtime`).

    Ends the program where the provider can't be loaded: onnxruntime would go on with the CPU.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if settings["threads"]:
        options.intra_op_num_threads = settings["threads"]
        options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[settings["optimization"]])
    session = onnxruntime.InferenceSession(path, options, providers=[(provider, settings["provider_options"])])
    if provider not in session.get_providers():
        sys.exit(f"{provider} is in this onnxruntime but can't be loaded here")
    return Bound(onnxruntime, session) if settings["bound"] else session


def main() -> None:
    """On a device: times the models of `settings.json` in this file's folder, on the inputs of `inputs.npz`."""
    import numpy as np
    import onnxruntime

    folder = Path(__file__).resolve().parent
    settings = json.loads((folder / "settings.json").read_text())
    with np.load(str(folder / "inputs.npz")) as arrays:
        feeds = dict(arrays)
    found: Dict[str, Any] = {"providers": {}}  # noqa: UP006
    for provider in settings["providers"]:
        if provider not in onnxruntime.get_available_providers():
            sys.exit(f"{provider} isn't in this onnxruntime: {onnxruntime.get_available_providers()}")
        openers = [partial(open_as, onnxruntime, str(folder / m), provider, settings) for m in settings["models"]]
        rows, starts = interleave(openers, feeds, settings["seconds"])
        found["providers"][provider] = {"rows": rows, "starts": starts}
    found["machine"] = (
        f"{platform.machine()}, Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
