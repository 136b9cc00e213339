"""One step of a diagonally implicit Runge-Kutta method, and its transpose."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from adjoint_jax import tree
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.lanes import put
from adjoint_jax.linear.dense import DenseJacobian
from adjoint_jax.linear.jacobian import AbstractInverse, AbstractJacobian
from adjoint_jax.problem import Interval, Parameters, Problem, Rates
from adjoint_jax.quadrature import Nodes
from adjoint_jax.solvers.newton import SimplifiedNewton, StageEquation, differentiable
from adjoint_jax.solvers.solver import AbstractImplicitSolver, Step, StepOutputs, pullback_at, stage_time
from adjoint_jax.solvers.tableau import Row, padded
from adjoint_jax.tolerance import Tolerance
from adjoint_jax.tree import Arrays, Scalar


@dataclasses.dataclass(frozen=True)
class ESDIRKTableau:
    r"""A stiffly accurate, singly diagonally implicit Runge-Kutta method with an explicit first stage.

    One step of size $h$ from $(t, y)$ is

    $$Y_i = y + h \sum_{j<i} a_{ij} k_j + \gamma h k_i, \qquad k_i = f(t + c_i h, Y_i), \qquad y^+ = Y_s,$$

    with $Y_1 = y$, and $a_{ii} = \gamma$ for all other stages. The error estimate is $h \sum_i e_i k_i$. The dense output
    at $t + s h$, $0 \le s \le 1$, is $y + h \sum_i \beta_i(s) k_i$ with $\beta_i(s) = \sum_{p \ge 1} d_{ip} s^p$.

    Raises `ValueError` if shapes disagree, a row of `a` does not sum to `c`, `error` not to zero, or the dense output does
    not end in the step's own result.
    """

    name: str
    order: int
    """Order of the step."""
    gamma: float
    a: tuple[Row, ...]
    """The coefficients below the diagonal: row i has i entries, so the first row is `()`."""
    c: Row
    error: Row
    error_order: int
    """Order of the embedded method, whose weights are the last stage's less `error`."""
    dense: tuple[Row, ...]
    """`dense[i][p - 1]` is the coefficient of s^p in the weight of stage i."""
    dense_order: int
    """Order of the dense output: its local error is O(h^(dense_order + 1))."""

    def __post_init__(self) -> None:
        stages = len(self.a)
        for name in ("c", "error", "dense"):
            self._require(len(getattr(self, name)) == stages, f"{name} must have one entry per stage")
        self._require(all(len(row) == i for i, row in enumerate(self.a)), "row i of a must have i entries")
        for row, node in zip(self.rows, self.c, strict=True):
            self._require(_close(row, node), f"a row of a and gamma sum to {math.fsum(row)}, but its c is {node}")
        self._require(self.c[-1] == 1.0, f"the last stage must be at the step's end, but its c is {self.c[-1]}")
        self._require(_close(self.error, 0.0), "error must sum to 0")
        for row, weight in zip(self.dense, self.rows[-1], strict=True):
            self._require(_close(row, weight), f"dense weights end in {math.fsum(row)} at s = 1, expected {weight}")

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"ESDIRKTableau {self.name!r}: {message}.")

    @property
    def stages(self) -> int:
        """The number of stages, the explicit one included."""
        return len(self.a)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of `a` with their diagonal."""
        return tuple((*row, self.gamma if i else 0.0) for i, row in enumerate(self.a))

    @property
    def matrix(self) -> Float[np.ndarray, "stages stages"]:
        """`a` as a square matrix, without the diagonal."""
        return padded(self.a)


def _close(row: Row, total: float) -> bool:
    return abs(math.fsum(row) - total) <= 1e-12 * (1.0 + math.fsum(map(abs, row)))


class Stages(NamedTuple):
    """The stages of a step: their states, and what the treatment of the field keeps of their slopes, stacked; and how the
    iterations went. `evaluations` are those of all stages but the first."""

    states: Arrays
    slopes: Any
    converged: Bool[Array, ""]
    rate: Float[Array, ""]
    evaluations: Int[Array, ""]


class AbstractTreatment(eqx.Module):
    """How a field enters the stages."""

    equations: eqx.AbstractVar[Problem]
    """The problem whose field is in the stages' equations."""

    @abc.abstractmethod
    def first(self, t: Scalar, y: Arrays) -> Any:
        """What is kept of the first stage."""

    @abc.abstractmethod
    def kept(self, t: Scalar, state: Arrays, slope: Arrays) -> Any:
        """What is kept of a stage, from the solution of its equation."""

    @abc.abstractmethod
    def total(self, slopes: Any) -> Arrays:
        """The whole field, at one stage or at all."""

    @abc.abstractmethod
    def before(self, i: Array, slopes: Any) -> Arrays:
        """The weighted sum over the stages before stage i."""

    @abc.abstractmethod
    def after(self, y: Arrays, h: Scalar, stages: Stages) -> Arrays:
        """The state at the end of the step."""

    @property
    @abc.abstractmethod
    def further_evaluations(self) -> int:
        """Evaluations in a step besides those of the equations."""


