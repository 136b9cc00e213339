"""Differentiable ODE solvers for JAX: one contract, a family of adjoints."""

import importlib
from typing import TYPE_CHECKING

from adjoint_jax.adjoints.discrete import DiscreteAdjoint
from adjoint_jax.adjoints.forward_mode import ForwardMode
from adjoint_jax.adjoints.keep import KeepStages, KeepStates
from adjoint_jax.adjoints.linearisations import KeepLinearisations
from adjoint_jax.controllers.grids import FixedSteps, StepTo
from adjoint_jax.controllers.step_sizes import ConstantStepSize, PIDController
from adjoint_jax.problem import Split
from adjoint_jax.saveat import SaveAt
from adjoint_jax.solution import Solution, SolveError, Stats, Status
from adjoint_jax.solve import odeint, solve
from adjoint_jax.solvers.explicit_runge_kutta import ExplicitRungeKutta
from adjoint_jax.solvers.methods import RK4, Bosh3, Dopri5, Euler, Heun, Midpoint, Ralston, Tsit5
from adjoint_jax.solvers.tableau import ButcherTableau
from adjoint_jax.tolerance import rms_norm

if TYPE_CHECKING:
    from adjoint_jax import diagnostics
    from adjoint_jax.adjoints.backsolve import BacksolveAdjoint
    from adjoint_jax.adjoints.gauss import GaussAdjoint
    from adjoint_jax.adjoints.interpolating import InterpolatingAdjoint
    from adjoint_jax.adjoints.reversible import ReversibleAdjoint
    from adjoint_jax.linear.banded import BandedJacobian
    from adjoint_jax.linear.dense import DenseJacobian
    from adjoint_jax.linear.krylov import KrylovJacobian
    from adjoint_jax.linear.sparse import SparseJacobian
    from adjoint_jax.solvers.additive_runge_kutta import AdditiveRungeKutta
    from adjoint_jax.solvers.auto import AutoSolver
    from adjoint_jax.solvers.bdf import BDF
    from adjoint_jax.solvers.esdirk_methods import KenCarp4, Kvaerno3, Kvaerno5
    from adjoint_jax.solvers.high_order import Dopri8, Vern7
    from adjoint_jax.solvers.implicit_runge_kutta import ESDIRK, ESDIRKTableau
    from adjoint_jax.solvers.newton import SimplifiedNewton
    from adjoint_jax.solvers.reversible import AsynchronousLeapfrog, Reversible, ReversibleHeun
    from adjoint_jax.solvers.rosenbrock import Rosenbrock, RosenbrockTableau
    from adjoint_jax.solvers.rosenbrock_methods import Rodas4, Rodas5P, Rosenbrock23

__all__ = [
    "BDF",
    "ESDIRK",
    "RK4",
    "AdditiveRungeKutta",
    "AsynchronousLeapfrog",
    "AutoSolver",
    "BacksolveAdjoint",
    "BandedJacobian",
    "Bosh3",
    "ButcherTableau",
    "ConstantStepSize",
    "DenseJacobian",
    "DiscreteAdjoint",
    "Dopri5",
    "Dopri8",
    "ESDIRKTableau",
    "Euler",
    "ExplicitRungeKutta",
    "FixedSteps",
    "ForwardMode",
    "GaussAdjoint",
    "Heun",
    "InterpolatingAdjoint",
    "KeepLinearisations",
    "KeepStages",
    "KeepStates",
    "KenCarp4",
    "KrylovJacobian",
    "Kvaerno3",
    "Kvaerno5",
    "Midpoint",
    "PIDController",
    "Ralston",
    "Reversible",
    "ReversibleAdjoint",
    "ReversibleHeun",
    "Rodas4",
    "Rodas5P",
    "Rosenbrock",
    "Rosenbrock23",
    "RosenbrockTableau",
    "SaveAt",
    "SimplifiedNewton",
    "Solution",
    "SolveError",
    "SparseJacobian",
    "Split",
    "Stats",
    "Status",
    "StepTo",
    "Tsit5",
    "Vern7",
    "diagnostics",
    "odeint",
    "rms_norm",
    "solve",
]

__version__ = "0.1.0"

_LATER = {
    "adjoints.backsolve": ("BacksolveAdjoint",),
    "adjoints.gauss": ("GaussAdjoint",),
    "adjoints.interpolating": ("InterpolatingAdjoint",),
    "adjoints.reversible": ("ReversibleAdjoint",),
    "linear.banded": ("BandedJacobian",),
    "linear.dense": ("DenseJacobian",),
    "linear.krylov": ("KrylovJacobian",),
    "linear.sparse": ("SparseJacobian",),
    "solvers.additive_runge_kutta": ("AdditiveRungeKutta",),
    "solvers.auto": ("AutoSolver",),
    "solvers.bdf": ("BDF",),
    "solvers.esdirk_methods": ("KenCarp4", "Kvaerno3", "Kvaerno5"),
    "solvers.high_order": ("Dopri8", "Vern7"),
    "solvers.implicit_runge_kutta": ("ESDIRK", "ESDIRKTableau"),
    "solvers.newton": ("SimplifiedNewton",),
    "solvers.reversible": ("AsynchronousLeapfrog", "Reversible", "ReversibleHeun"),
    "solvers.rosenbrock": ("Rosenbrock", "RosenbrockTableau"),
    "solvers.rosenbrock_methods": ("Rodas4", "Rodas5P", "Rosenbrock23"),
}
"""Modules that many programs do without, and the public names in them. They are imported when one of these is first asked
for, as the diagnostics are: they hold nearly half of the classes, each of which takes Equinox half a millisecond."""


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """What is imported when it is first asked for."""
        if name == "diagnostics":
            return importlib.import_module("adjoint_jax.diagnostics")
        module = next((module for module, names in _LATER.items() if name in names), None)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"adjoint_jax.{module}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
