"""The training runtime: onnxruntime-training-cpu, unpacked into a per-user cache beside the user's own onnxruntime.

The two can't share a site-packages, since both are a package called `onnxruntime`. The worker process gets the cache
folder first on its path; nothing else ever sees it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import onnxruntime
import platformdirs

from onnxprune.errors import TrainingError
from onnxprune.graph.model import is_loadable

Trainer = Literal["auto", "ort", "graph", "cuda"]
CUDA = "CUDAExecutionProvider"
VERSION = "1.19.2"
PACKAGE = "onnxruntime-training-cpu"
HASHES = {  # (Python, system) -> SHA-256 of the wheel of VERSION
    ("3.11", "Linux-x86_64"): "9b3cde497eb76af75ecae2eb2a4e3a8b2477da0b833315a3d5e2c63f0dc8d5d6",
    ("3.11", "Windows-AMD64"): "e84887e098f4dff9a39926f8fe9d44bd59d0804c77b08a072d686264fea10889",
    ("3.11", "Darwin-x86_64"): "ca021bfb7d087ec2f9b689825d4c24cd75082c0c8eb61c7fb5b178ed1977cbdc",
    ("3.11", "Darwin-arm64"): "ca021bfb7d087ec2f9b689825d4c24cd75082c0c8eb61c7fb5b178ed1977cbdc",
    ("3.12", "Linux-x86_64"): "4c8d4806c5070dc6c175e1a968e45d948588edbfe590b5ef9d42d3511d80e220",
    ("3.12", "Windows-AMD64"): "b13775b3e4820f47ef24ee36b5b820cb04890a59c07d884eed0f3e4008d5c66f",
    ("3.12", "Darwin-x86_64"): "29ce7b60bd9d20efc054cf6cf02608360e074ad437945985050d667874903840",
    ("3.12", "Darwin-arm64"): "29ce7b60bd9d20efc054cf6cf02608360e074ad437945985050d667874903840",
}
WITHOUT = "pruning, repair, evaluation and benchmarks work without it: use --epochs 0"


def here() -> tuple[str, str]:
    """This interpreter and system, as keys of `HASHES`."""
    return f"{sys.version_info.major}.{sys.version_info.minor}", f"{platform.system()}-{platform.machine()}"


def supported() -> bool:
    """Whether a training runtime exists for this interpreter and system."""
    return here() in HASHES


def choose_trainer(asked: Trainer) -> Literal["ort", "graph", "cuda"]:
    """What trains: ONNX Runtime training, or gradients as plain nodes on the user's onnxruntime where there is none."""
    return asked if asked != "auto" else "ort" if supported() else "graph"


def has_cuda() -> bool:
    """Whether the CUDA execution provider is there and can be loaded."""
    return CUDA in onnxruntime.get_available_providers() and is_loadable(CUDA)


def prepare_trainer(asked: Trainer, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """The training runtime's folder, installed if it must be; None for the trainer that needs none.

    Raises `TrainingError` as `install_runtime` does, or where a GPU is asked for and can't be used.
    """
    if asked == "cuda" and not has_cuda():
        raise TrainingError(
            f"this onnxruntime has no {CUDA} that can be loaded; install onnxruntime-gpu and what it needs "
            "('onnxprune doctor' shows it), or use --trainer auto"
        )
    return install_runtime(say=say) if choose_trainer(asked) == "ort" else None


def runtime_folder() -> Path:
    """Where the runtime of this interpreter and system lives in the per-user cache."""
    python, system = here()
    return Path(platformdirs.user_cache_dir("onnxprune")) / f"{PACKAGE}-{VERSION}-py{python}-{system}"


def find_runtime() -> Path | None:
    """The folder of an installed training runtime, or None."""
    folder = runtime_folder()
    return folder if (folder / "onnxruntime" / "training").is_dir() else None


def install_runtime(wheel: Path | None = None, say: Callable[[str], None] = lambda line: None) -> Path:
    """Puts the training runtime into the cache, from a wheel file or by pip, and returns its folder.

    The wheel is checked against its pinned hash before anything is unpacked, and appears in the cache whole or not at
    all. Raises `TrainingError` when no wheel exists for this platform, it can't be had, or its hash differs.
    """
    if wheel is not None and not wheel.is_file():
        raise TrainingError(f"{wheel}: no such file; give a wheel of {PACKAGE} {VERSION}")
    if (folder := find_runtime()) is not None:
        return folder
    python, system = here()
    if not supported():
        raise TrainingError(
            f"fine-tuning isn't available on Python {python}, {system}: {PACKAGE} {VERSION} has wheels for Python 3.11 "
            f"and 3.12 on Linux x86-64, Windows and macOS only; use --trainer graph, or --epochs 0"
        )
    folder = runtime_folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            if wheel is None:
                say(f"installing the training runtime {PACKAGE} {VERSION} (9 MB, once) …")
                wheel = _download(Path(scratch))
            _check_hash(wheel)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(scratch) / "unpacked")
            shutil.rmtree(folder, ignore_errors=True)
            (Path(scratch) / "unpacked").replace(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise TrainingError(f"the training runtime can't be installed into {folder}: {error}; {WITHOUT}") from error
    say(f"training runtime installed in {folder}")
    return folder


def _download(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise TrainingError(
            f"the training runtime is missing and there is no pip here to fetch it: download {PACKAGE} {VERSION} "
            f"elsewhere and run 'onnxprune doctor --install-training WHEEL'; {WITHOUT}"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise TrainingError(
            f"the training runtime can't be fetched: {reason}; without a network run "
            f"'onnxprune doctor --install-training WHEEL'; {WITHOUT}"
        )
    return wheels[0]


def _check_hash(wheel: Path) -> None:
    if not wheel.is_file():
        raise TrainingError(f"{wheel}: no such file; give the {PACKAGE} {VERSION} wheel for {' on '.join(here())}")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != HASHES[here()]:
        raise TrainingError(
            f"{wheel} is not the {PACKAGE} {VERSION} wheel for {' on '.join(here())}: its SHA-256 is {found[:16]}…, "
            f"expected {HASHES[here()][:16]}…; nothing was installed"
        )
