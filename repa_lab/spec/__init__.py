"""The spec: one YAML file is one question. Reads, validates and expands it into arms. Imports no torch."""

from repa_lab.errors import Place, Problem, SpecError
from repa_lab.spec.evaluate import EvaluateConfig, ExtractorConfig
from repa_lab.spec.experiment import Arm, Experiment, load_spec
from repa_lab.spec.options import (
    BudgetConfig,
    CompareConfig,
    Machine,
    ResolvedOptions,
    RunOptions,
    SearchConfig,
    StopRule,
)
from repa_lab.spec.schema import ModelConfig, RunConfig

__all__ = [
    "Arm",
    "BudgetConfig",
    "CompareConfig",
    "EvaluateConfig",
    "Experiment",
    "ExtractorConfig",
    "Machine",
    "ModelConfig",
    "Place",
    "Problem",
    "ResolvedOptions",
    "RunConfig",
    "RunOptions",
    "SearchConfig",
    "SpecError",
    "StopRule",
    "load_spec",
]
