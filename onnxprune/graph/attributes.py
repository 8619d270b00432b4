"""What nodes say about themselves: their operator, attributes and optional inputs."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir


def operator_name(node: ir.Node) -> str:
    """The name under which rules know a node's operator."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def integers(node: ir.Node, name: str) -> list[int] | None:
    """A list attribute, or None when absent."""
    return [int(x) for x in node.attributes[name].as_ints()] if name in node.attributes else None


def given(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, or None when it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def text(node: ir.Node, name: str, default: str) -> str:
    """A string attribute."""
    attribute: Any = node.attributes.get(name)
    return str(attribute.as_string()) if attribute is not None else default
