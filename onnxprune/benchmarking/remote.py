"""Benchmarks on other machines: a folder with the models and one script, copied there by ssh or by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.benchmarking import interleave
from onnxprune.benchmarking.bench import BenchResult, Runtime, results_of
from onnxprune.errors import UsageError
from onnxprune.evaluating.evaluate import inputs_to_time
from onnxprune.graph.files import write_json
from onnxprune.graph.model import open_model, save_model

SCRIPT = "bench_here.py"
PATIENCE = 120  # seconds beyond those of the runs that a device may take


def write_bundle(
    paths: Sequence[Path],
    folder: Path,
    providers: Sequence[str],
    runtime: Runtime,
    batch: int,
    seconds: float,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """A folder that any machine with Python, numpy and onnxruntime can run: `python3 FOLDER/bench_here.py`.

    `providers` are full names, those of the device. Raises `UsageError` where the folder can't be written,
    or holds anything else.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SCRIPT).exists():
        raise UsageError(f"{folder} is not empty, and not from an earlier benchmark; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(interleave.__file__, folder / SCRIPT)
    except OSError as error:
        raise UsageError(f"can't write {folder}: {error.strerror}; choose another folder") from error
    names = [f"model{index}.onnx" for index in range(len(paths))]
    models = [open_model(path) for path in paths]
    for model, name in zip(models, names, strict=True):
        save_model(model, folder / name)
    np.savez(folder / "inputs.npz", **inputs_to_time(paths[0], 0, batch, shapes))  # type: ignore[arg-type]
    settings = {"models": names, "providers": list(providers), "seconds": seconds, **asdict(runtime)}
    write_json(folder / "settings.json", settings)


def full_name(provider: str) -> str:
    """The full name of a device's execution provider, whether or not it is installed here."""
    known = {
        **{"cpu": "CPU", "cuda": "CUDA", "tensorrt": "Tensorrt", "openvino": "OpenVINO", "xnnpack": "Xnnpack"},
        **{"acl": "ACL", "armnn": "ArmNN", "coreml": "CoreML", "nnapi": "Nnapi", "qnn": "QNN", "dml": "Dml"},
    }
    short = provider.removesuffix("ExecutionProvider")
    return f"{known.get(short.lower(), short)}ExecutionProvider"


def bench_by_ssh(
    host: str,
    paths: Sequence[Path],
    providers: Sequence[str] = ("cpu",),
    runtime: Runtime | None = None,
    batch: int = 1,
    seconds: float = 5.0,
    python: str = "python3",
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> tuple[list[BenchResult], str]:
    """The figures of `bench_models` on another machine, and what machine that is. `host` is [user@]host[:port].

    Needs ssh here and there, and on the machine `python` with numpy and onnxruntime; nothing stays there.
    Raises `UsageError` with the machine's own words where something fails.
    """
    name, _, port = host.partition(":")
    ssh = ["ssh", "-o", "BatchMode=yes", *(["-p", port] if port else []), name]
    full = [full_name(provider) for provider in providers]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        write_bundle(paths, folder, full, runtime or Runtime(), batch, seconds, shapes)
        archive = shutil.make_archive(str(Path(scratch) / "bundle"), "tar", folder)
        command = (
            f"d=$(mktemp -d) && trap 'rm -rf \"$d\"' EXIT && tar -xf - -C \"$d\" && {python} \"$d/{SCRIPT}\""
        )  # fmt: skip
        with open(archive, "rb") as bundle:
            done = _run([*ssh, command], bundle, len(full) * seconds * len(paths) + PATIENCE)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise UsageError(f"--target ssh:{host}: {reason}") from None
    results = []
    for provider, part in found["providers"].items():
        rows, starts = np.array(part["rows"]), [tuple(pair) for pair in part["starts"]]
        results += results_of(paths, provider, rows, starts, [0] * len(paths))
    return results, str(found["machine"])


def _run(command: list[str], stdin: Any, patience: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, stdin=stdin, capture_output=True, text=True, timeout=patience, check=False)
    except FileNotFoundError:
        raise UsageError("--target ssh needs the program ssh, which isn't here") from None
    except subprocess.TimeoutExpired:
        raise UsageError(f"--target ssh: no answer in {patience:.0f} s") from None
