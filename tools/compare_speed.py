"""How long a cut takes beside Torch-Pruning, how it grows with the graph, and what it needs in memory.

    python tools/compare_speed.py ZOO --torch-python PYTHON [-o speed.json]

ZOO is a folder of torchvision's architectures as ONNX (`NAME.onnx`); PYTHON an interpreter with torch, torchvision and
torch-pruning. For each architecture, in turns: onnxprune's analysis, scores and cut of the normalised model, and
Torch-Pruning's dependency graph and pruning step (group L2, half of the channels). Every figure is a ratio of medians
taken in one run. Without --torch-python only growth and memory are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = """
    alexnet vgg11_bn resnet18 resnet50 wide_resnet50_2 resnext50_32x4d densenet121 densenet201 googlenet inception_v3
    mobilenet_v2 mobilenet_v3_large mnasnet1_0 efficientnet_b0 efficientnet_v2_s regnet_x_3_2gf regnet_y_3_2gf
    squeezenet1_1 convnext_tiny fcn_resnet50 deeplabv3_resnet50 swin_t swin_v2_t
"""
ARCHITECTURES = NAMES.split()
REPEATS = 2
LIMIT = 120.0  # seconds that one Torch-Pruning measurement may take
CHAIN = (100, 1000, 10000)

TORCH_SIDE = '''
import sys, time, warnings
warnings.simplefilter("ignore")
import torch
names = ["nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a, Tensor b, float c) -> Tensor"]
operators = """roi_align _roi_align_backward roi_pool _roi_pool_backward ps_roi_align _ps_roi_align_backward ps_roi_pool
_ps_roi_pool_backward deform_conv2d _deform_conv2d_backward"""
library = torch.library.Library("torchvision", "DEF")  # a build of torchvision without its operators will do
for schema in names + [name + "(Tensor a) -> Tensor" for name in operators.split()]:
    library.define(schema)
import torchvision, torch_pruning as tp
family = torchvision.models.segmentation if sys.argv[1].startswith(("fcn", "deeplab")) else torchvision.models
options = {"weights": None}
if family is torchvision.models.segmentation:
    options["weights_backbone"] = None
model = getattr(family, sys.argv[1])(**options).eval()
size = 299 if sys.argv[1] == "inception_v3" else 224
example = torch.randn(1, 3, size, size)
heads = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][-1:]
start = time.perf_counter()
pruner = tp.pruner.BasePruner(model, example, importance=tp.importance.GroupMagnitudeImportance(p=2),
                              pruning_ratio=0.5, ignored_layers=heads)
pruner.step()
print(time.perf_counter() - start)
'''


def own_seconds(path: Path) -> dict[str, float]:
    """Seconds for opening and normalising, and for analysis, scores and cut."""
    command = [sys.executable, __file__, "--own", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def measure_own(path: Path) -> dict[str, float]:
    """As `own_seconds`, in this process."""
    from onnxprune.choosing.select import Rounding, survivors_by_share
    from onnxprune.cutting.cut import cut
    from onnxprune.graph.model import open_model
    from onnxprune.labels import analyse
    from onnxprune.labels.units import find_units
    from onnxprune.normalising.normalise import normalise
    from onnxprune.scoring.lineup import reorder, sort_rows
    from onnxprune.scoring.score import normalise_scores, score_units

    begin = time.perf_counter()
    model = normalise(open_model(path))
    opened = time.perf_counter()
    units = find_units(analyse(model))
    reorder(model, sort_rows(units))
    scores = normalise_scores(units, score_units(units), "layer")
    cut(units, survivors_by_share(units, scores, 0.5, Rounding(1)))
    return {"open": opened - begin, "cut": time.perf_counter() - opened}


def torch_seconds(python: str, name: str) -> float | None:
    """Seconds of Torch-Pruning's graph and step; None when it fails or isn't done within the limit."""
    try:
        done = subprocess.run([python, "-c", TORCH_SIDE, name], capture_output=True, text=True, timeout=LIMIT)
        return float(done.stdout.strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None


def compare(zoo: Path, python: str, only: list[str]) -> list[dict[str, Any]]:
    """One row for each architecture, measured in turns."""
    from sweep import filled

    rows = []
    for name in ARCHITECTURES:
        if not (zoo / f"{name}.onnx").exists() or (only and name not in only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = filled(zoo / f"{name}.onnx", Path(folder))
            own: list[dict[str, float]] = []
            other: list[float | None] = []
            for _ in range(REPEATS):
                own.append(own_seconds(path))
                other.append(torch_seconds(python, name) if other[-1:] != [None] else None)
        theirs = [seconds for seconds in other if seconds is not None]
        row: dict[str, Any] = {
            "name": name,
            "onnxprune": statistics.median(each["cut"] for each in own),
            "onnxprune_open": statistics.median(each["open"] for each in own),
            "torch_pruning": statistics.median(theirs) if theirs else None,
        }
        if theirs:
            row["ratio"] = row["torch_pruning"] / row["onnxprune"]
            row["ratio_with_open"] = row["torch_pruning"] / (row["onnxprune"] + row["onnxprune_open"])
            row["spread"] = [min(theirs) / max(e["cut"] for e in own), max(theirs) / min(e["cut"] for e in own)]
        rows.append(row)
        said = (
            f"{row['ratio']:6.1f}x ({row['spread'][0]:.1f} to {row['spread'][1]:.1f})"
            if theirs
            else "fails or too slow"
        )
        print(f"{name:22s} onnxprune {row['onnxprune']:.2f} s, Torch-Pruning {said}", flush=True)
    return rows


def chain(length: int, folder: Path) -> Path:
    """A chain of convolutions and activations, `length` nodes long."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    rng, nodes, weights, last = np.random.default_rng(0), [], [], "x"
    for index in range(length // 2):
        shape = (8, 3 if index == 0 else 8, 1)
        weights.append(numpy_helper.from_array((0.3 * rng.standard_normal(shape)).astype(np.float32), f"w{index}"))
        nodes.append(helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], name=f"n{index}"))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], name=f"m{index}"))
        last = f"r{index}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4])
    y = helper.make_tensor_value_info(last, TensorProto.FLOAT, ["N", 8, 4])
    graph = helper.make_graph(nodes, "chain", [x], [y], weights)
    path = folder / f"chain{length}.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), str(path))
    return path


