"""One step of an explicit Runge-Kutta method, and its transpose."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adjoint_jax import tree
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.kernels import is_told, stored
from adjoint_jax.lanes import put
from adjoint_jax.problem import Interval, Parameters, Problem, Rates
from adjoint_jax.quadrature import Nodes
from adjoint_jax.solvers.linearisation import in_stored_halves
from adjoint_jax.solvers.solver import AbstractSolver, Pullback, Step, StepOutputs, pullback_at, stage_time
from adjoint_jax.solvers.tableau import ButcherTableau, padded
from adjoint_jax.tree import Arrays, Scalar

Carry = TypeVar("Carry")


class Stage(NamedTuple):
    """What is evaluated at a stage: k_i, and what else a method notes of the field there."""

    slope: Arrays
    noted: Any = ()


class Gather(NamedTuple):
    """How what the stages of a step say of dJ/dparameters is gathered: all at once, or from a beginning on, one stage after
    the other."""

    together: Callable[[list[Any]], Any]
    begun: Callable[[], Any]
    entered: Callable[[Any, Array, Any], Any]


def summed(problem: Problem) -> Gather:
    """The sum of derivatives."""
    return Gather(
        together=lambda gradients: tree.add(*reversed(gradients)),
        begun=lambda: tree.zeros_like(problem.parameters),
        entered=lambda so_far, _, gradient: tree.add(so_far, gradient),
    )


class ExplicitRungeKutta(AbstractSolver):
    """The explicit Runge-Kutta method of a Butcher tableau. Pass a `ButcherTableau` of your own to use another method."""

    tableau: ButcherTableau = eqx.field(static=True)

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def error_order(self) -> int | None:
        return self.tableau.error_order

    @property
    def reuses_last_stage(self) -> bool:
        return self.tableau.first_same_as_last

    @property
    def dense_degree(self) -> int:
        return len(self.tableau.dense[0])

    @property
    def extra_stages(self) -> int:
        return len(self.tableau.dense_c)

    def evaluations(self, *, estimated: bool, interpolated: bool) -> int:
        needed = self.stages_needed(estimated=estimated, interpolated=interpolated)
        return len(needed | {self.tableau.stages - 1}) - 1 if self.reuses_last_stage else len(needed)

    def stages_needed(self, *, estimated: bool, interpolated: bool) -> set[int]:
        """The stages on which the step depends, its error estimate if that is used, and its interpolant if there is one;
        without those that only the interpolant needs."""
        tableau = self.tableau
        rows = tableau.a + tableau.dense_a
        needed = {i for i, weight in enumerate(tableau.b) if weight}
        if estimated and tableau.b_error is not None:
            needed |= {i for i, weight in enumerate(tableau.b_error) if weight}
        if interpolated:
            needed |= {i for i, row in enumerate(tableau.dense) if any(row)}
        for i in reversed(range(len(rows))):
            if i in needed:
                needed |= {j for j, weight in enumerate(rows[i]) if weight}
        return {i for i in needed if i < tableau.stages}

    def step(self, problem: Problem, interval: Interval, state: Arrays, first: Arrays | None) -> Step:
        known = [] if first is None else [Stage(first)]
        return self.step_of(interval, state, self.stages(problem, interval, state, known, self.tableau.stages)[0])

    def evaluated(self, problem: Problem, t: Scalar, y: Arrays) -> Stage:
        """What is evaluated at a stage."""
        return Stage(problem.field(t, y))

    def step_of(self, interval: Interval, y: Arrays, stages: Sequence[Arrays]) -> Step:
        """The step from y, of which all stages are known."""
        h, b_error = interval.end - interval.start, self.tableau.b_error
        return Step(
            interval=interval,
            before=y,
            after=tree.add(y, tree.scale(h, tree.weighted_sum(self.tableau.b, stages))),
            stages=tuple(stages),
            error=None if b_error is None else tree.scale(h, tree.weighted_sum(b_error, stages)),
        )

    def handed_on(self, step: Step) -> Any:
        return step.stages[self.tableau.stages - 1]

    def blank_step(self, t: Scalar, state: Arrays) -> Step:
        stages = (tree.zeros_like(state),) * (self.tableau.stages + self.extra_stages)
        return Step(Interval(t, t, t, t), state, state, stages, None)

    def with_dense_stages(self, problem: Problem, step: Step) -> Step:
        count = self.tableau.stages + self.extra_stages
        known = [Stage(slope) for slope in step.stages]
        return step._replace(stages=tuple(self.stages(problem, step.interval, step.before, known, count)[0]))

    def interpolant(self, step: Step) -> Interpolant:
        h = step.interval.end - step.interval.start
        columns = zip(*self.tableau.dense, strict=True)
        coefficients = tree.stack([tree.scale(h, tree.weighted_sum(column, step.stages)) for column in columns])
        return Interpolant(step.interval.start, step.interval.end, step.before, coefficients)

    def quadrature(self, step: Step) -> Nodes:
        """The stages of non-zero weight, as nodes: the cost is what the method gives for a further state whose derivative
        is the running cost."""
        tableau, h = self.tableau, step.interval.end - step.interval.start
        used = [i for i, weight in enumerate(tableau.b) if weight]
        states = self._states_from_stages(step.interval, step.before, step.stages[: used[-1] + 1])
        times = self._times(step.interval, tuple(tableau.c[i] for i in used))
        weights = h * jnp.asarray([tableau.b[i] for i in used], h.dtype)
        return Nodes(times, tree.stack([states[i] for i in used]), weights)

    # The transposed step. The step, with the cost C = integral of the running cost l as one more sum over its stages, is
    #
    #     Y_i = y + h sum_j a_ij k_j,   k_i = f(t + c_i h, Y_i, theta),   y+ = y + h sum_i b_i k_i,
    #     C = h sum_i b_i l(t + c_i h, Y_i, theta),
    #
    # and its interpolant's coefficients are q_p = h sum_i d_ip k_i. Let A = dJ/dy+, G = dJ/dy through what was saved
    # inside the step, Q_p = dJ/dq_p and g = dJ/dC. Every k_i reaches the loss through y+, through the q_p and through the
    # later stages Y_j, j > i, so that with kappa_i = dJ/dk_i and mu_i = dJ/dY_i, for i = s, ..., 1,
    #
    #     kappa_i = h (b_i A + sum_p d_ip Q_p + sum_{j > i} a_ji mu_j),
    #     mu_i = (df/dy(Y_i))^T kappa_i + h b_i (dl/dy(Y_i))^T g,
    #     dJ/dy = A + G + sum_i mu_i,
    #     dJ/dtheta += sum_i (df/dtheta(Y_i))^T kappa_i + h b_i (dl/dtheta(Y_i))^T g.
    #
    # This is a Runge-Kutta method for the adjoint ODE on the same grid: J. M. Sanz-Serna, "Symplectic Runge-Kutta schemes
    # for adjoint equations, automatic differentiation, optimal control, and more", SIAM Review 58 (2016), section 3.

    def transposed_step(
        self, problem: Problem, interval: Interval, state: Arrays, cotangent: StepOutputs
    ) -> tuple[Arrays, Parameters]:
        count = self.stages_that_matter(interpolated=cotangent.coefficients is not None)
        if self._is_written_out(problem, count):
            pullbacks = self._linearised(problem, interval, state, count)
            return self._transposed(problem, interval, pullbacks, cotangent, summed(problem))
        states = self._stage_states(problem, interval, state, count)
        return self._transposed_from_states(problem, interval, states, cotangent)

    def transposed_from_stages(
        self, problem: Problem, interval: Interval, state: Arrays, stages: tuple[Arrays, ...], cotangent: StepOutputs
    ) -> tuple[Arrays, Parameters]:
        """`transposed_step`, where the stages that matter are known."""
        states = self._states_from_stages(interval, state, stages)
        if not self._is_written_out(problem, len(stages)):
            return self._transposed_from_states(problem, interval, tree.stack(states), cotangent)
        in_halves, pairs = in_stored_halves(problem), zip(self._nodes, states, strict=False)
        pullbacks = [in_halves(pullback_at(problem, stage_time(interval, node), y)[1]) for node, y in pairs]
        return self._transposed(problem, interval, pullbacks, cotangent, summed(problem))

    def transposed_from_linearisations(
        self,
        problem: Problem,
        interval: Interval,
        count: int,
        pullback: Callable[[int | Array], Callable[[Rates], tuple[Arrays, Any]]],
        cotangent: StepOutputs,
        gather: Gather,
    ) -> tuple[Arrays, Any]:
        """`transposed_step`, where the linearisations of so many stages are known, all that matter, with what is gathered
        from what they say of dJ/dparameters."""
        if self.is_long(problem):
            return self._transposed_in_a_loop(problem, interval, count, pullback, cotangent, gather)
        return self._transposed(problem, interval, [pullback(i) for i in range(count)], cotangent, gather)

    def _transposed(
        self,
        problem: Problem,
        interval: Interval,
        pullbacks: Sequence[Callable[[Rates], tuple[Arrays, Any]]],
        cotangent: StepOutputs,
        gather: Gather,
    ) -> tuple[Arrays, Any]:
        tableau, h, count = self.tableau, interval.end - interval.start, len(pullbacks)
        rows, b = tableau.a + tableau.dense_a, tableau.b + (0.0,) * self.extra_stages
        of_powers, stored = cotangent.coefficients or [], problem.stored
        mu: list[Arrays] = []
        said: list[Any] = []
        for i in reversed(range(count)):
            weights = (b[i], *(rows[j][i] for j in reversed(range(i + 1, count))))
            dense = tableau.dense[i][: len(of_powers)]
            trees, of_cost = [cotangent.after, *mu, *of_powers], tree.scale(h * b[i], cotangent.cost)
            kappa = stored(tree.scale(h, tree.weighted_sum((*weights, *dense), trees)))
            mu_i, said_i = pullbacks[i](Rates(kappa, of_cost))
            mu.append(stored(mu_i))
            said.append(said_i)
        return tree.add(cotangent.after, cotangent.y0, *mu), gather.together(said[::-1])

    def _linearised(self, problem: Problem, interval: Interval, y: Arrays, count: int) -> list[Pullback]:
        """The pullbacks of stages that are not known. One linearisation of a stage gives k_i and its pullback.

        What was stored where the step was taken is stored here, so that sums of stages are the same kernels, compiled once:
        the state; and the first stage, if it was the last one of the step before."""
        h, rows = interval.end - interval.start, self.tableau.a + self.tableau.dense_a
        in_halves, y, stages, pullbacks = in_stored_halves(problem), stored(y), [], []
        for i in range(count):
            state = tree.add(y, tree.scale(h, tree.weighted_sum(rows[i], stages))) if i else y
            rates, pullback = pullback_at(problem, stage_time(interval, self._nodes[i]), state)
            was_stored = i == 0 and self.reuses_last_stage
            stages.append(stored(rates.y) if was_stored else problem.stored(rates.y))
            pullbacks.append(in_halves(pullback))
        return pullbacks

    def _stage_states(self, problem: Problem, interval: Interval, y: Arrays, count: int) -> Arrays:
        """Y_1, ..., Y_s, stacked, computed in a loop."""

        def evaluate(i: Array, t: Scalar, state: Arrays, states: Arrays) -> tuple[Arrays, Arrays]:
            return problem.field(t, state), put(states, i, state)

        h, last = interval.end - interval.start, self._matrix(count)[count - 1, : count - 1]
        stages, states = self.stage_loop(interval, y, [], count - 1, evaluate, tree.buffer(count, y))
        return put(states, jnp.int32(count - 1), tree.add(y, tree.scale(h, tree.contract(last, stages))))

    def _transposed_from_states(
        self, problem: Problem, interval: Interval, states: Arrays, cotangent: StepOutputs
    ) -> tuple[Arrays, Parameters]:
        """The transposed step from Y_1, ..., Y_s, stacked, in a loop."""
        count, in_halves = jax.tree.leaves(states)[0].shape[0], in_stored_halves(problem)
        times = self._times(interval, self._nodes[:count])

        def pullback(i: int | Array) -> Pullback:
            return in_halves(pullback_at(problem, times[i], tree.take(states, jnp.asarray(i)))[1])

        return self._transposed_in_a_loop(problem, interval, count, pullback, cotangent, summed(problem))

    def _transposed_in_a_loop(
        self,
        problem: Problem,
        interval: Interval,
        count: int,
        pullback: Callable[[int | Array], Callable[[Rates], tuple[Arrays, Any]]],
        cotangent: StepOutputs,
        gather: Gather,
    ) -> tuple[Arrays, Any]:
        h, a = interval.end - interval.start, self._matrix(count)
        b, dense = jnp.asarray((self.tableau.b + (0.0,) * self.extra_stages)[:count]), jnp.asarray(self.tableau.dense)
        of_powers = None if cotangent.coefficients is None else tree.stack(cotangent.coefficients)

        def reverse_stage(reversed_index: Array, carry: tuple[Arrays, Any]) -> tuple[Arrays, Any]:
            i = count - 1 - reversed_index
            mu, gathered = carry
            kappa = tree.add(tree.scale(b[i], cotangent.after), tree.contract(a[:, i], mu))
            if of_powers is not None:
                kappa = tree.add(kappa, tree.contract(dense[i], of_powers))
            mu_i, said = pullback(i)(Rates(tree.scale(h, kappa), tree.scale(h * b[i], cotangent.cost)))
            return put(mu, i, mu_i), gather.entered(gathered, i, said)

        initial = tree.buffer(count, problem.y0), gather.begun()
        mu, gathered = jax.lax.fori_loop(0, count, reverse_stage, initial)
        return tree.add(cotangent.after, cotangent.y0, tree.map(lambda m: jnp.sum(m, axis=0), mu)), gathered

    def stages_that_matter(self, *, interpolated: bool) -> int:
        """The number of leading stages through which a cotangent can come."""
        if interpolated:
            return self.tableau.stages + self.extra_stages
        return max(i + 1 for i, weight in enumerate(self.tableau.b) if weight)

    def is_long(self, problem: Problem) -> bool:
        """Whether steps for a problem are longer than what is written out."""
        count = self.tableau.stages - self.reuses_last_stage
        return count > 1 and not problem.is_in_scalars and count * problem.operations > WRITTEN_OUT_OPERATIONS

    def _is_written_out(self, problem: Problem, count: int) -> bool:
        if self.is_long(problem):
            return False
        if count <= WRITTEN_OUT_STAGES or problem.is_in_scalars or problem.multiplies_matrices:
            return True
        return is_told() and not problem.is_small

    @property
    def _nodes(self) -> tuple[float, ...]:
        return self.tableau.c + self.tableau.dense_c

    def _matrix(self, count: int) -> Float[Array, "stages stages"]:
        return jnp.asarray(padded((self.tableau.a + self.tableau.dense_a)[:count]))

    def _states_from_stages(self, interval: Interval, y: Arrays, stages: tuple[Arrays, ...]) -> list[Arrays]:
        h, rows = interval.end - interval.start, self.tableau.a + self.tableau.dense_a
        later = (tree.add(y, tree.scale(h, tree.weighted_sum(rows[i], stages[:i]))) for i in range(1, len(stages)))
        return [y, *later]

    def stages(
        self, problem: Problem, interval: Interval, y: Arrays, known: Sequence[Stage], count: int
    ) -> tuple[list[Arrays], Any]:
        """k_1, ..., k_count, of which the first are known, and what is noted of each: stacked if steps are long, else in a
        list."""
        if self.is_long(problem):
            return self._stages_in_a_loop(problem, interval, y, known, count)
        h, rows = interval.end - interval.start, self.tableau.a + self.tableau.dense_a
        slopes, noted, stored = [stage.slope for stage in known], [stage.noted for stage in known], problem.stored
        for i in range(len(known), count):
            state = tree.add(y, tree.scale(h, tree.weighted_sum(rows[i], slopes))) if i else y
            stage = self.evaluated(problem, stage_time(interval, self._nodes[i]), state)
            slopes.append(stored(stage.slope))
            noted.append(stage.noted)
        return slopes, noted

    def _stages_in_a_loop(
        self, problem: Problem, interval: Interval, y: Arrays, known: Sequence[Stage], count: int
    ) -> tuple[list[Arrays], Any]:
        def evaluate(i: Array, t: Scalar, state: Arrays, noted: Any) -> tuple[Arrays, Any]:
            stage = self.evaluated(problem, t, state)
            return stage.slope, put(noted, i, stage.noted)

        def at_start() -> Stage:
            return self.evaluated(problem, interval.start, y)

        of_one = known[0].noted if known else jax.eval_shape(at_start).noted
        noted = tree.stack([*(stage.noted for stage in known), *[tree.zeros_like(of_one)] * (count - len(known))])
        slopes = [stage.slope for stage in known]
        slopes, noted = self.stage_loop(interval, y, slopes, count, evaluate, noted)
        return tree.unstack(slopes, count), noted

    def stage_loop(
        self,
        interval: Interval,
        y: Arrays,
        known: Sequence[Arrays],
        count: int,
        evaluate: Callable[[Array, Scalar, Arrays, Carry], tuple[Arrays, Carry]],
        carry: Carry,
    ) -> tuple[Arrays, Carry]:
        """k_1, ..., k_count, stacked, of which the first are known; and what is carried along the others, where
        `evaluate(i, t + c_i h, Y_i, carry)` gives k_i and the next of these."""
        h, times, a = interval.end - interval.start, self._times(interval, self._nodes[:count]), self._matrix(count)

        def next_stage(i: Array, so_far: tuple[Arrays, Carry]) -> tuple[Arrays, Carry]:
            stages, carry = so_far
            state = tree.add(y, tree.scale(h, tree.contract(a[i], stages)))
            stage, carry = evaluate(i, times[i], state, carry)
            return put(stages, i, stage), carry

        blank = [tree.zeros_like(y)] * (count - len(known))
        return jax.lax.fori_loop(len(known), count, next_stage, (tree.stack([*known, *blank]), carry))

    def _times(self, interval: Interval, nodes: tuple[float, ...]) -> Float[Array, " stages"]:
        return jnp.stack([stage_time(interval, node) for node in nodes])


WRITTEN_OUT_OPERATIONS = 2000
"""Of a step's field evaluations. Longer steps are loops over stages, forward and transposed: compilation takes time that
grows faster than programs do. Measured on a CPU with Tsit5 on residual networks of 32 to 128 components and 4 to 64
samples, the time of a gradient in loops in that of one written out, and that to build it: with 800 to 1,200 operations 0.86
to 1.4 and 0.65; with 1,900, 0.75 to 1.2 and 0.5; with 2,700, 0.91 to 1.05 and 0.4; with 4,000 0.7 and 0.37."""

WRITTEN_OUT_STAGES = 4
"""The transposed step is written out for so few stages, in scalars, where the field multiplies matrices, and where what it
computes is `stored`, but for systems that are one kernel: there, six stages written out take 0.8 of the time, and 1.1 of
that to build. Else it is a loop, since XLA's fusion would compute earlier stages again inside later ones. Measured on a CPU
with Tsit5 and 256 to 65,536 cells on a ring, the time of a gradient written out in that of the loop: 1.5 to 9, but stored
0.35 to 0.85."""
