"""What the target likes: the steps in which widths cost time, and how fast its kinds of operators are.

The CPU provider tells its block itself: it pads the weights of a blocked convolution to it. Other providers are timed.
What was found is kept in the user's cache, by machine, provider, threads and onnxruntime version.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import platformdirs
from onnx import TensorProto, helper, numpy_helper

from onnxprune.benchmarking.interleave import Bound
from onnxprune.graph.files import write_json
from onnxprune.graph.model import open_session
from onnxprune.graph.threads import session_options

CPU = "CPUExecutionProvider"
KINDS = ("conv", "pointwise", "depthwise", "matmul")  # products, by what runs them
LAYERS, MANY, SIDE, WIDTH = 4, 24, 28, 64  # of the models that are timed
SPEED_WIDTHS = (4, 8, 16, 32, 64, 128)
FORMAT = 4  # of what is kept
READ = 1024  # width of products at one position, whose time is that of reading their weights
ROUNDS = 40
STEPS = (1, 2, 4, 8, 16, 32)
WIDTHS = (66, 71, 77, 84, 90, 97)  # odd ones, timed as they are and rounded up
FREE = 1.05  # times as slow as the best that still counts as equal


@dataclass(frozen=True)
class Probe:
    """A target: an execution provider with so many threads on one machine.

    `steps` are the multiples of widths by the kind of operator: in between, channels cost no time. `speed` is MACs per
    nanosecond at each of `SPEED_WIDTHS`, `weights` how many numbers of weights are read per nanosecond, `elements` what
    operators without products write per nanosecond, and `overhead` the nanoseconds of an operator with nothing to do.
    """

    machine: str
    provider: str
    threads: int | None
    onnxruntime: str
    steps: Mapping[str, int]
    speed: Mapping[str, Sequence[float]]
    weights: float
    elements: float
    overhead: float

    def speed_at(self, kind: str, width: float) -> float:
        """MACs per nanosecond of a kind of operator at a width, which is the root of inputs times outputs."""
        known = np.log(np.array(SPEED_WIDTHS))
        return float(np.exp(np.interp(np.log(max(width, 1)), known, np.log(self.speed[kind]))))

    def to_json(self) -> dict[str, Any]:
        """The probe as JSON."""
        return asdict(self)


REFERENCE = Probe(  # one core of a server with AVX-512, rounded: what channels cost where no machine is asked for
    machine="reference", provider=CPU, threads=1, onnxruntime="1.32",
    steps=dict.fromkeys(KINDS, 1),
    speed={
        "conv": (7, 19, 48, 77, 88, 89),
        "pointwise": (0.8, 3.6, 26, 48, 65, 75),
        "depthwise": (3, 7, 15, 15, 17, 17),
        "matmul": (3, 14, 34, 59, 78, 81),
    },
    weights=4, elements=2, overhead=1500,
)  # fmt: skip


def probe(provider: str = CPU, threads: int | None = None, fresh: bool = False) -> Probe:
    """The target's `Probe`, measured if it isn't in the cache or should be `fresh`; seconds on an idle machine."""
    path = cache_file(provider, threads)
    if path.exists() and not fresh:
        try:
            return Probe(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            path.unlink()  # written by another version
    found = _measure(provider, threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found.to_json())
    return found


def cache_file(provider: str, threads: int | None) -> Path:
    """Where the probe of a target is kept."""
    name = f"{machine_name()}-{provider}-{threads or 'all'}-{onnxruntime.__version__}-{FORMAT}.json"
    return Path(platformdirs.user_cache_dir("onnxprune")) / "probes" / name.replace(" ", "_").replace("/", "_")


def machine_name() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{named or platform.processor() or platform.machine()} {platform.machine()}"


@cache
def block_size() -> int:
    """The channels that the CPU provider's convolutions work on at a time; 1 where they aren't blocked.

    Read from the graph that onnxruntime makes: the weight of a blocked convolution with one output channel is padded to
    the block.
    """
    model = _chain("conv", 16, layers=1, outputs=1)
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(1)
        options.log_severity_level = 3  # it warns that the file is for this machine only
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])
        graph = onnx.load(options.optimized_model_filepath).graph
    blocked = [node.input[1] for node in graph.node if node.domain.endswith("nchwc") and node.op_type == "Conv"]
    return max((int(t.dims[0]) for t in graph.initializer if t.name in blocked), default=1)


def _measure(provider: str, threads: int | None) -> Probe:
    if provider == CPU:
        block = block_size()
        steps = {"conv": block, "pointwise": block, "depthwise": block, "matmul": 1}
    else:
        steps = {kind: _step(kind, provider, threads) for kind in KINDS}
    models = {f"{kind} {width}": _chain(kind, width) for kind in KINDS for width in SPEED_WIDTHS}
    models |= {"elements": _chain("elements", WIDTH), "few": _chain("elements", 1, side=1)}
    models["weights"] = _chain("matmul", READ, side=1)
    models["many"] = _chain("elements", 1, layers=MANY, side=1)
    took = dict(zip(models, _times(list(models.values()), provider, threads), strict=True))
    overhead = max(took["many"] - took["few"], 0) / (MANY - LAYERS)
    idle = took["few"] - LAYERS * overhead  # of a run, whatever the model
    layer = {name: max((took[name] - idle) / LAYERS - overhead, 1) for name in took}
    speed = {kind: [_macs(kind, width) / layer[f"{kind} {width}"] for width in SPEED_WIDTHS] for kind in KINDS}
    elements = WIDTH * SIDE * SIDE / layer["elements"]
    weights = READ * READ / layer["weights"]
    return Probe(machine_name(), provider, threads, onnxruntime.__version__, steps, speed, weights, elements, overhead)


def _step(kind: str, provider: str, threads: int | None) -> int:
    """The smallest multiple to which odd widths can be rounded up at no cost in time against any other."""
    wanted = {step: [-(-width // step) * step for width in WIDTHS] for step in STEPS}
    widths = sorted({width for each in wanted.values() for width in each})
    times = dict(zip(widths, _times([_chain(kind, width) for width in widths], provider, threads), strict=True))
    totals = {step: sum(times[width] for width in each) for step, each in wanted.items()}
    return next(step for step in reversed(STEPS) if totals[step] <= FREE * min(totals.values()))


def _times(models: Sequence[onnx.ModelProto], provider: str, threads: int | None) -> list[float]:
    """Nanoseconds of a run of each, the median of interleaved runs; inputs and outputs stay where the provider is."""
    kept, feeds = [], []
    for model in models:
        session = open_session(ir.from_proto(model), session_options(threads), [provider])
        kept.append(Bound(onnxruntime, session))
        shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
        feeds.append({"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)})
    rows = []
    for _ in range(ROUNDS + 3):
        row = []
        for bound, feed in zip(kept, feeds, strict=True):
            before = time.perf_counter_ns()
            bound.run(None, feed)
            row.append(time.perf_counter_ns() - before)
        rows.append(row)
    return [float(each) for each in np.median(np.array(rows[3:]), axis=0)]


def _macs(kind: str, width: int) -> int:
    places = SIDE * SIDE
    per_place = {"conv": 9 * width * width, "pointwise": width * width, "depthwise": 9 * width, "matmul": width * width}
    return places * per_place[kind]


def _chain(
    kind: str, width: int, layers: int = LAYERS, side: int = SIDE, outputs: int | None = None
) -> onnx.ModelProto:
    """A few layers of one kind behind each other."""
    nodes, weights, rng = [], [], np.random.default_rng(0)
    for index in range(layers):
        inputs, attributes, op = [f"h{index}" if index else "x"], dict[str, Any](), "Conv"
        if kind == "elements":
            op = "Sigmoid"
        else:
            out = outputs or width
            forms: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
                "conv": ((out, width, 3, 3), {"pads": [1] * 4}),
                "pointwise": ((out, width, 1, 1), {}),
                "depthwise": ((width, 1, 3, 3), {"pads": [1] * 4, "group": width}),
                "matmul": ((width, width), {}),
            }
            shape, attributes = forms[kind]
            op = "MatMul" if kind == "matmul" else "Conv"
            array = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
            weights.append(numpy_helper.from_array(array, f"w{index}"))
            inputs.append(f"w{index}")
        nodes.append(helper.make_node(op, inputs, [f"h{index + 1}"], **attributes))
    size = [1, side * side, width] if kind == "matmul" else [1, width, side, side]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, size)
    y = helper.make_tensor_value_info(f"h{layers}", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "probe", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
