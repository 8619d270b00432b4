"""The folder of a run: what it was started with, and the results of every long step."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onnxprune.errors import UsageError
from onnxprune.evaluating.data import Dataset
from onnxprune.graph.files import sha256, write_json
from onnxprune.running.options import RunOptions

MARKER = "config.json"
KEYS = {"model_sha256", "data", "evaluation", "options"}


def configuration(source: Path, train: Dataset | None, evaluation: Dataset, options: RunOptions) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    return {
        "model_sha256": sha256(source),
        "data": train.digest() if train is not None else None,
        "evaluation": evaluation.digest(),
        "prior": sha256(Path(options.prior)) if options.prior else None,
        "loss": [sha256(Path(each)) for each in options.loss_options.labels if Path(each).is_file()],
        "options": json.loads(json.dumps(asdict(options))),
    }


def open_workspace(folder: Path, config: dict[str, Any], resume: bool) -> None:
    """Makes an empty run folder, or checks that the one to resume was started with the same configuration.

    A folder that isn't a run's is never emptied. Raises `UsageError` when it can't be used.
    """
    before = _configuration_of(folder)
    if resume:
        if before is None:
            raise UsageError(f"{folder} holds no run to resume; leave out --resume, or name it with --run-dir")
        changed = [name for name in config if before.get(name) != config[name]]
        if changed:
            raise UsageError(f"{folder} is a run with another {' and '.join(changed)}; repeat its command to resume it")
        return
    if folder.exists() and before is None and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty and not a run folder; choose another --run-dir")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"can't create {folder}: {error.strerror}; choose another --run-dir") from error
    write_json(folder / MARKER, config)


def _configuration_of(folder: Path) -> dict[str, Any] | None:
    """What the run of a folder was started with; None for a folder of anything else, which may have such a file too."""
    try:
        content = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.keys() >= KEYS else None
