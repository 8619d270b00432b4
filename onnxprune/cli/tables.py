"""What a run, or one cut, comes to, as tables."""

from __future__ import annotations

from rich.table import Table

from onnxprune.cli.output import PlainTable
from onnxprune.running.report import Report, Side, decimals

FIGURES = {  # what stands beside the metric
    "fidelity": "spread of the outputs kept (fidelity)",
    "agreement": "answers as before (agreement)",
    "spearman": "similarities of samples kept (Spearman)",
}


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
