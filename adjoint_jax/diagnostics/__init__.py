"""Checks that users can run on their own problems."""

from adjoint_jax.diagnostics.comparison import compare_adjoints
from adjoint_jax.diagnostics.comparison_report import AdjointComparison, AdjointRow, LeafError, Measurement, Reference
from adjoint_jax.diagnostics.counting import Counts
from adjoint_jax.diagnostics.gradient_check import check_gradients, gradient_report
from adjoint_jax.diagnostics.gradient_report import Comparison, GradientError, GradientReport, Verdict
from adjoint_jax.diagnostics.memory_plan import MemoryPlan, memory_plan
from adjoint_jax.diagnostics.reconstruction import Reconstruction, reconstruction_error

__all__ = [
    "AdjointComparison",
    "AdjointRow",
    "Comparison",
    "Counts",
    "GradientError",
    "GradientReport",
    "LeafError",
    "Measurement",
    "MemoryPlan",
    "Reconstruction",
    "Reference",
    "Verdict",
    "check_gradients",
    "compare_adjoints",
    "gradient_report",
    "memory_plan",
    "reconstruction_error",
]
