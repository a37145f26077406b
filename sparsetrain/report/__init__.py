"""Measured facts about a sparse network: counts, FLOPs and bytes, as values, tables, CSV and one picture."""

from sparsetrain.report.measure import LayerReport, Report, measure
from sparsetrain.report.plots import draw_sparsity
from sparsetrain.report.tables import markdown_table, plan_table, report_table, write_sparsity_csv

__all__ = [
    "LayerReport",
    "Report",
    "draw_sparsity",
    "markdown_table",
    "measure",
    "plan_table",
    "report_table",
    "write_sparsity_csv",
]
