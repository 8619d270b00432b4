"""What a run found, as data: report.json and the tables are made from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnxprune.bench import BenchResult


@dataclass(frozen=True)
class Side:
    """One model: the uncut baseline or the pruned one."""

    path: str
    macs: int
    params: int
    size_bytes: int
    metric: dict[str, Any] | None
    fidelity: dict[str, float]
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Width:
    """A layer's output channels before and after."""

    layer: str
    operator: str
    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """A whole run. `target` says what was asked and reached; `rounds` what each round tried."""

    baseline: Side
    pruned: Side
    rounds: tuple[dict[str, Any], ...]
    widths: tuple[Width, ...]
    target: dict[str, Any]
    speedup: dict[str, dict[str, float]]
    notes: tuple[str, ...]
    run_dir: str
    options: dict[str, Any]
    versions: dict[str, str]
    model_sha256: str
    seconds: float

    @property
    def met(self) -> bool:
        """Whether what was asked was reached."""
        return bool(self.target["met"])

    def to_json(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self)


def latency_sides(results: list[BenchResult]) -> tuple[list[dict[str, dict[str, float]]], dict[str, dict[str, float]]]:
    """`latency_ms` of each model by provider, and the second model's speed-up over the first with its interval."""
    sides: dict[str, dict[str, dict[str, float]]] = {}
    speedup = {}
    for result in results:
        sides.setdefault(result.model, {})[result.provider] = asdict(result.latency)
        speedup[result.provider] = asdict(result.against_first)
    return list(sides.values()), speedup


def model_name(path: Path) -> str:
    """How a model is called in tables."""
    return path.name
