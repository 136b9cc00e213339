"""Checks that users can run on their own problems."""

from adjoint_jax.diagnostics.gradient_check import check_gradients, gradient_report
from adjoint_jax.diagnostics.gradient_report import Comparison, GradientError, GradientReport, Verdict

__all__ = ["Comparison", "GradientError", "GradientReport", "Verdict", "check_gradients", "gradient_report"]
