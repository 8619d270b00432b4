"""What a run is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_type_hints

from onnxprune.checks import check_option
from onnxprune.choosing.layers import check_norm
from onnxprune.choosing.select import Keep
from onnxprune.choosing.threshold import CONTROLLERS, MOVES, Controller, MoveName, Schedule, check_initial
from onnxprune.errors import UsageError
from onnxprune.exporting.quantise import Numbers
from onnxprune.labels.solve import Granularity
from onnxprune.scoring.activations import ACTIVATION_CRITERIA
from onnxprune.scoring.gradients import GRADIENT_CRITERIA
from onnxprune.scoring.score import CRITERIA, Scope
from onnxprune.training.losses import Loss
from onnxprune.training.runtime import Trainer

RunScope = Literal[Scope, "priced"]
Weight = tuple[str, float]
RESOURCES = {"macs": "MACs", "params": "parameters", "size": "bytes", "units": "units", "latency": "time"}
LEAST = {  # what numbers must be at least
    "rounds": 1, "round_to": 1, "threads": 1, "batch": 1, "memory": 1, "stop_after": 1, "epochs": 0, "sparsify": 0,
    "layers": 0, "seed": 0, "features": 0, "mix": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Allowance:
    """What may be lost: `amount` in points or in an error's unit, or relative to the uncut model's metric."""

    amount: float
    relative: bool = False

    @staticmethod
    def of(asked: float | str | None) -> Allowance | None:
        """What `--max-drop` says. Raises `UsageError` for what isn't a number of 0 or more, or one with a `%`."""
        if asked is None:
            return None
        text = str(asked).strip()
        try:
            amount = float(text.removesuffix("%"))
        except ValueError:
            amount = math.nan
        if not (math.isfinite(amount) and amount >= 0):
            raise UsageError(f"--max-drop {asked}: give a number of 0 or more, or one with a % sign, such as 2%")
        return Allowance(amount / 100, True) if text.endswith("%") else Allowance(amount)

    def within(self, uncut: float, scale: float | None) -> float:
        """What may be lost, in the metric's unit."""
        if self.relative:
            return self.amount * abs(uncut)
        return self.amount if scale is None else self.amount * scale / 100


