"""What the terminal shows: progress with time left on stderr, tables on stdout."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from onnxprune.graph.files import finite
from onnxprune.progress import Listener
from onnxprune.running.report import Report, Side

QUIET_SECONDS = 15  # between lines when stderr is not a terminal


def say(text: str) -> None:
    """A line on stderr."""
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)


def show(table: Table) -> None:
    """A table on stdout, not squeezed when that isn't a terminal."""
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def print_json(content: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(finite(content)))


class TerminalListener(Listener):
    """Shows a bar with the time left on a terminal, and a line now and then elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, soft_wrap=True)
        self.live = sys.stderr.isatty()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            TimeElapsedColumn(),
            TextColumn("left"),
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
        self.bar.update(self.task, description=text, total=None)
        if not self.live:
            say(text)

    def progress(self, text: str, done: int, total: int) -> None:
        """The current step is `done` of `total`."""
        self._phase(text.split(",")[0])
        self.bar.update(self.task, description=text, completed=done, total=total)
        now = time.monotonic()
        if not self.live and (now - self.told > QUIET_SECONDS or done == total):
            left = (now - self.started) / max(done, 1) * (total - done)
            say(f"{text} ({done}/{total}, {left:.0f} s left)")
            self.told = now

    def note(self, text: str) -> None:
        """Something worth keeping on the screen."""
        self.bar.console.print(text, markup=False, highlight=False)

    def _phase(self, name: str) -> None:
        if name != self.phase:
            self.phase, self.started = name, time.monotonic()
            self.bar.reset(self.task)


def report_tables(report: Report) -> list[Table]:
    """The before/after table and the widths of the layers."""
    return [before_after(report), width_table(report)]


def before_after(report: Report) -> Table:
    """What was, what is, and the change."""
    table = Table(title="before and after")
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
        word = "faster" if ratio["speedup"] >= 1 else "as fast"
        faster = f"{ratio['speedup']:.2f}x {word} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        table.add_row(f"latency on {name}, ms, median", f"{before['median']:.3f}", f"{after['median']:.3f}", faster)
        table.add_row(f"latency on {name}, ms, p90", f"{before['p90']:.3f}", f"{after['p90']:.3f}", "")
        if a.memory_bytes.get(provider):
            x, y = a.memory_bytes[provider], b.memory_bytes[provider]
            table.add_row(f"memory on {name}, MB", f"{x / 1e6:.1f}", f"{y / 1e6:.1f}", share(x, y))
    return table


def _metric_rows(table: Table, report: Report, a: Side, b: Side) -> None:
    if a.metric is not None and b.metric is not None:
        change = b.metric["value"] - a.metric["value"]
        table.add_row(a.metric["name"], f"{a.metric['value']:.2f}", f"{b.metric['value']:.2f}", f"{change:+.2f}")
    else:
        table.add_row("accuracy", "not measured", "not measured", "")
    if a.metric is None or a.metric["name"] != "cosine":
        table.add_row("cosine to the uncut outputs, %", "100.00", f"{b.fidelity['cosine']:.2f}", "")


def share(before: float, after: float) -> str:
    """What is left, in percent."""
    return f"{100 * after / before:.1f} %" if before else ""


def width_table(report: Report) -> Table:
    """Output channels of every layer; layers that kept all are only counted."""
    table = Table(title="widths")
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
