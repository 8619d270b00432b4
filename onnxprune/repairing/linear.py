"""A layer that is linear in its weights, fitted by ridge regression to what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.graph.floats import Twin
from onnxprune.graph.model import constant
from onnxprune.repairing.moments import Array, Moments, Sample
from onnxprune.repairing.products import Product, Unfit
from onnxprune.repairing.walk import Walk

PLENTY = 8  # positions for each input, below which more strengths are tried, and what is held out is used after all
RIDGES = (1e-6, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # lambda, in units of the mean diagonal of the Gram matrix
FEW_RIDGES = (1e-6, 1e-3)
APART = 8  # one of so many positions is held out to choose it by where there are plenty, one of four where not


@dataclass(frozen=True)
class Target:
    """What the uncut model has at some positions of a value: its shape after the cut, the positions, and those."""

    shape: tuple[int, ...]
    rows: NDArray[np.int64]
    values: Sample  # (positions, groups, channels)


@dataclass(frozen=True)
class Use:
    """One node of a layer, and where its outputs are compared with the uncut ones.

    That is at `end`: the sum that it is a branch of, if any, so that it makes up for what the others lack as well; else
    its own output. `scale` is what a change of its output is multiplied with on the way, by channel.
    """

    product: Product
    bias: ir.Value | None
    end: ir.Value
    scale: Array


@dataclass(frozen=True)
class Linear:
    """A layer that is linear in its weights: all nodes that use them."""

    weight: ir.Value
    uses: list[Use]
    removals: dict[str, list[tuple[int, list[int]]]]  # by end: axes and what is kept of them

    @property
    def node(self) -> ir.Node:
        """The first node."""
        return self.uses[0].product.node

    @property
    def nodes(self) -> list[ir.Node]:
        """All of its nodes."""
        return [use.product.node for use in self.uses]

    @property
    def weights(self) -> list[ir.Value]:
        """The initializers that a fit changes."""
        return [self.weight, *(use.bias for use in self.uses if use.bias is not None)]

    @property
    def kind(self) -> str:
        """What a person calls it."""
        shared = f", shared by {len(self.uses)}" if len(self.uses) > 1 else ""
        return f"{self.node.op_type}{shared}"

    @property
    def ends(self) -> list[str]:
        """The values of the uncut model that it is compared with."""
        return [use.end.name or "" for use in self.uses]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Groups, inputs and outputs."""
        groups, inputs, outputs = self.matrix().shape
        return groups, inputs, outputs

    def matrix(self) -> Array:
        """The weights as (groups, inputs, outputs)."""
        return np.asarray(self.uses[0].product.matrix(np.asarray(constant(self.weight), np.float64)), np.float64)

    @property
    def widths(self) -> int:
        """Numbers that are held for each position."""
        groups, _, outputs = self.sizes
        return groups * outputs

    def wanted(self, arrays: dict[str, NDArray[Any]], limit: int, random: np.random.Generator) -> list[Target]:
        """What the uncut model has at up to `limit` positions of a batch, for each node."""
        found, share = [], max(1, limit // len(self.uses))
        for use in self.uses:
            array, name = arrays[use.end.name or ""], use.end.name or ""
            for axis, kept in self.removals.get(name, ()):
                array = array.take(kept, axis)
            laid = use.product.lay(array)
            rows = np.sort(random.choice(len(laid), min(share, len(laid)), replace=False))
            found.append(Target(array.shape, rows, np.asarray(laid[rows], np.float32)))
        return found

    def fit(self, walk: Walk, twin: Twin, wanted: Sequence[list[Target]], block: slice) -> float:
        """Ridge regression on a block of inputs; returns the share of what was lacking that it won back."""
        biases = list(dict.fromkeys(use.bias for use in self.uses if use.bias is not None))
        factors = [self.uses[0].product.factor(index) for index in (0, 1)]
        if not all(factors):
            raise Unfit("it is multiplied with zero")
        positions = sum(len(target.rows) for targets in wanted for target in targets)
        scarce = positions < PLENTY * (block.stop - block.start)
        kept, apart = self._moments(walk, wanted, block, biases, 4 if scarce else APART)
        judged = apart if apart.rows else kept
        found = {share: kept.solved(share) for share in (RIDGES if scarce else FEW_RIDGES)}
        gains = {share: judged.gain(delta) for share, delta in found.items() if np.isfinite(delta).all()}
        share = max(gains, key=gains.__getitem__, default=0.0)
        if not gains or not gains[share] > 0:
            return 0.0
        delta, gained = found[share], gains[share] / max(judged.square, 1e-30)
        if scarce:
            kept.merge(apart)
            delta = kept.solved(share)
        return gained if self._change(twin, delta, block, biases, kept) else 0.0

    def _moments(
        self, walk: Walk, wanted: Sequence[list[Target]], block: slice, biases: list[ir.Value], part: int
    ) -> tuple[Moments, Moments]:
        """What is fitted on, and what is held out: the first positions of each batch, which are in order of samples."""
        kept, apart = Moments(), Moments()
        names = [name for use in self.uses for name in (use.end.name or "", use.product.source.name or "")]
        for arrays, targets in zip(walk.values(names), wanted, strict=True):
            for use, target in zip(self.uses, targets, strict=True):
                made = arrays[use.end.name or ""]
                if made.shape != target.shape:
                    raise Unfit("what is folded into its positions was cut")
                x = use.product.inputs(arrays[use.product.source.name or ""], made.shape, target.rows)
                lack = np.asarray((target.values - use.product.lay(made)[target.rows]) / use.scale, np.float32)
                seen, lack = x.swapaxes(0, 1)[..., block] * np.float32(use.product.factor(0)), lack.swapaxes(0, 1)
                ones = np.zeros((*seen.shape[:2], len(biases)), np.float32)
                if use.bias is not None:
                    ones[..., biases.index(use.bias)] = use.product.factor(1)
                seen = np.concatenate([seen, ones], 2)
                first = len(target.rows) // part
                apart.add(seen[:, :first], lack[:, :first])
                kept.add(seen[:, first:], lack[:, first:])
        return kept, apart

    def _change(self, twin: Twin, delta: Array, block: slice, biases: list[ir.Value], kept: Moments) -> bool:
        """Adds a change of shape (groups, inputs in the block, outputs), with more inputs for the biases."""
        width = block.stop - block.start
        before = self.matrix()
        after = before.copy()
        after[:, block] += delta[:, :width]
        product, shape = self.uses[0].product, constant(self.weight).shape

        def lack(weights: Array) -> float:
            moved = delta.copy()
            moved[:, :width] = np.asarray(product.matrix(weights), np.float64)[:, block] - before[:, block]
            return -kept.gain(moved)

        if not twin.write(self.weight, product.unlay(after, shape), lack):
            return False
        for index, bias in enumerate(biases):
            array = np.array(constant(bias), np.float64)
            twin.write(bias, array + delta[:, width + index].reshape(array.shape), lambda _: -1.0)
        return True
