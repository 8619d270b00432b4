"""How many threads work: as asked for, as `OMP_NUM_THREADS` says, or as many as there are."""

from __future__ import annotations

import os

from onnxruntime import SessionOptions


def allowed_threads(asked: int | None = None) -> int | None:
    """The threads asked for; else what the environment variable allows, which onnxruntime by itself doesn't heed."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return asked or (int(given) if given.isdigit() and int(given) else None)


def number_of_threads(asked: int | None = None) -> int:
    """The same, and the number of cores where nothing is said."""
    return allowed_threads(asked) or os.cpu_count() or 1


def session_options(threads: int | None = None) -> SessionOptions:
    """Options for a session with this many threads (None: what is allowed, or onnxruntime's choice)."""
    options = SessionOptions()
    if (allowed := allowed_threads(threads)) is not None:
        options.intra_op_num_threads = allowed
        options.inter_op_num_threads = 1
    return options
