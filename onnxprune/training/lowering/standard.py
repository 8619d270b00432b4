"""Operators that the ONNX standard defines by others, and opsets that ONNX Runtime training doesn't read."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import inliner, version_converter
from onnx_ir.passes import common

from onnxprune.errors import TrainingError
from onnxprune.graph.model import give_back, weights_aside
from onnxprune.training.lowering.fused import unfuse

NEWEST_OPSET, NEWEST_IR = 21, 10  # what ONNX Runtime 1.19 reads
DEFINED = (  # by a function in the standard whose operators have gradients, or rows
    *("AffineGrid", "Attention", "CausalConvWithState", "CenterCropPad", "GroupNormalization"),
    *("LinearAttention", "MeanVarianceNormalization", "Mish", "NegativeLogLikelihoodLoss", "RMSNormalization"),
    *("ReduceL1", "ReduceLogSum", "ReduceSumSquare", "RotaryEmbedding", "Shrink", "Softsign", "SwiGLU", "Swish"),
    "ThresholdedRelu",
)


def spell_out(model: ir.Model) -> ir.Model:
    """The model with fused operators and those that the standard defines spelt out, in an opset that training reads.

    Raises `TrainingError` for an opset that can't be converted.
    """
    unfuse(model)
    version = model.opset_imports.get("", 0)
    if all(node.op_type not in DEFINED for node in model.graph) and version <= NEWEST_OPSET:
        model.ir_version = min(model.ir_version, NEWEST_IR)
        return model
    with weights_aside(model) as weights:
        proto = ir.to_proto(model)
        while names := _defined(proto.graph):  # some are defined by others
            _give_defaults(proto.graph, version)
            proto = inliner.inline_selected_functions(proto, [("", name) for name in names], False, True)
        if version > NEWEST_OPSET:
            try:
                proto = version_converter.convert_version(proto, NEWEST_OPSET)
            except Exception as error:  # the converter raises plain RuntimeErrors of many kinds
                raise TrainingError(
                    f"fine-tuning reads opsets up to {NEWEST_OPSET}, the model has {version}, which can't be "
                    f"converted: {str(error).splitlines()[0]}; export it with an older opset, or use --epochs 0"
                ) from error
        spelt = give_back(ir.from_proto(proto), weights)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(spelt)
    for index, node in enumerate(spelt.graph):
        node.name = node.name or f"{node.op_type}.{index}"
    spelt.ir_version = min(spelt.ir_version, NEWEST_IR)
    return spelt


def _defined(graph: onnx.GraphProto) -> list[str]:
    return sorted({node.op_type for node in graph.node if node.domain == ""}.intersection(DEFINED))


def _give_defaults(graph: onnx.GraphProto, version: int) -> None:
    """Writes out attributes that have their default: the inliner doesn't know it."""
    for node in graph.node:
        if node.domain == "" and node.op_type in DEFINED:
            given = {attribute.name for attribute in node.attribute}
            known = onnx.defs.get_schema(node.op_type, version).attributes
            node.attribute.extend(
                a.default_value for name, a in known.items() if name not in given and a.default_value.name
            )