@dataclass(frozen=True)
class RunOptions:
    """Everything that decides a run's result besides the model and the data.

    Targets are shares that may remain (0.5 = half). `max_drop` is what may be lost: a number is points, hundredths of
    the metric's scale, or for errors in their own unit; "2%" is relative to the uncut model's. Below `floor`, the share
    of what the uncut model has above guessing, nothing is handed over, unless `force` is set. `weigh` has weights of
    outputs in fidelity, by name. `round_to` None is automatic, `rounds`, `layers`, `epochs`, `batch` and `lr` None are
    chosen by the run; `layers` is how many may go at most. `prior` is what `sensitivity` wrote. `moves` are what may
    move the threshold; `controller`, `initial_tau` and `alpha` are of the published rules (`choosing/threshold.py`),
    and `layer_norm` is by which norm of their weights layers go, in place of their prices.
    `minutes` end the fine-tuning of all rounds together, `sparsify` is epochs before each cut in which what goes fades.
    `memory` bounds, in MB, what repair holds beside models and runtime; None is 2048. `quantize` makes the numbers of
    the result smaller, unless that costs more than may be lost.
    Raises `UsageError` for values that don't fit.
    """

    target_macs: float | None = None
    target_params: float | None = None
    target_size: float | None = None
    target_latency: float | None = None
    target_units: float | None = None
    max_drop: float | str | None = None
    floor: float = 0.5
    force: bool = False
    weigh: tuple[Weight, ...] = ()
    rounds: int | None = None
    epochs: int | None = None
    minutes: float | None = None
    sparsify: int = 0
    lr: float | None = None
    criterion: str = "auto"
    scope: RunScope | Literal["auto"] = "auto"
    granularity: Granularity = "auto"
    kinds: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    keep: tuple[Keep, ...] = ()
    layers: int | Literal["auto"] | None = None
    layer_norm: str | None = None
    prior: str | None = None
    round_to: int | None = None
    metric: str | None = None
    controller: Controller = "bisect"
    initial_tau: str = "deviation"
    alpha: float = 0.9
    moves: tuple[MoveName, ...] = MOVES
    schedule: Schedule = "even"
    providers: tuple[str, ...] = ("cpu",)
    threads: int | None = None
    memory: int | None = None
    seed: int = 0
    trainer: Trainer = "auto"
    loss: str | tuple[str, ...] = ()
    ignore_index: int | None = None
    distil: tuple[str, ...] = ()
    distillation: float = 0.8
    temperature: float = 2.0
    smoothing: float = 0.0
    features: float = 1.0
    mix: float = 0.0
    ema: float = 0.0
    stop_after: int | None = None
    freeze: tuple[str, ...] = ()
    batch_statistics: bool = False
    batch: int | None = None
    bench_seconds: float = 4.0
    quantize: Numbers | None = None

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(RunOptions).items():
            check_option(name, getattr(self, name), hint, LEAST.get(name))
        for name, share in self.weigh:
            if not (math.isfinite(share) and share >= 0):
                raise UsageError(f"--weigh {name}={share:g}: give a weight of 0 or more")
        Allowance.of(self.max_drop)
        if not self.floor <= 1:
            raise UsageError(f"--floor {self.floor:g}: give a share of at most 1; 0 is what guessing has")
        for name, value in self.targets.items():
            if not 0 < value < 1:
                raise UsageError(f"--target-{name} {value:g}: give the share that may remain, between 0 and 1")
        if self.layer_norm is not None:
            check_norm(self.layer_norm)
            if self.scope in ("auto", "priced"):
                raise UsageError(
                    "--layer-norm: norms stand beside scores, not prices: give --scope raw, or another one"
                )
        elif self.layers and self.scope not in ("auto", "priced"):
            raise UsageError(f"--layers {self.layers}: layers have prices, so --scope {self.scope} can't choose them")
        if self.minutes is not None and self.epochs == 0:
            raise UsageError("--minutes are for fine-tuning, which --epochs 0 turns off: give one of them")
        criteria = (*CRITERIA, *ACTIVATION_CRITERIA, *GRADIENT_CRITERIA, "auto")
        if self.criterion not in criteria:
            raise UsageError(f"--criterion {self.criterion}: there is none; known: {', '.join(criteria)}")
        self._check_thresholds()
        if not 0 <= self.alpha < 1:
            raise UsageError(f"--alpha {self.alpha:g}: give a decay of at least 0 and below 1")
        for name in ("distillation", "smoothing", "ema"):
            if not 0 <= (share := getattr(self, name)) <= 1 - (name == "ema") * 1e-6:
                raise UsageError(f"--{name} {share:g}: give a share of 0 or more, and below 1")
        for name in ("minutes", "temperature", "lr", "bench_seconds"):
            if (number := getattr(self, name)) is not None and not number > 0:
                raise UsageError(f"--{name.replace('_', '-')} {number:g}: give more than 0")

    def _check_thresholds(self) -> None:
        """Refuses what no threshold would heed."""
        check_initial(self.initial_tau)
        default = RunOptions.__dataclass_fields__
        if self.controller == "bisect":
            for name in ("initial_tau", "alpha"):
                if (chosen := getattr(self, name)) != default[name].default:
                    raise UsageError(
                        f"--{name.replace('_', '-')} {chosen}: the bisect controller measures and needs none; give "
                        f"--controller {' or '.join(CONTROLLERS[1:])}"
                    )
        elif self.targets:
            raise UsageError(
                f"--controller {self.controller}: it moves the threshold by what was lost of --max-drop; a target says "
                "how far to go by itself: leave one of them out"
            )
        if "performance" not in self.moves:
            raise UsageError("--moves: performance says how far; give it too")
        if self.prior is not None and (self.scope == "priced" or (self.layers and not self.layer_norm)):
            raise UsageError("--prior: it stands in for prices, by which layers and the scope priced go: leave one out")
        if "structure" not in self.moves and ((self.layers and not self.layer_norm) or self.scope == "priced"):
            raise UsageError("--moves without structure: layers and the scope priced are what it decides; give it too")

    @property
    def prices(self) -> bool:
        """Whether prices may be measured: not where what was measured before stands in for them."""
        return "structure" in self.moves and self.scope in ("auto", "priced") and self.prior is None

    @property
    def loss_options(self) -> Loss:
        """What is asked of the loss."""
        labels = (self.loss,) if isinstance(self.loss, str) else self.loss
        return Loss(labels, self.distil, self.distillation, self.temperature, self.smoothing, self.features, self.mix)

    @property
    def targets(self) -> dict[str, float]:
        """The shares asked for, by resource."""
        given = {name: getattr(self, f"target_{name}") for name in RESOURCES}
        return {name: value for name, value in given.items() if value is not None}