def growth(folder: Path) -> list[dict[str, float]]:
    """Seconds per node, relative to the shortest chain."""
    rows = []
    for length in CHAIN:
        path = chain(length, folder)
        times = [own_seconds(path) for _ in range(REPEATS)]
        per_node = statistics.median(each["cut"] + each["open"] for each in times) / length
        rows.append({"nodes": length, "per_node": per_node})
        print(
            f"chain of {length} nodes: {per_node / rows[0]['per_node']:.2f}x the time per node of {CHAIN[0]}",
            flush=True,
        )
    return [{"nodes": row["nodes"], "per_node_ratio": row["per_node"] / rows[0]["per_node"]} for row in rows]


def large_model(folder: Path) -> Path:
    """A GiB of weights as external data: 16 matrices of 64 MiB."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng, nodes, weights = np.random.default_rng(0), [], []
    for index in range(16):
        array = rng.standard_normal((4096, 4096), dtype=np.float32) / 64
        weights.append(numpy_helper.from_array(array, f"w{index}"))
        nodes.append(helper.make_node("MatMul", [f"h{index}", f"w{index}"], [f"h{index + 1}"], name=f"n{index}"))
    x = helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["N", 4096])
    y = helper.make_tensor_value_info("h16", TensorProto.FLOAT, ["N", 4096])
    model = helper.make_model(
        helper.make_graph(nodes, "large", [x], [y], weights), opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    )
    onnx.save_model(model, str(folder / "large.onnx"), save_as_external_data=True, location="large.data")
    return folder / "large.onnx"


def measure_memory(path: Path, output: Path) -> dict[str, float]:
    """Seconds to open a large model, and what pruning it adds to the memory of this process, in bytes."""
    import psutil

    import onnxprune.api
    from onnxprune.graph.model import open_model

    before = psutil.Process().memory_info().rss  # type: ignore[no-untyped-call]
    start = time.perf_counter()
    open_model(path)
    opened = time.perf_counter() - start
    onnxprune.api.prune(path, output, 0.5)
    high = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"open_seconds": opened, "peak_bytes": int(high.split()[1]) * 1024 - before}  # ru_maxrss is the parent's too


def memory(folder: Path) -> dict[str, float]:
    """As `measure_memory`, in a process of its own."""
    path = large_model(folder)
    command = [sys.executable, __file__, "--memory", str(path), "-o", str(folder / "out.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(json.loads(done.stdout.strip().splitlines()[-1]))
    seconds, added = found["open_seconds"], found["peak_bytes"] / 2**20
    print(f"1 GiB of external data in tensors of 64 MiB: opened in {seconds:.2f} s; pruning adds {added:.0f} MiB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, nargs="?")
    parser.add_argument("--torch-python")
    parser.add_argument("-o", "--output", type=Path, default=Path("speed.json"))
    parser.add_argument("--only", nargs="*", default=[], help="names of architectures")
    parser.add_argument("--own", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.own:
        print(json.dumps(measure_own(given.own)))
        return
    if given.memory:
        print(json.dumps(measure_memory(given.memory, given.output)))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        found["growth"] = growth(Path(name))
        found["memory"] = memory(Path(name))
    if given.zoo and given.torch_python:
        found["torch_pruning"] = compare(given.zoo.resolve(), given.torch_python, given.only)
        ratios = [row["ratio"] for row in found["torch_pruning"] if "ratio" in row]
        found["median_ratio"] = statistics.median(ratios)
        print(f"median over {len(ratios)} architectures: {found['median_ratio']:.1f} times faster")
    given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
