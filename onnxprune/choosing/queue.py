"""Units and whole layers in one queue, by price: one threshold says which of both go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.choosing.layers import Layer
from onnxprune.choosing.select import Rounding, above_all, lowest, survivors
from onnxprune.labels.units import Group, Units
from onnxprune.scoring.cost import Alive, Nodes, Spending
from onnxprune.scoring.prices import LEAST_SAVED
from onnxprune.scoring.score import Scores


@dataclass(frozen=True)
class PricedLayer:
    """A layer that may go, what is lost without it alone, and the groups whose units it holds all of."""

    layer: Layer
    loss: float
    inside: tuple[Group, ...]

    @cached_property
    def nodes(self) -> frozenset[ir.Node]:
        """What goes with it."""
        return frozenset(self.layer.nodes)


@dataclass(frozen=True)
class Queue:
    """What may go of a model. A unit goes when its score is under tau; a layer when its price is.

    With `norms` of the layers' weights a layer goes when its own is under tau, or under `least_norm`.
    `losses` are what each unit's removal loses, by `curves` that were measured; `most` is how many layers may go.
    """

    units: Units
    scores: Scores
    rounding: Rounding
    losses: Scores | None = None
    layers: tuple[PricedLayer, ...] = ()
    spending: Spending | None = field(default=None, repr=False)
    most: int = 0
    norms: Mapping[str, float] = field(default_factory=dict)
    least_norm: float | None = None
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)

    def survivors(self, tau: float) -> Alive:
        """The units that stay."""
        return survivors(self.units, self.scores, tau, self.rounding)

    def layers_under(self, tau: float, alive: Alive | None = None) -> list[PricedLayer]:
        """The layers that go: what each still loses is little beside what it still saves.

        Of a layer whose units went in part, what that lost and saved is behind it. So the returns of a narrow layer
        fall, until it goes whole or stays.
        """
        if self.norms:
            least = tau if self.least_norm is None else self.least_norm
            return [each for each in self.layers if self.norms[each.layer.name] < least][: self.most]
        gone, without = list[PricedLayer](), frozenset[ir.Node]()
        if self.spending is None or not self.layers:
            return gone
        alive = self.survivors(tau) if alive is None else alive
        spent = self.spending(alive)
        for each in self._by_price:
            if len(gone) == self.most:
                break
            rest = self.spending(alive, without | each.nodes)
            if rest < spent and self._left(each, alive) / (spent - rest) < tau:
                gone.append(each)
                spent, without = rest, without | each.nodes
        return gone

    def _left(self, each: PricedLayer, alive: Alive) -> float:
        """What a layer's removal still loses, of what it loses from the whole model."""
        assert self.losses is not None
        lost = sum(float(self.losses[group.units[~alive[group.units]]].sum()) for group in each.inside)
        return max(each.loss - lost, 0.0)

    @cached_property
    def prices(self) -> dict[str, float]:
        """The price of each layer of the whole model, by name; or its norm, where that decides."""
        if self.norms:
            return dict(self.norms)
        assert self.spending is not None
        everything = np.ones(self.units.count, bool)
        whole = self.spending(everything)
        return {
            each.layer.name: max(each.loss, 0.0) / max(whole - self.spending(everything, each.nodes), LEAST_SAVED)
            for each in self.layers
        }

    @cached_property
    def _by_price(self) -> list[PricedLayer]:
        return sorted(self.layers, key=lambda each: self.prices[each.layer.name])

    @property
    def candidates(self) -> NDArray[np.float64]:
        """The scores and prices at which a threshold may lie."""
        priced = list(self.prices.values()) if self.layers else []
        return np.concatenate([self.scores[np.isfinite(self.scores)], priced])

    def tau_within(self, fits: Callable[[Alive, Nodes], bool]) -> float | None:
        """The lowest threshold under which what stays fits; None where none does."""
        candidates = np.unique([*self.candidates, above_all(self.scores)])
        if len(candidates) < 2:
            return None

        def fits_under(tau: float) -> bool:
            alive = self.survivors(tau)
            gone = self.layers_under(tau, alive)
            return fits(alive, frozenset(node for each in gone for node in each.nodes))

        return lowest(candidates, fits_under)


def priced_layers(units: Units, layers: Sequence[Layer], losses: dict[str, float]) -> tuple[PricedLayer, ...]:
    """The layers of a model that were measured, with the groups that lie inside of each."""
    holders = {
        group.name: {
            node for value, _, vector in units.parameters if np.isin(vector, group.units).any()
            for node in value.consumers()
        }
        for group in units.groups
    }  # fmt: skip
    return tuple(
        PricedLayer(
            layer,
            losses[layer.name],
            tuple(group for group in units.groups if holders[group.name] and holders[group.name] <= {*layer.nodes}),
        )
        for layer in layers
        if layer.name in losses
    )
