"""ONNX's own test cases: what onnxruntime runs is opened, normalised, analysed and saved, and still says the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
import pytest
from onnx import numpy_helper

from onnxprune.errors import ModelError
from onnxprune.evaluating.evaluate import relative_difference, run_model
from onnxprune.graph.model import open_model, save_model
from onnxprune.labels import analyse
from onnxprune.labels.units import find_units
from onnxprune.normalising.normalise import normalise

FOLDERS = sorted(Path(onnx.backend.test.__file__).parent.glob("data/*/*/model.onnx"))
CHUNKS = 16
REFUSED = 0.35  # at most: operators that onnxruntime lacks, and inputs that are sequences


def survives(path: Path, inputs: list[Any], folder: Path) -> bool:
    """Whether a model could be used; it must then compute the same after all steps, and crash in none."""
    try:
        model = open_model(path)
        normal = normalise(model)
        expected = run_model(model, dict(zip([v.name or "" for v in model.graph.inputs], inputs, strict=False)))
    except ModelError:
        return False
    find_units(analyse(normal))
    save_model(normal, folder / "saved.onnx")
    saved = open_model(folder / "saved.onnx")
    found = run_model(saved, dict(zip([v.name or "" for v in model.graph.inputs], inputs, strict=False)))
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert (isinstance(a, np.ndarray) and a.dtype.kind == "O") or relative_difference(a, b) < 1e-4, path
    return True


def test_models_of_the_backend_data(tmp_path: Path) -> None:
    used = 0
    for path in FOLDERS:
        files = sorted(path.parent.glob("test_data_set_0/input_*.pb"), key=lambda file: int(file.stem.split("_")[1]))
        inputs = [numpy_helper.to_array(onnx.load_tensor(str(file))) for file in files]
        used += survives(path, inputs, tmp_path)
    assert used >= (1 - REFUSED) * len(FOLDERS)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_cases_of_single_operators(chunk: int, tmp_path: Path) -> None:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference implementations divide by zero on purpose
        cases = collect_testcases(None)[chunk::CHUNKS]
    used = 0
    for case in cases:
        if case.model is not None and case.data_sets is not None:
            (tmp_path / "case.onnx").write_bytes(case.model.SerializeToString())
            used += survives(tmp_path / "case.onnx", list(case.data_sets[0][0]), tmp_path)
    assert used >= (1 - REFUSED) * len(cases)
