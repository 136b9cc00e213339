"""One step of a Rosenbrock method, and its transpose."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adjoint_jax import tree
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.lanes import in_lanes, put
from adjoint_jax.linear.dense import DenseJacobian
from adjoint_jax.linear.jacobian import AbstractInverse, AbstractJacobian
from adjoint_jax.linear.mass import times_mass, times_mass_transposed
from adjoint_jax.problem import Interval, Parameters, Problem, Rates
from adjoint_jax.quadrature import Nodes, Rule, gauss_legendre
from adjoint_jax.solvers.solver import (
    AbstractImplicitSolver,
    Step,
    StepOutputs,
    pullback_at,
    stage_time,
    through_interpolant,
    with_cost,
)
from adjoint_jax.solvers.tableau import Row, padded
from adjoint_jax.tree import Arrays, Scalar


@dataclasses.dataclass(frozen=True)
class RosenbrockTableau:
    r"""A Rosenbrock method with its error estimate and its dense output.

    One step of size $h$ from $(t, y)$ for $M \dot y = f(t, y)$, with $J = \partial f/\partial y$ at $(t, y)$, is

    $$(M - \gamma h J)\, u_i = \gamma \Big( h f\big(t + \alpha_i h,\; y + \sum_{j<i} a_{ij} u_j\big)
    + M \sum_{j<i} c_{ij} u_j + \gamma_i h^2 \frac{\partial f}{\partial t}(t, y) \Big), \qquad y^+ = y + \sum_i m_i u_i.$$

    The error estimate is $\sum_i e_i u_i$. The dense output at $t + s h$, $0 \le s \le 1$, is $y + \sum_i \beta_i(s) u_i$
    with $\beta_i(s) = \sum_{p \ge 1} d_{ip} s^p$. This is the form of E. Hairer and G. Wanner, "Solving Ordinary
    Differential Equations II", equation IV.7.25, multiplied by $\gamma h^2$, so that a step of no length is one.

    Raises `ValueError` if shapes disagree, or the dense output does not end in the step's own result.
    """

    name: str
    order: int
    """Order of the step."""
    gamma: float
    a: tuple[Row, ...]
    """Row i has i entries, so the first row is `()`."""
    c: tuple[Row, ...]
    """Likewise."""
    alpha: Row
    gammas: Row
    """gamma_i, the coefficients of the derivative with respect to time."""
    m: Row
    error: Row
    error_order: int
    """Order of the embedded method, `m - error`."""
    dense: tuple[Row, ...]
    """`dense[i][p - 1]` is the coefficient of s^p in the weight of u_i."""
    dense_order: int
    """Order of the dense output: its local error is O(h^(dense_order + 1))."""

    def __post_init__(self) -> None:
        stages = len(self.m)
        for name in ("a", "c", "alpha", "gammas", "error", "dense"):
            self._require(len(getattr(self, name)) == stages, f"{name} must have one entry per stage")
        for rows in (self.a, self.c):
            self._require(all(len(row) == i for i, row in enumerate(rows)), "row i of a and of c must have i entries")
        for row, weight in zip(self.dense, self.m, strict=True):
            close = abs(math.fsum(row) - weight) <= 1e-12 * (1.0 + math.fsum(map(abs, row)))
            self._require(close, f"dense weights end in {math.fsum(row)} at s = 1, expected m = {weight}")

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"RosenbrockTableau {self.name!r}: {message}.")


class Rosenbrock(AbstractImplicitSolver):
    """The Rosenbrock method of a tableau: linearly implicit, with one Jacobian and one factorisation a step.

    - `jacobian`: how the Jacobian is computed and solved with; the whole of it by default. It must be exact: the method's
      order depends on it.
    """

    takes_mass: ClassVar[bool] = True

    tableau: RosenbrockTableau = eqx.field(static=True)
    jacobian: AbstractJacobian = DenseJacobian()

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
        return len(self.tableau.m)

    def step(self, problem: Problem, interval: Interval, state: Arrays, first: Arrays | None) -> Step:
        del first
        return self._solved(problem, interval, state, self._inverse(problem, interval, state))

    def _inverse(self, problem: Problem, interval: Interval, y: Arrays) -> AbstractInverse:
        return self.jacobian.inverse(problem, interval.first, y, self.tableau.gamma * (interval.end - interval.start))

    def _solved(self, problem: Problem, interval: Interval, y: Arrays, inverse: AbstractInverse) -> Step:
        tableau = self.tableau
        stages = self._by_length(problem, self._stages_in_a_loop, self._stages_written_out)(problem, interval, y, inverse)
        return Step(
            interval=interval,
            before=y,
            after=_combined(y, tableau.m, stages),
            stages=tuple(stages),
            error=tree.weighted_sum(tableau.error, stages),
        )

    def _by_length(self, problem: Problem, loop: Callable[..., Any], written_out: Callable[..., Any]) -> Callable[..., Any]:
        """The first for long steps, the second for others and in lanes."""
        is_long = len(self.tableau.m) * problem.operations > WRITTEN_OUT_OPERATIONS
        return in_lanes(loop, written_out) if is_long else written_out

    def _stages_written_out(
        self, problem: Problem, interval: Interval, y: Arrays, inverse: AbstractInverse
    ) -> list[Arrays]:
        """u_1, ..., u_s."""
        tableau, h, slope_in_time = self.tableau, interval.end - interval.start, _slope_in_time(problem, interval.first, y)
        stages: list[Arrays] = []
        for i in range(len(tableau.m)):
            slope = problem.field(*self._stage(interval, y, stages, i))
            right = tree.scale(h, tree.add(slope, tree.scale(h * tableau.gammas[i], slope_in_time)))
            if any(tableau.c[i]):
                right = tree.add(right, times_mass(problem, tree.weighted_sum(tableau.c[i], stages)))
            stages.append(inverse.solve(tree.scale(tableau.gamma, right)))
        return stages

    def _stages_in_a_loop(self, problem: Problem, interval: Interval, y: Arrays, inverse: AbstractInverse) -> list[Arrays]:
        """The same."""
        rows, h, slope_in_time = self._rows, interval.end - interval.start, _slope_in_time(problem, interval.first, y)
        count, times = len(self.tableau.m), self._times(interval)

        def next_stage(i: Array, stages: Arrays) -> Arrays:
            slope = problem.field(times[i], tree.add(y, tree.contract(rows.a[i], stages)))
            right = tree.scale(h, tree.add(slope, tree.scale(h * rows.gammas[i], slope_in_time)))
            right = tree.add(right, times_mass(problem, tree.contract(rows.c[i], stages)))
            return put(stages, i, inverse.solve(tree.scale(self.tableau.gamma, right)))

        return tree.unstack(jax.lax.fori_loop(0, count, next_stage, tree.buffer(count, y)), count)

    def _stage(self, interval: Interval, y: Arrays, stages: Sequence[Arrays], i: int) -> tuple[Scalar, Arrays]:
        """Where the field is evaluated in stage i."""
        return stage_time(interval, self.tableau.alpha[i]), _combined(y, self.tableau.a[i], stages[:i])

    def _times(self, interval: Interval) -> Float[Array, " stages"]:
        return jnp.stack([stage_time(interval, node) for node in self.tableau.alpha])

    @property
    def _rows(self) -> "_Rows":
        tableau = self.tableau
        a, c = jnp.asarray(padded(tableau.a)), jnp.asarray(padded(tableau.c))
        return _Rows(a, c, jnp.asarray(tableau.gammas), jnp.asarray(tableau.m), jnp.asarray(tableau.dense))

    def blank_step(self, t: Scalar, state: Arrays) -> Step:
        return Step(Interval(t, t, t, t), state, state, (tree.zeros_like(state),) * len(self.tableau.m), None)

    def interpolant(self, step: Step) -> Interpolant:
        columns = zip(*self.tableau.dense, strict=True)
        coefficients = tree.stack([tree.weighted_sum(column, step.stages) for column in columns])
        return Interpolant(step.interval.start, step.interval.end, step.before, coefficients)

    def quadrature(self, step: Step) -> Nodes:
        """Gauss-Legendre nodes on the interpolant, exact for polynomials of twice its order."""
        return self._rule.over(self.interpolant(step))

    @property
    def _rule(self) -> Rule:
        return gauss_legendre(-(-(self.tableau.dense_order + 1) // 2))

    # The transposed step. Let V = M - gamma h J. With ubar_i = dJ/du_i, and lambda_i the solution of
    #
    #     V^T lambda_i = gamma ubar_i,
    #
    # the loss sees the field's value in stage i by kappa_i = h lambda_i, its derivative with respect to time by
    # gamma_i h kappa_i, u_j by c_ij M^T lambda_i, and J, since du_i = -V^-1 dV u_i, by h lambda_i u_i^T. With Y_i the
    # argument of stage i, A = dJ/dy+, G = dJ/dy through what was saved inside the step, and Q_p the derivative with respect
    # to the interpolant's coefficients, for i = s, ..., 1,
    #
    #     ubar_i = m_i A + sum_p d_ip Q_p + sum_{j > i} (a_ji mu_j + c_ji M^T lambda_j),
    #     mu_i = (df/dy(Y_i))^T kappa_i,
    #     dJ/dy = A + G + sum_i mu_i + d/dy sum_i <kappa_i, J u_i + gamma_i h df/dt>,
    #     dJ/dtheta += sum_i (df/dtheta(Y_i))^T kappa_i + d/dtheta sum_i <kappa_i, J u_i + gamma_i h df/dt>.
    #
    # The last term is a derivative of the field's own forward derivative at (t, y), along (gamma_i h, u_i): one vjp of
    # jvps. The same factorisation serves the step and its transpose.

    def transposed_step(
        self, problem: Problem, interval: Interval, state: Arrays, cotangent: StepOutputs
    ) -> tuple[Arrays, Parameters]:
        inverse = self._inverse(problem, interval, state)
        step, of_cost = self._solved(problem, interval, state, inverse), None
        if problem.running_cost is not None:
            cotangent, of_cost = through_interpolant(
                problem, self.interpolant(step), self.dense_degree, self._rule, cotangent
            )
            problem = problem.without_cost()
        transposed = self._by_length(problem, self._transposed_in_a_loop, self._transposed_written_out)
        through, kappas, gradient = transposed(problem, step, inverse, cotangent)
        through_jacobian, of_jacobian = self._through_linearisation(problem, step, kappas)
        y, gradient = tree.add(cotangent.after, cotangent.y0, through, through_jacobian), tree.add(gradient, of_jacobian)
        return y, gradient if of_cost is None else with_cost(gradient, of_cost)

    def _transposed_written_out(
        self, problem: Problem, step: Step, inverse: AbstractInverse, cotangent: StepOutputs
    ) -> "_Transposed":
        tableau, h = self.tableau, step.interval.end - step.interval.start
        mus: list[Arrays] = []
        nus: list[Arrays] = []
        kappas: list[Arrays] = []
        gradients: list[Parameters] = []
        for i in reversed(range(len(tableau.m))):
            later = range(i + 1, len(tableau.m))
            weights = [tableau.a[j][i] for j in later] + [tableau.c[j][i] for j in later]
            ubar = _combined(tree.scale(tableau.m[i], cotangent.after), weights, mus + nus)
            if cotangent.coefficients is not None:
                ubar = tree.add(ubar, tree.weighted_sum(tableau.dense[i], cotangent.coefficients))
            lambda_i = inverse.solve_transposed(tree.scale(tableau.gamma, ubar))
            nus.insert(0, times_mass_transposed(problem, lambda_i))
            kappas.insert(0, tree.scale(h, lambda_i))
            pullback = pullback_at(problem, *self._stage(step.interval, step.before, step.stages, i))[1]
            mu, gradient = pullback(Rates(kappas[0], ()))
            mus.insert(0, mu)
            gradients.insert(0, gradient)
        return _Transposed(tree.add(*mus), tree.stack(kappas), tree.add(*gradients))

    def _transposed_in_a_loop(
        self, problem: Problem, step: Step, inverse: AbstractInverse, cotangent: StepOutputs
    ) -> "_Transposed":
        rows, h, stages = self._rows, step.interval.end - step.interval.start, tree.stack(step.stages)
        count, times = len(self.tableau.m), self._times(step.interval)
        of_powers = None if cotangent.coefficients is None else tree.stack(cotangent.coefficients)

        def previous_stage(reversed_index: Array, later: _Later) -> _Later:
            i = count - 1 - reversed_index
            ubar = tree.add(tree.contract(rows.a[:, i], later.mus), tree.contract(rows.c[:, i], later.nus))
            ubar = tree.add(tree.scale(rows.m[i], cotangent.after), ubar)
            if of_powers is not None:
                ubar = tree.add(ubar, tree.contract(rows.dense[i], of_powers))
            lambda_i = inverse.solve_transposed(tree.scale(self.tableau.gamma, ubar))
            kappa, nu = tree.scale(h, lambda_i), times_mass_transposed(problem, lambda_i)
            pullback = pullback_at(problem, times[i], tree.add(step.before, tree.contract(rows.a[i], stages)))[1]
            mu, gradient = pullback(Rates(kappa, ()))
            mus, nus, kappas = put((later.mus, later.nus, later.kappas), i, (mu, nu, kappa))
            return _Later(mus, nus, kappas, tree.add(later.gradient, gradient))

        zeros = tree.zeros_like(stages)
        start = _Later(zeros, zeros, zeros, tree.zeros_like(problem.parameters))
        first = jax.lax.fori_loop(0, count, previous_stage, start)
        return _Transposed(tree.map(lambda leaf: jnp.sum(leaf, axis=0), first.mus), first.kappas, first.gradient)

    def _through_linearisation(self, problem: Problem, step: Step, kappas: Arrays) -> tuple[Arrays, Parameters]:
        """The derivatives of the sum of <kappa_i, J u_i + gamma_i h df/dt> with respect to y and the parameters."""
        t, h = step.interval.first, step.interval.end - step.interval.start
        along = h * jnp.asarray(self.tableau.gammas, h.dtype)

        def derivatives(y: Arrays, parameters: Parameters) -> Arrays:
            field = problem.at(parameters).field
            return jax.vmap(lambda gamma_h, u: jax.jvp(field, (t, y), (gamma_h, u))[1])(along, tree.stack(step.stages))

        return jax.vjp(derivatives, step.before, problem.parameters)[1](kappas)


class _Rows(NamedTuple):
    """Coefficients of the tableau, to be looked up in loops over stages."""

    a: Float[Array, "stages stages"]
    c: Float[Array, "stages stages"]
    gammas: Float[Array, " stages"]
    m: Float[Array, " stages"]
    dense: Float[Array, "stages powers"]


class _Transposed(NamedTuple):
    """What the stages say: the sum of mu_i; kappa_1, ..., kappa_s, stacked; and their part of dJ/dparameters, without what
    reaches the loss through J."""

    through: Arrays
    kappas: Arrays
    gradient: Parameters


class _Later(NamedTuple):
    """mu_j, M^T lambda_j and kappa_j of the stages behind one, stacked, with zeros for the others; and what these say of
    dJ/dparameters."""

    mus: Arrays
    nus: Arrays
    kappas: Arrays
    gradient: Parameters


WRITTEN_OUT_OPERATIONS = 120
"""Of a step's field evaluations. Longer steps are loops over stages, forward and transposed, but for lanes of a `vmap`,
where combinations of stages are most of the work. Measured on a CPU with Rodas5P on HIRES and POLLU (660 and 2,400
operations), the time of a gradient in loops in that of one written out, and that to build it: 0.6 and 0.4, 0.4 and 0.4; in
256 and 64 lanes 1.9 and 0.6, 1.4 and 0.5. For Robertson's equations (170) 1.1 and 0.6; but a solve takes 0.05 instead of
0.12 ms, since XLA runs programs of fewer than 1,000 operations without a change of threads. For van der Pol's (90), a
solve takes 1.2 of the time."""


def _slope_in_time(problem: Problem, t: Scalar, y: Arrays) -> Arrays:
    """The derivative of the field with respect to time alone."""
    return jax.jvp(lambda t: problem.field(t, y), (t,), (jnp.ones_like(t),))[1]


def _combined(y: Arrays, weights: Sequence[float], trees: Sequence[Arrays]) -> Arrays:
    """`y + sum(weight * tree)`."""
    return tree.add(y, tree.weighted_sum(weights, trees)) if any(weights) else y
