"""N:M layers: rules for effective weights, the operators behind them, and the conversion of plain layers."""

from sparsetrain.ops.layers import EffectiveConv2d, EffectiveLinear, convert, effective_layers, fold, masks, unconvert
from sparsetrain.ops.rules import NMRule

__all__ = ["EffectiveConv2d", "EffectiveLinear", "NMRule", "convert", "effective_layers", "fold", "masks", "unconvert"]
