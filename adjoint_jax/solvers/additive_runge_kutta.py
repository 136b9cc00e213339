"""Additive Runge-Kutta methods: of a field in two parts, one is treated explicitly, the other implicitly."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adjoint_jax import tree
from adjoint_jax.problem import Interval, Parameters, Problem, Split
from adjoint_jax.quadrature import Nodes, gauss_legendre
from adjoint_jax.solvers.implicit_runge_kutta import ESDIRK, AbstractTreatment, Stages
from adjoint_jax.solvers.solver import AbstractSolver, Step, StepOutputs
from adjoint_jax.solvers.tableau import Row, padded
from adjoint_jax.tree import Arrays, Scalar


class Slopes(NamedTuple):
    """The two parts of a field at one stage, or at all."""

    explicit: Arrays
    implicit: Arrays


class _InParts(AbstractTreatment):
    """Only the implicit part of a field is in the equations."""

    explicit: Problem
    equations: Problem
    a: Float[np.ndarray, "stages stages"]
    explicit_a: Float[np.ndarray, "stages stages"]
    b: Float[np.ndarray, " stages"]

    def first(self, t: Scalar, y: Arrays) -> Slopes:
        return self.kept(t, y, self.equations.field(t, y))

    def kept(self, t: Scalar, state: Arrays, slope: Arrays) -> Slopes:
        return Slopes(self.explicit.field(t, state), slope)

    def total(self, slopes: Slopes) -> Arrays:
        return tree.add(slopes.explicit, slopes.implicit)

    def before(self, i: Array, slopes: Slopes) -> Arrays:
        explicit = tree.contract(jnp.asarray(self.explicit_a)[i], slopes.explicit)
        return tree.add(explicit, tree.contract(jnp.asarray(self.a)[i], slopes.implicit))

    def after(self, y: Arrays, h: Scalar, stages: Stages) -> Arrays:
        return tree.add(y, tree.scale(h, tree.contract(jnp.asarray(self.b), self.total(stages.slopes))))

    @property
    def further_evaluations(self) -> int:
        return len(self.b)


class AdditiveRungeKutta(ESDIRK):
    r"""A diagonally implicit method, together with an explicit one that has the same nodes and weights.

    One step of size $h$ from $(t, y)$, of a field `Split(explicit, implicit)` $= f + g$, is

    $$Y_i = y + h \sum_{j<i} (\hat a_{ij} f_j + a_{ij} g_j) + \gamma h g_i, \qquad y^+ = y + h \sum_i b_i (f_i + g_i),$$

    with $f_i = f(t + c_i h, Y_i)$, $g_i = g(t + c_i h, Y_i)$ and $b_i = a_{si}$: equations and their Jacobians are those of
    the implicit part alone, whose stiffness does not limit the steps, while that of the explicit part does. Any other field
    is implicit as a whole, as in `ESDIRK`. A running cost is integrated along the dense output.

    `solution.stats.evaluations` counts, of a split field, the evaluations of both parts.

    - `explicit`: the rows of $\hat a$. `jacobian`, `newton`: see `ESDIRK`; the Jacobian is that of the implicit part.

    Raises `ValueError` if a row of `explicit` does not sum to its `c`.
    """

    explicit: tuple[Row, ...] = eqx.field(static=True, kw_only=True)

    def __check_init__(self) -> None:
        sums = [sum(row) for row in self.explicit]
        if [len(row) for row in self.explicit] != list(range(self.tableau.stages)) or not np.allclose(sums, self.tableau.c):
            raise ValueError(
                f"{type(self).__name__}(explicit=...): row i must have i entries with the sum c_i, for c = "
                f"{self.tableau.c}, got rows with the sums {sums}."
            )

    def treatment(self, problem: Problem) -> AbstractTreatment:
        field, tableau = problem.vector_field, self.tableau
        if not isinstance(field, Split):
            return super().treatment(problem)
        explicit, implicit = problem.of_field(field.explicit), problem.of_field(field.implicit)
        return _InParts(explicit, implicit, tableau.matrix, padded(self.explicit), np.array(tableau.rows[-1]))

    def quadrature(self, step: Step) -> Nodes:
        """Gauss-Legendre nodes on the interpolant: a step does not keep the parts of its stages."""
        return gauss_legendre(3).over(self.interpolant(step))

    def transposed_step(
        self, problem: Problem, interval: Interval, state: Arrays, cotangent: StepOutputs
    ) -> tuple[Arrays, Parameters]:
        """As in `ESDIRK` for what is implicit as a whole; else by JAX, through the stages' equations and no iteration."""
        if isinstance(problem.vector_field, Split) or problem.running_cost is not None:
            return AbstractSolver.transposed_step(self, problem, interval, state, cotangent)
        return super().transposed_step(problem, interval, state, cotangent)
