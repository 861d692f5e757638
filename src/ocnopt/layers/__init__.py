"""Layer kinds that can be players. Adding one is a file here and a line in :data:`KINDS`."""

from __future__ import annotations

from torch import nn

from ocnopt.layers.base import Layer, MatrixLayer, Params
from ocnopt.layers.conv import ConvLayer
from ocnopt.layers.embedding import EmbeddingLayer
from ocnopt.layers.linear import LinearLayer
from ocnopt.layers.norm import (
    BatchNormLayer,
    GroupNormLayer,
    LayerNormLayer,
    RMSNormLayer,
)
from ocnopt.layers.stacked import StackedLinear, StackedLinearLayer

__all__ = ["KINDS", "Layer", "MatrixLayer", "Params", "StackedLinear", "kind_of"]

KINDS: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: LinearLayer,
    StackedLinear: StackedLinearLayer,
    nn.Conv1d: ConvLayer,
    nn.Conv2d: ConvLayer,
    nn.Conv3d: ConvLayer,
    nn.Embedding: EmbeddingLayer,
    nn.LayerNorm: LayerNormLayer,
    nn.RMSNorm: RMSNormLayer,
    nn.GroupNorm: GroupNormLayer,
    nn.BatchNorm1d: BatchNormLayer,
    nn.BatchNorm2d: BatchNormLayer,
    nn.BatchNorm3d: BatchNormLayer,
}


def kind_of(module: nn.Module) -> type[Layer] | str:
    """The layer kind of a module, or the reason why it has none.

    A subclass counts as its base as long as it keeps the base's ``forward``: what a subclass
    computes otherwise cannot be known.
    """
    for base in type(module).__mro__:
        if base in KINDS:
            if type(module).forward is not base.forward or "forward" in vars(module):
                return f"{type(module).__name__} overrides the forward of {base.__name__}"
            return KINDS[base]
    return f"{type(module).__name__} is not a layer kind that is known"
