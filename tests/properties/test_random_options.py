"""Whatever is asked of a run, it gives a model that keeps to it, or says why not."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import onnxprune
from onnxprune import RunOptions
from tests.conftest import MODELS, needs_training

ASKED = st.one_of(
    st.fixed_dictionaries({"target_macs": st.sampled_from([0.3, 0.6, 0.85])}),
    st.fixed_dictionaries({"target_params": st.sampled_from([0.3, 0.6])}),
    st.fixed_dictionaries({"max_drop": st.sampled_from([0.0, 1.0, 5.0])}),
    st.fixed_dictionaries({"max_drop": st.sampled_from([0.0, 5.0]), "target_size": st.sampled_from([0.5, 0.8])}),
)
OTHERS = st.fixed_dictionaries(
    {"epochs": st.sampled_from([0, 1])},
    optional={
        "rounds": st.integers(1, 3),
        "sparsify": st.just(1),
        "criterion": st.sampled_from(["l1", "lamp", "fpgm", "obs", "flap", "activation", "random", "taylor", "auto"]),
        "scope": st.sampled_from(["global", "gradual", "priced", "layer", "isomorphic"]),
        "granularity": st.sampled_from(["rows", "columns"]),
        "layers": st.sampled_from(["auto", 0, 1]),
        "round_to": st.sampled_from([1, 2, 8]),
        "controller": st.sampled_from(["published", "published-text", "recursive", "recursive-text"]),
        "moves": st.sampled_from([("performance",), ("performance", "distribution")]),
        "schedule": st.just("cubic"),
        "trainer": st.sampled_from(["ort", "graph"]),
        "quantize": st.sampled_from(["int8", "dynamic", "fp16"]),
        "distillation": st.sampled_from([0.0, 1.0]),
        "features": st.just(0.0),
        "mix": st.just(0.5),
        "ema": st.just(0.9),
        "smoothing": st.just(0.1),
        "stop_after": st.just(1),
        "batch_statistics": st.just(True),
        "memory": st.just(1),
        "seed": st.integers(0, 9),
        "metric": st.sampled_from(["top2", "agreement", "kl"]),
    },
)


@needs_training
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["digits_mlp", "digits_gru"]), ASKED, OTHERS, st.sampled_from(["labels", "input", ""]))
def test_any_options(model: str, asked: dict[str, Any], others: dict[str, Any], data: str) -> None:
    """With labels, with inputs alone, or without data."""
    with np.load(MODELS / "digits.npz") as arrays:
        few = {name: arrays[name][:100] for name in ("input", data) if data}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.onnx"
        try:
            options = RunOptions(**asked, **others, batch=32, bench_seconds=0.05)
            report = onnxprune.run(MODELS / f"{model}.onnx", few or None, output=output, options=options)
        except onnxprune.OnnxPruneError:
            return  # anything else fails the test
        json.dumps(report.to_json())
        assert output.exists() and report.pruned.macs <= report.baseline.macs
        if report.met and "target_macs" in asked:
            assert report.pruned.macs <= asked["target_macs"] * report.baseline.macs
