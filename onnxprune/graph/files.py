"""Writing files whole or not at all, and digests."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnxprune.errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the folder of `path`; on success it is synced and renamed to `path`.

    Raises `UsageError` when the folder can't be written or the disk is full; `path` is then as it was.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}; choose another output path") from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}; nothing was changed there") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path` atomically. Raises `UsageError` when it can't."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON to `path` atomically. Raises `UsageError` when it can't."""
    write_bytes(path, (json.dumps(finite(content), indent=1) + "\n").encode())


def finite(content: Any) -> Any:
    """The same content with null for infinities and NaNs, which JSON has no words for."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def check_writable(path: Path) -> None:
    """Raises `UsageError` unless a file can be created at `path`, before any work is spent on it."""
    if path.is_dir():
        raise UsageError(f"can't write {path}: it is a folder; name a file")
    if not path.parent.is_dir():
        raise UsageError(f"can't write {path}: the folder {path.parent} doesn't exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"can't write {path}: no permission in {path.parent}; choose another output path")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def memoised(path: Path, compute: Callable[[], Any]) -> Any:
    """The JSON value in `path`; computed and written there first if there is none."""
    if not path.exists():
        write_json(path, compute())
    return json.loads(path.read_text())