class _AsAWhole(AbstractTreatment):
    """The whole field is in the equations, and the last stage is the step's result."""

    equations: Problem
    a: Float[np.ndarray, "stages stages"]

    def first(self, t: Scalar, y: Arrays) -> Arrays:
        return self.equations.field(t, y)

    def kept(self, t: Scalar, state: Arrays, slope: Arrays) -> Arrays:
        del t, state
        return slope

    def total(self, slopes: Arrays) -> Arrays:
        return slopes

    def before(self, i: Array, slopes: Arrays) -> Arrays:
        return tree.contract(jnp.asarray(self.a)[i], slopes)

    def after(self, y: Arrays, h: Scalar, stages: Stages) -> Arrays:
        del y, h
        return tree.map(lambda leaf: leaf[-1], stages.states)

    @property
    def further_evaluations(self) -> int:
        return 0


class ESDIRK(AbstractImplicitSolver):
    """The diagonally implicit Runge-Kutta method of a tableau: one Jacobian and one factorisation a step, with which the
    stages' equations are solved by simplified Newton iterations. A step whose iterations do not converge is rejected; on
    a given grid it ends the integration.

    Gradients are those of the equations' solutions: iterations are never differentiated. Linear systems of a derivative
    have the Jacobian of their own stage.

    `solution.stats.evaluations` counts the field evaluations of the first stages and of all iterations, those of Jacobians
    aside.

    - `jacobian`: how the Jacobian is computed and solved with; the whole of it by default. It need not be exact for the
      step, but must be for gradients.
    - `newton`: when the iterations end.
    """

    tableau: ESDIRKTableau = eqx.field(static=True)
    jacobian: AbstractJacobian = DenseJacobian()
    newton: SimplifiedNewton = SimplifiedNewton()
    tolerance: Tolerance | None = eqx.field(default=None, kw_only=True)
    """The controller's, which `within` sets."""

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def error_order(self) -> int | None:
        return self.tableau.error_order

    @property
    def dense_degree(self) -> int:
        return len(self.tableau.dense[0])

    def evaluations(self, *, estimated: bool, interpolated: bool) -> int:
        del estimated, interpolated
        return 1

    def within(self, tolerance: Tolerance | None) -> "ESDIRK":
        return dataclasses.replace(self, tolerance=tolerance)

    def step(self, problem: Problem, interval: Interval, state: Arrays, first: Arrays | None) -> Step:
        del first
        treatment, h = self.treatment(problem), interval.end - interval.start
        stages = self._solved(treatment, interval, state)
        total = treatment.total(stages.slopes)
        slopes = [tree.map(lambda leaf, i=i: leaf[i], total) for i in range(self.tableau.stages)]
        after = treatment.after(state, h, stages)
        after = tree.map(lambda leaf: jnp.where(stages.converged, leaf, jnp.nan), after)
        error = tree.scale(h, tree.weighted_sum(self.tableau.error, slopes))
        return Step(interval, state, after, tuple(slopes), error, stages.evaluations)

    def treatment(self, problem: Problem) -> AbstractTreatment:
        """How the problem's field enters the stages."""
        return _AsAWhole(problem, self.tableau.matrix)

    def _solved(self, treatment: AbstractTreatment, interval: Interval, y: Arrays) -> Stages:
        tableau, h, count, equations = self.tableau, interval.end - interval.start, self.tableau.stages, treatment.equations
        inverse = self._inverse(equations, interval, y)
        tolerance, times = self.newton.tolerance(self.tolerance), self._times(interval)
        guesses = jnp.asarray(_extrapolation(tableau.c))

        def next_stage(i: Array, stages: Stages) -> Stages:
            base = tree.add(y, tree.scale(h, treatment.before(i, stages.slopes)))
            equation = StageEquation(equations, times[i], base, tableau.gamma * h)
            still, states = equation.standing_still(), jax.lax.stop_gradient(stages.states)
            solved = self.newton.solve(still, tree.contract(guesses[i], states), inverse, tolerance, stages.rate)
            slope = differentiable(solved.slope, equation, self.jacobian)
            state = equation.state(slope)
            return Stages(
                states=put(stages.states, i, state),
                slopes=put(stages.slopes, i, treatment.kept(times[i], state, slope)),
                converged=stages.converged & solved.converged,
                rate=solved.rate,
                evaluations=stages.evaluations + solved.iterations,
            )

        first = treatment.first(interval.first, y)
        linear = inverse.solve(jax.lax.stop_gradient(tree.scale(tableau.c[1] * h, treatment.total(first))))
        start = Stages(
            states=tree.buffer(count, y),
            slopes=put(tree.buffer(count, first), jnp.int32(0), first),
            converged=jnp.array(True),
            rate=jnp.ones((), h.dtype),
            evaluations=jnp.full((), treatment.further_evaluations, jnp.int32),
        )
        states = put(start.states, jnp.int32(0), y)
        # The second stage has no earlier one to start from: a step of the linearly implicit Euler method stands in its
        # place. It is exact to second order for autonomous fields, as the stage is, and damps what is stiff.
        states = put(states, jnp.int32(1), tree.add(y, linear))
        return jax.lax.fori_loop(1, count, next_stage, start._replace(states=states))

    def _inverse(self, problem: Problem, interval: Interval, y: Arrays) -> AbstractInverse:
        """The matrix of the iterations, a constant of the derivative."""
        t, y, h = jax.lax.stop_gradient((interval.first, y, interval.end - interval.start))
        still = problem.at(jax.lax.stop_gradient(problem.parameters))
        return self.jacobian.inverse(still, t, y, self.tableau.gamma * h)

    def _times(self, interval: Interval) -> Float[Array, " stages"]:
        return jnp.stack([stage_time(interval, node) for node in self.tableau.c])

    def blank_step(self, t: Scalar, state: Arrays) -> Step:
        stages = (tree.zeros_like(state),) * self.tableau.stages
        return Step(Interval(t, t, t, t), state, state, stages, None, jnp.zeros((), jnp.int32))

    def interpolant(self, step: Step) -> Interpolant:
        h = step.interval.end - step.interval.start
        columns = zip(*self.tableau.dense, strict=True)
        coefficients = tree.stack([tree.weighted_sum(column, step.stages) for column in columns])
        return Interpolant(step.interval.start, step.interval.end, step.before, tree.scale(h, coefficients))

    def quadrature(self, step: Step) -> Nodes:
        """The stages of non-zero weight, as nodes: the cost is what the method gives for a further state whose derivative
        is the running cost."""
        h, rows = step.interval.end - step.interval.start, self.tableau.rows
        used = [i for i, weight in enumerate(rows[-1]) if weight]
        states = [self._stage_state(step, i) for i in used]
        weights = h * jnp.asarray([rows[-1][i] for i in used], h.dtype)
        return Nodes(self._times(step.interval)[np.array(used)], tree.stack(states), weights)

    def _stage_state(self, step: Step, i: int) -> Arrays:
        if i == 0:
            return step.before
        h, row = step.interval.end - step.interval.start, self.tableau.rows[i]
        return tree.add(step.before, tree.scale(h, tree.weighted_sum(row, step.stages[: i + 1])))

    # The transposed step. The step, with the cost C = integral of the running cost l as one more sum over its stages, is
    #
    #     Y_i = y + h sum_{j <= i} a_ij k_j,   k_i = f(t + c_i h, Y_i, theta),   y+ = Y_s,
    #     C = h sum_i b_i l(t + c_i h, Y_i, theta),   b_i = a_si,
    #
    # and its interpolant's coefficients are q_p = h sum_i d_ip k_i. Let A = dJ/dy+, G = dJ/dy through what was saved
    # inside the step, Q_p = dJ/dq_p and g = dJ/dC. With kappa_i = dJ/dk_i and mu_i = dJ/dY_i, where y+ counts as a sum over
    # the k_i of its own, for i = s, ..., 1,
    #
    #     kappa_i = h (b_i A + sum_p d_ip Q_p + sum_{j > i} a_ji mu_j) + h a_ii mu_i =: r_i + h a_ii mu_i,
    #     mu_i = (df/dy(Y_i))^T kappa_i + h b_i (dl/dy(Y_i))^T g =: J_i^T kappa_i + l_i,
    #     dJ/dy = A + G + sum_i mu_i,
    #     dJ/dtheta += sum_i (df/dtheta(Y_i))^T kappa_i + h b_i (dl/dtheta(Y_i))^T g.
    #
    # Only kappa_i and mu_i of the same stage depend on each other: without mu_i,
    #
    #     (I - h a_ii J_i)^T kappa_i = r_i + h a_ii l_i,
    #
    # one linear system for each implicit stage, with the Jacobian of that stage. All of them are factorised at once; the
    # rest is written out. (Measured for van der Pol's equation: in a loop over stages it takes twice as long and compiles
    # no faster.)

    def transposed_step(
        self, problem: Problem, interval: Interval, state: Arrays, cotangent: StepOutputs
    ) -> tuple[Arrays, Parameters]:
        tableau, h = self.tableau, interval.end - interval.start
        stages = self._solved(self.treatment(problem), interval, state)
        times, rows = self._times(interval), tableau.rows

        def inverse_at(t: Scalar, y: Arrays) -> AbstractInverse:
            return self.jacobian.inverse(problem, t, y, tableau.gamma * h)

        inverses = eqx.filter_vmap(inverse_at)(times[1:], tree.map(lambda leaf: leaf[1:], stages.states))
        mus: list[Arrays] = []
        gradients: list[Parameters] = []
        for i in reversed(range(tableau.stages)):
            weights = (rows[-1][i], *(rows[j][i] for j in reversed(range(i + 1, tableau.stages))))
            kappa = tree.weighted_sum(weights, [cotangent.after, *mus])
            if cotangent.coefficients is not None:
                kappa = tree.add(kappa, tree.weighted_sum(tableau.dense[i], cotangent.coefficients))
            kappa, cost = tree.scale(h, (kappa, tree.scale(rows[-1][i], cotangent.cost)))
            t, y = times[i], tree.map(lambda leaf, i=i: leaf[i], stages.states)
            if i > 0:
                inverse = jax.tree.map(lambda leaf, i=i: leaf[i - 1] if eqx.is_array(leaf) else leaf, inverses)
                kappa = inverse.solve_transposed(self._with_cost(problem, t, y, kappa, cost, h))
            mu, gradient = pullback_at(problem, t, y)[1](Rates(kappa, cost))
            mus.append(mu)
            gradients.append(gradient)
        return tree.add(cotangent.after, cotangent.y0, *mus), tree.add(*gradients)

    def _with_cost(self, problem: Problem, t: Scalar, y: Arrays, right: Arrays, cost: Arrays, h: Scalar) -> Arrays:
        """r_i + h a_ii l_i."""
        if problem.running_cost is None:
            return right
        slope = jax.vjp(lambda y: problem.rates(t, y).cost, y)[1](cost)[0]
        return tree.add(right, tree.scale(self.tableau.gamma * h, slope))


def _extrapolation(c: Sequence[float]) -> Float[np.ndarray, "stages stages"]:
    """Row i: the weights of the states of stages j < i in the guess of Y_i: the polynomial through the (up to three)
    nearest of them, of the order of the stages. It is made of states rather than of slopes because these may hold large
    stiff parts, which compensate each other only in the stages. The second row gives the guess that is put in its place."""
    weights = np.eye(len(c))
    for i in range(2, len(c)):
        nearest = sorted(range(i), key=lambda j: abs(c[j] - c[i]))[:3]
        for j in nearest:
            weights[i, j] = math.prod((c[i] - c[m]) / (c[j] - c[m]) for m in nearest if m != j)
        weights[i, i] = 0.0
    return weights
