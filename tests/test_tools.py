"""What lies in models/ is what its README says."""

from __future__ import annotations

import re

import numpy as np
import onnxruntime

from tests.conftest import MODELS


def test_models_are_small_and_as_accurate_as_stated() -> None:
    assert sum(path.stat().st_size for path in MODELS.iterdir()) < 2_000_000
    rows = re.findall(r"\| (\w+)\.onnx \|.*\| ([\d.]+) \|", (MODELS / "README.md").read_text())
    assert len(rows) == 4
    with np.load(MODELS / "digits_test.npz") as data:
        for name, stated in rows:
            session = onnxruntime.InferenceSession(str(MODELS / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            found = (session.run(None, {"input": data["input"]})[0].argmax(1) == data["labels"]).mean() * 100
            assert abs(found - float(stated)) < 0.1
