"""The folder of a run: what it was started with, and the results of every long step."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import filelock

from onnxprune.choosing.select import Keep
from onnxprune.errors import UsageError
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.sources import ImageOptions
from onnxprune.graph.files import sha256, write_json
from onnxprune.running.options import RunOptions

MARKER = "config.json"
LOCK = ".lock"
COMPARED = ("model_sha256", "data", "evaluation", "prior", "loss", "options")  # what must be the same to go on
KEYS = {"model_sha256", "data", "evaluation", "options"}
WORDS = {"model_sha256": "another model", "data": "other --data", "evaluation": "other data to measure on"}


@dataclass(frozen=True)
class Command:
    """What a run was called with, beside its options, so that its folder is enough to go on.

    `data` and `eval_data` are sources as for `load_data`; `arrays` says that they were given as arrays, which aren't
    kept. `folder` is the one it was started in.
    """

    model: str
    output: str
    folder: str
    data: list[str] | None
    eval_data: list[str] | None
    images: ImageOptions | None
    arrays: bool

    @staticmethod
    def of(model: Path, data: Any, eval_data: Any, output: Path, images: ImageOptions | None) -> Command:
        """The command of a run, with paths that hold from any folder."""
        arrays = isinstance(data, Mapping) or isinstance(eval_data, Mapping)
        places = [None if arrays or not each else _sources(each) for each in (data, eval_data)]
        return Command(str(model.resolve()), str(output.resolve()), os.getcwd(), places[0], places[1], images, arrays)


def _sources(given: Any) -> list[str]:
    listed = [given] if isinstance(given, str | os.PathLike) else list(given)
    return [str(Path(each).resolve()) if Path(each).exists() else str(each) for each in listed]


def configuration(
    source: Path, train: Dataset | None, evaluation: Dataset, options: RunOptions, command: Command
) -> dict[str, Any]:
    """What must be the same for a run to be resumed, and the command to do so."""
    return {
        "model_sha256": sha256(source),
        "data": train.digest() if train is not None else None,
        "evaluation": evaluation.digest(),
        "prior": sha256(Path(options.prior)) if options.prior else None,
        "loss": [sha256(Path(each)) for each in options.loss_options.labels if Path(each).is_file()],
        "options": json.loads(json.dumps(asdict(options))),
        "command": asdict(command),
    }


def load_command(folder: Path) -> tuple[Command, RunOptions]:
    """What the run of a folder was called with. Raises `UsageError` where that can't be told."""
    before = _configuration_of(folder)
    if before is None or "command" not in before:
        raise UsageError(f"{folder} holds no run that can be resumed by its folder alone; repeat its whole command")
    if before["command"]["arrays"]:
        raise UsageError(f"{folder}: the run was given arrays, which it doesn't keep: repeat its call with resume=True")
    try:
        images = before["command"].pop("images")
        options = {name: _tuples(value) for name, value in before["options"].items()}
        options["keep"] = tuple(Keep(**each) for each in before["options"]["keep"])
        known = ImageOptions(**{name: _tuples(value) for name, value in images.items()}) if images else None
        return Command(**before["command"], images=known), RunOptions(**options)
    except (TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{folder / MARKER} can't be read: {error}; repeat the whole command with --resume") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@contextlib.contextmanager
def opened_workspace(folder: Path, config: dict[str, Any], resume: bool, overwrite: bool) -> Iterator[None]:
    """An empty run folder, or one whose run was started with the same configuration; for one run at a time.

    A folder that isn't a run's is never emptied, and a run's only with `overwrite`. Raises `UsageError` when it can't
    be used.
    """
    before = _configuration_of(folder)
    if resume:
        _check_same(folder, before, config)
    elif folder.exists() and before is None and (not folder.is_dir() or set(os.listdir(folder)) - {LOCK}):
        raise UsageError(f"{folder} is not empty and not a run folder; choose another --run-dir")
    elif before is not None and not overwrite:
        raise UsageError(
            f"{folder} holds a run already: --resume goes on, --overwrite starts anew, or name another --run-dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(f"another run works in {folder}: wait for it, or name another --run-dir") from None
    except OSError as error:
        raise UsageError(f"can't create {folder}: {error.strerror}; choose another --run-dir") from error
    try:
        if not resume:
            _empty(folder)
            write_json(folder / MARKER, config)
        yield
    finally:
        lock.release()


def _empty(folder: Path) -> None:
    for each in folder.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each, ignore_errors=True)
        elif each.name != LOCK:
            each.unlink()


def _check_same(folder: Path, before: dict[str, Any] | None, config: dict[str, Any]) -> None:
    """Raises `UsageError` naming what differs from what a run was started with."""
    if before is None:
        raise UsageError(f"{folder} holds no run to resume; leave out --resume, or name it with --run-dir")
    changed = [name for name in COMPARED if before.get(name) != config[name]]
    if not changed:
        return
    said = [WORDS.get(name, f"another --{name}") for name in changed if name != "options"]
    if "options" in changed:
        names = [field.name for field in fields(RunOptions)]
        for name in names:
            was, now = before["options"].get(name), config["options"].get(name)
            if was != now:
                said.append(f"--{name.replace('_', '-')} {_said(was)} instead of {_said(now)}")
    raise UsageError(f"{folder} is a run with {', '.join(said)}: repeat its command, or give --resume --run-dir alone")


def _said(value: Any) -> str:
    return "unset" if value is None or value == [] else str(value)


def _configuration_of(folder: Path) -> dict[str, Any] | None:
    """What the run of a folder was started with; None for a folder of anything else, which may have such a file too."""
    try:
        content = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.keys() >= KEYS else None
