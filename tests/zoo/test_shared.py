"""Real models that lie beside the project on some machines: the mask oracle at several ratios."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.api import prune
from onnxprune.model import open_model
from onnxprune.plan import load_plan
from onnxprune.verify import mask_oracle

CNNS = [
    "resnet20_cifar10",
    "resnet56_cifar10",
    "mlperf_resnet_tflite",
    "mlperf_kws_float",
    "ultraface_RFB-320",
    "mnist_ort",
]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("name", CNNS)
def test_pruned_cnns_equal_their_masked_baselines(name: str, ratio: float, shared: Path, tmp_path: Path) -> None:
    out, plan, baseline = (tmp_path / each for each in ("out.onnx", "plan.json", "baseline.onnx"))
    result = prune(shared / "models" / f"{name}.onnx", out, ratio, plan=plan, baseline=baseline)
    onnx.checker.check_model(str(out), full_check=True)
    assert result.params[1] < result.params[0] * (1 - ratio / 2)
    found = mask_oracle(open_model(baseline), open_model(out), load_plan(plan), seeds=(0, 1))
    assert np.isfinite(found.difference)
    assert found.exact
    assert found.difference < 1e-5
