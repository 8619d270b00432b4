"""Torch-Pruning on an ONNX file, for `compare_accuracy.py`: needs torch, torch-pruning, onnx2torch and onnxscript.

Reads a job as JSON from the first argument. The file becomes a PyTorch model (onnx2torch), is pruned by the group L2
importance over all layers at once until its MACs are at the share asked for, its batch normalisation is re-estimated,
and with epochs it is trained: AdamW, linear warm-up and cosine, cross-entropy, images mirrored and moved. What is added
to a residual stream stays where cutting it gives a model that doesn't run. One ONNX file is written for each stage.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from typing import Any

import numpy as np
import torch

try:
    import torchvision  # noqa: F401
except Exception:  # a build without its operators will do, once they have a name
    LIBRARY = torch.library.Library("torchvision", "DEF")
    OPERATORS = """roi_align _roi_align_backward roi_pool _roi_pool_backward ps_roi_align _ps_roi_align_backward
    ps_roi_pool _ps_roi_pool_backward deform_conv2d _deform_conv2d_backward"""
    for schema in ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a, Tensor b, float c) -> Tensor"):
        LIBRARY.define(schema)
    for name in OPERATORS.split():
        LIBRARY.define(f"{name}(Tensor a) -> Tensor")

import onnx
import onnx2torch
import torch_pruning as tp

if not hasattr(torch.onnx.symbolic_helper, "_export_onnx_opset_version"):
    torch.onnx.symbolic_helper._export_onnx_opset_version = 18  # onnx2torch reads it, newer exporters lack it
STEPS = 10  # of the bisection on the ratio


def load(path: str) -> torch.nn.Module:
    model = onnx.load(path)
    for node in model.graph.node:
        for output in list(node.output)[1:]:
            if not output:
                node.output.remove(output)
    return onnx2torch.convert(model).eval()


def prune(job: dict[str, Any], ratio: float, keep_stream: bool) -> torch.nn.Module:
    model = load(job["model"])
    example = torch.tensor(np.load(job["calibration"])[:1])
    ignored = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1:]
    if keep_stream:
        ignored += added(model)
    pruner = tp.pruner.BasePruner(
        model, example, importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True,
        pruning_ratio=ratio, ignored_layers=ignored,
    )  # fmt: skip
    pruner.step()
    model(example)
    return model


def added(model: Any) -> list[torch.nn.Module]:
    """The layers whose output goes, through normalisation, into a sum."""

    def layer_of(node: Any) -> torch.nn.Module | None:
        return model.get_submodule(node.target) if node is not None and node.op == "call_module" else None

    found = []
    for node in model.graph.nodes:
        layer = layer_of(node)
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            user = next(iter(node.users), None)
            while isinstance(layer_of(user), torch.nn.BatchNorm2d):
                user = next(iter(user.users), None)
            if "Binary" in type(layer_of(user)).__name__:
                found.append(layer)
    return found


def to_share(job: dict[str, Any], share: float) -> torch.nn.Module:
    """The model at the lowest ratio whose MACs are at most this share."""
    example = torch.tensor(np.load(job["calibration"])[:1])
    whole = tp.utils.count_ops_and_params(load(job["model"]), example)[0]
    try:
        prune(job, 0.3, False)
        keep_stream = False
    except Exception:  # it cut what it mustn't
        keep_stream = True
    low, high, best = 0.0, 0.98, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        model = prune(job, middle, keep_stream)
        if tp.utils.count_ops_and_params(model, example)[0] <= share * whole:
            best, high = model, middle
        else:
            low = middle
    if best is None:
        raise SystemExit(f"{share} of the MACs is out of reach")
    return best


def reestimate(model: torch.nn.Module, images: torch.Tensor) -> None:
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
    with torch.no_grad():
        for batch in images.split(128):
            model(batch)
    model.eval()


def train(model: torch.nn.Module, job: dict[str, Any], seed: int) -> None:
    images, labels = np.load(job["images"], mmap_mode="r"), torch.tensor(np.load(job["labels"])).to(job["device"])
    model.to(job["device"])
    rng, size = np.random.default_rng(seed), job["batch"]
    total = len(images) // size * job["epochs"]
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.1
            layer.train()
    optimizer = torch.optim.AdamW(model.parameters(), job["lr"], weight_decay=1e-4)
    for step in range(total):
        at = step % (len(images) // size)
        order = rng.permutation(len(images)) if at == 0 else order  # noqa: F821
        chosen = np.sort(order[at * size : (at + 1) * size])
        warm = max(1, total // 20)
        rate = (
            (step + 1) / warm
            if step < warm
            else 0.01 + 0.495 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        )
        optimizer.param_groups[0]["lr"] = job["lr"] * rate
        batch = augmented(np.asarray(images[chosen]), job["flip"], job["shift"], rng)
        loss = torch.nn.functional.cross_entropy(model(torch.tensor(batch).to(job["device"])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    model.to("cpu").eval()


def augmented(batch: np.ndarray, flip: bool, shift: int, rng: np.random.Generator) -> np.ndarray:
    if flip:
        batch = np.where(rng.random(len(batch))[:, None, None, None] < 0.5, batch[..., ::-1], batch)
    if not shift:
        return np.ascontiguousarray(batch)
    height, width = batch.shape[2:]
    padded = np.pad(batch, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
    moves = rng.integers(0, 2 * shift + 1, (len(batch), 2))
    return np.stack([p[:, d : d + height, r : r + width] for p, (d, r) in zip(padded, moves, strict=True)])


def main() -> None:
    warnings.simplefilter("ignore")
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    calibration = torch.tensor(np.load(job["calibration"]))
    model = to_share(job, job["share"])

    def export(stage: str) -> None:
        torch.onnx.export(
            model, (calibration[:1],), f"{job['out']}.{stage}.onnx", dynamo=False, input_names=["input"],
            output_names=["output"], dynamic_axes={"input": {0: "N"}, "output": {0: "N"}},
        )  # fmt: skip

    export("nothing")
    reestimate(model, calibration)
    export("batch-norm")
    if job["epochs"]:
        train(model, job, job["seed"])  # which leaves running statistics over the last batches
        export("tuned")


if __name__ == "__main__":
    main()
