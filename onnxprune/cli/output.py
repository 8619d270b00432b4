"""What the terminal shows: progress with time left on stderr, tables on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import unicodedata
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from onnxprune.graph.files import finite
from onnxprune.progress import Listener

QUIET_SECONDS = 15  # between lines when stderr is not a terminal


def plain(text: str) -> str:
    """Text of models, data and exceptions as it is to be shown: control characters are spelt out, text is text."""
    return "".join(c if c in "\n\t" or not _controls(c) else c.encode("unicode_escape").decode() for c in text)


def _controls(character: str) -> bool:
    """Whether a character steers a terminal, or changes the direction of what stands beside it."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


class PlainTable(Table):
    """A table whose text is never markup, emoji or terminal control."""

    def __init__(self, title: str) -> None:
        super().__init__(title=plain(title))

    def add_row(self, *cells: str) -> None:  # type: ignore[override]
        """Adds cells of plain text."""
        super().add_row(*map(plain, cells))


def _console(**given: Any) -> Console:
    return Console(markup=False, emoji=False, highlight=False, **given)


@contextlib.contextmanager
def prints_elsewhere() -> Iterator[None]:
    """What anything but this module prints goes to stderr, from child processes too: stdout holds the answer alone."""
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    sys.stdout.flush()
    os.dup2(2, 1)
    answers, OUT.file = OUT.file, os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors="replace")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            OUT.file.flush()
        os.dup2(kept, 1)
        with contextlib.suppress(BrokenPipeError):
            OUT.file.close()
        OUT.file = answers


class Out:
    """Where answers go."""

    file: TextIO | None = None


OUT = Out()


def say(text: str) -> None:
    """A line on stderr."""
    _console(stderr=True, soft_wrap=True).print(plain(text))


def show(table: Table) -> None:
    """A table on stdout, not squeezed when that isn't a terminal."""
    file = OUT.file or sys.stdout
    _console(file=file, width=None if file.isatty() else 120).print(table)


def print_json(content: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(finite(content)), file=OUT.file or sys.stdout, flush=True)


class TerminalListener(Listener):
    """Shows a bar with the time left on a terminal, and a line now and then elsewhere."""

    def __init__(self, verbose: bool = False) -> None:
        self.console, self.verbose = _console(stderr=True, soft_wrap=True), verbose
        self.live = sys.stderr.isatty()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            TimeElapsedColumn(),
            TextColumn("left", markup=False),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.live)
        self.task = self.bar.add_task("", total=None)
        self.phase, self.started, self.told = "", time.monotonic(), time.monotonic()

    def __enter__(self) -> TerminalListener:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def stage(self, text: str) -> None:
        """A new step begins."""
        self._phase(text)
        self.bar.update(self.task, description=plain(text), total=None)
        if not self.live:
            say(text)

    def progress(self, text: str, done: int, total: int) -> None:
        """The current step is `done` of `total`."""
        self._phase(text.split(",")[0])
        self.bar.update(self.task, description=plain(text), completed=done, total=total)
        now = time.monotonic()
        if not self.live and (now - self.told > QUIET_SECONDS or done == total):
            left = (now - self.started) / max(done, 1) * (total - done)
            say(f"{text} ({done}/{total}, {left:.0f} s left)")
            self.told = now

    def note(self, text: str) -> None:
        """Something worth keeping on the screen."""
        self.bar.console.print(plain(text))

    def detail(self, text: str) -> None:
        """Something for who wants to see more (`--verbose`)."""
        if self.verbose:
            self.note(text)

    def _phase(self, name: str) -> None:
        if name != self.phase:
            self.phase, self.started = name, time.monotonic()
            self.bar.reset(self.task)
