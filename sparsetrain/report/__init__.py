"""Measured facts about sparse networks: counts, FLOPs, bytes and intervals, as values, tables, CSV and pictures."""

from sparsetrain.report.gates import draw_gates
from sparsetrain.report.measure import LayerReport, Report, cost, measure
from sparsetrain.report.plots import draw_accuracy, draw_sparsity
from sparsetrain.report.rounds import Round, overlap, rounds_table, training_flops, write_rounds_csv
from sparsetrain.report.soup_rounds import SoupRound, draw_soups, soups_table, write_soups_csv
from sparsetrain.report.statistics import Interval, paired, t_interval
from sparsetrain.report.sweep import (
    Run,
    Setting,
    Sweep,
    collect,
    sweep_curves,
    sweep_table,
    write_sweep_csv,
)
from sparsetrain.report.tables import (
    is_accuracy,
    markdown_table,
    plan_table,
    report_table,
    write_between,
    write_sparsity_csv,
)

__all__ = [
    "Interval",
    "LayerReport",
    "Report",
    "Round",
    "Run",
    "Setting",
    "SoupRound",
    "Sweep",
    "collect",
    "cost",
    "draw_accuracy",
    "draw_gates",
    "draw_soups",
    "draw_sparsity",
    "is_accuracy",
    "markdown_table",
    "measure",
    "overlap",
    "paired",
    "plan_table",
    "report_table",
    "rounds_table",
    "soups_table",
    "sweep_curves",
    "sweep_table",
    "t_interval",
    "training_flops",
    "write_between",
    "write_rounds_csv",
    "write_soups_csv",
    "write_sparsity_csv",
    "write_sweep_csv",
]
