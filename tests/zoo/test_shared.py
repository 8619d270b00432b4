"""Real models that lie beside the project on some machines: the mask oracle at several ratios."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxprune.api import prune, verify
from onnxprune.cutting.plan import load_plan
from onnxprune.cutting.verify import mask_oracle
from onnxprune.graph.model import open_model
from tests.conftest import ROOT

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


ZOO = {  # topologies of every kind, and the share of the parameters that half of the units leaves at most
    "squeezenet1_1": 0.5, "shufflenet_v2_x0_5": 0.5, "mobilenet_v3_small__op11": 0.5, "light_shufflenet": 0.5,
    "efficientnet_b0": 0.5, "keras_mobilenet": 0.5, "keras_gru_text": 0.5, "keras_lstm_text": 0.5, "pt_bilstm_cls": 0.5,
    "pt_edsr": 0.5, "pt_dcgan_gen": 0.5, "pt_unet": 0.5, "pt_wavenet": 0.5, "pt_dlrm": 0.5, "pt_einsum_attn": 0.5,
    "hf_bert_cls": 0.5, "hf_gpt2": 0.5, "hf_llama_gqa": 0.6, "hf_swin": 0.5, "hf_segformer": 0.5, "hf_wav2vec2": 0.5,
    "yolov8n": 0.5, "sklearn_mlp_cls": 0.5, "flax_cnn": 0.5, "raft_small__static": 0.5, "timm_mobilevit_xxs": 0.5,
    # what their outputs and inputs hold can't be cut: hidden states, or the width of the input itself
    "hf_whisper_encoder": 0.53, "hf_t5_encoder": 0.75, "flax_transformer": 0.52,
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_topologies_are_cut_in_half_and_equal_their_masked_baselines(name: str, shared: Path, tmp_path: Path) -> None:
    sweep = runpy.run_path(str(ROOT / "tools" / "sweep.py"))
    model = sweep["filled"](shared / "zoo" / f"{name}.onnx", tmp_path)
    out, plan, baseline = (tmp_path / each for each in ("out.onnx", "plan.json", "baseline.onnx"))
    result = prune(model, out, 0.5, plan=plan, baseline=baseline)
    assert result.params[1] <= ZOO[name] * result.params[0]
    found = verify(baseline, out, plan)
    assert not found.open_nodes and found.difference < 1e-4
