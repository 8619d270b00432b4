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
from onnxprune.running.report import Report, Side, decimals

FIGURES = {  # what stands beside the metric
    "fidelity": "spread of the outputs kept (fidelity)",
    "agreement": "answers as before (agreement)",
    "spearman": "similarities of samples kept (Spearman)",
}
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

    def __init__(self) -> None:
        self.console = _console(stderr=True, soft_wrap=True)
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

    def _phase(self, name: str) -> None:
        if name != self.phase:
            self.phase, self.started = name, time.monotonic()
            self.bar.reset(self.task)


def report_tables(report: Report) -> list[Table]:
    """The before/after table and the widths of the layers."""
    return [before_after(report), width_table(report)]


def before_after(report: Report) -> Table:
    """What was, what is, and the change."""
    table = PlainTable("before and after")
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    a, b = report.baseline, report.pruned
    table.add_row("MACs", f"{a.macs:,}", f"{b.macs:,}", share(a.macs, b.macs))
    table.add_row("parameters", f"{a.params:,}", f"{b.params:,}", share(a.params, b.params))
    table.add_row(
        "size on disk, kB",
        f"{a.size_bytes / 1e3:,.0f}",
        f"{b.size_bytes / 1e3:,.0f}",
        share(a.size_bytes, b.size_bytes),
    )
    _metric_rows(table, report, a, b)
    for provider, before in a.latency_ms.items():
        after, ratio = b.latency_ms[provider], report.speedup[provider]
        name = provider.removesuffix("ExecutionProvider")
        word = "faster" if ratio["low"] > 1 else "slower than it was" if ratio["high"] < 1 else "as fast"
        faster = f"{ratio['speedup']:.2f}x {word} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        table.add_row(f"latency on {name}, ms, median", f"{before['median']:.3f}", f"{after['median']:.3f}", faster)
        table.add_row(f"latency on {name}, ms, p90", f"{before['p90']:.3f}", f"{after['p90']:.3f}", "")
        if a.memory_bytes.get(provider):
            x, y = a.memory_bytes[provider], b.memory_bytes[provider]
            table.add_row(f"memory on {name}, MB", f"{x / 1e6:.1f}", f"{y / 1e6:.1f}", share(x, y))
    return table


def _metric_rows(table: Table, report: Report, a: Side, b: Side) -> None:
    """The metric before and after, and what else tells how near the answers are to the uncut model's."""
    quality = report.quality
    if a.metric is not None and b.metric is not None:
        before, after = a.metric["value"], b.metric["value"]
        places = decimals(before, after)
        table.add_row(a.metric["name"], f"{before:.{places}f}", f"{after:.{places}f}", f"{after - before:+.{places}f}")
        if quality.guess is not None and quality.metric != "fidelity":
            table.add_row("  a guess has", f"{quality.guess:.{places}f}", "", "")
    else:
        table.add_row("accuracy", "not measured", "not measured", "")
    for name, value in b.fidelity.items():
        if name == "kl":
            table.add_row("KL to the uncut answers, nats", "0", f"{value:.{decimals(0, value)}f}", "")
        elif (a.metric or {}).get("name") != name:
            table.add_row(f"{FIGURES[name]}, %", "100.00", f"{100 * value:.{decimals(100, 100 * value)}f}", "")
        if name == "fidelity" and (noisy := quality.noise.get(name)) is not None:
            places = decimals(100, 100 * noisy)
            table.add_row("  with inputs off by their rounding", f"{100 * noisy:.{places}f}", "", "")


def share(before: float, after: float) -> str:
    """What is left, in percent."""
    return f"{100 * after / before:.1f} %" if before else ""


def width_table(report: Report) -> Table:
    """Output channels of every layer; layers that kept all are only counted."""
    table = PlainTable("widths")
    for name in ("layer", "operator"):
        table.add_column(name)
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    changed = [width for width in report.widths if width.before != width.after]
    for width in changed:
        table.add_row(width.layer, width.operator, str(width.before), str(width.after))
    if len(changed) < len(report.widths):
        table.caption = f"{len(report.widths) - len(changed)} more layers keep their width"
    return table
