"""What a trained network may be given to: N:M weights for sparse kernels, and physically smaller networks."""

from sparsetrain.export.blocks import blocks
from sparsetrain.export.files import load_shrunk, save_shrunk
from sparsetrain.export.graph import Slice
from sparsetrain.export.nm import ExportRow, check_nm, to_semi_structured
from sparsetrain.export.shrink import shrink, silence
from sparsetrain.export.units import Unit, pruned_units, units

__all__ = [
    "ExportRow",
    "Slice",
    "Unit",
    "blocks",
    "check_nm",
    "load_shrunk",
    "pruned_units",
    "save_shrunk",
    "shrink",
    "silence",
    "to_semi_structured",
    "units",
]
