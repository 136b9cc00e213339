"""Step sizes chosen one after the other: constant, or by an error estimate."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, PyTree

from adjoint_jax import tree
from adjoint_jax.controllers.controller import (
    AbstractStepSize,
    Proposal,
    Trial,
    Verdict,
    canonical_jumps,
    not_negative,
    positive,
)
from adjoint_jax.problem import Problem
from adjoint_jax.solvers.solver import AbstractSolver, Step
from adjoint_jax.tolerance import Tolerance, rms_norm
from adjoint_jax.tree import Arrays, Scalar


class ConstantStepSize(AbstractStepSize):
    """Steps of size `dt` (a positive number, traced: changing it recompiles nothing); the last one, and one that ends at
    a time of `jump_ts`, is shorter. A step whose result is not finite ends the integration."""

    dt: Any
    jump_ts: Any = eqx.field(default=None, converter=tree.as_times)

    def prepare(self, dtype: DTypeLike) -> "ConstantStepSize":
        dt = positive("ConstantStepSize(dt)", self.dt, dtype)
        return ConstantStepSize(dt, canonical_jumps(self.jump_ts, dtype))

    def first(self, problem: Problem, solver: AbstractSolver, slope: Arrays, dt0: Scalar | None) -> Proposal:
        del solver, slope
        if dt0 is not None:
            raise ValueError("dt0 is the first step of an adaptive controller; ConstantStepSize has its own dt.")
        return Proposal(self.dt * jnp.sign(problem.t1 - problem.t0), (), 0)

    def ratio(self, solver: AbstractSolver, step: Step) -> Scalar:
        """None that is known, unless the step is not finite."""
        return jnp.where(solver.is_finite(step.after), 0.0, jnp.inf)

    def judge(self, solver: AbstractSolver, trial: Trial, memory: PyTree[Any]) -> Verdict:
        del solver
        finite = jnp.isfinite(trial.ratio)
        return Verdict(finite, finite, jnp.where(finite, trial.proposal, 0.0), memory)

    def smallest(self, t: Scalar) -> Scalar:
        return _resolution(t)

    def unresolvable(self, y: Arrays) -> Bool[Array, ""]:
        del y
        return jnp.array(False)


class _Errors(NamedTuple):
    """Logarithms of the error ratios of the last two accepted steps, in the precision of the ratios, and whether the last
    attempt was rejected."""

    last: Scalar
    before: Scalar
    rejected: Bool[Array, ""]


class PIDController(AbstractStepSize):
    """Adapts the step size to an error estimate, so that the local error stays below `atol + rtol * abs(y)`.

    A step with error ratio r = norm(error / (atol + rtol * max(abs(y0), abs(y1)))) is accepted if r <= 1, and with k one
    more than the order of the error estimate the next step size is h times

        safety * r_n^(-(P + I + D) / k) * r_{n-1}^((P + 2 D) / k) * r_{n-2}^(-D / k),

    clipped to [factor_min, factor_max] (Söderlind, "Digital filters in adaptive time-stepping", ACM TOMS 29 (2003)).
    A method of variable order chooses the factor itself, together with its order (`BDF`); it is clipped likewise.
    The first step size is chosen as in Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", II.4,
    unless `solve` is given `dt0`.

    - `rtol`, `atol`: numbers, or pytrees like y (or prefixes of it) of numbers or arrays. Traced: changing them
      recompiles nothing.
    - `pcoeff`, `icoeff`, `dcoeff`: P, I, D. The default is a PI controller.
    - `safety`, `factor_min`, `factor_max`: see above.
    - `dtmin`, `dtmax`: bounds of abs(h), in units of time. A rejected step that would have to be shorter than `dtmin` ends
      the integration with `Status.STEP_SIZE_UNDERFLOW`.
    - `norm`: maps the pytree of scaled errors (real leaves) to a scalar; the root mean square over all entries by default.
    - `jump_ts`: times, in any order, at which the field or a derivative of it jumps. They are stepped onto exactly, and
      the field is evaluated on the right side of each.

    Needs a method with an error estimate.
    """

    adapts: ClassVar[bool] = True

    rtol: PyTree[Any] = 1e-5
    atol: PyTree[Any] = 1e-7
    pcoeff: Any = 0.2
    icoeff: Any = 0.5
    dcoeff: Any = 0.0
    safety: Any = 0.9
    factor_min: Any = 0.2
    factor_max: Any = 10.0
    dtmin: Any = None
    dtmax: Any = None
    norm: Callable[[PyTree[Any]], Scalar] = eqx.field(static=True, default=rms_norm)
    jump_ts: Any = eqx.field(default=None, converter=tree.as_times)

    def prepare(self, dtype: DTypeLike) -> "PIDController":
        def tolerance(name: str) -> PyTree[Any]:
            return jax.tree.map(lambda value: not_negative(f"PIDController({name})", value), getattr(self, name))

        def coefficient(name: str) -> Array | np.ndarray:
            return not_negative(f"PIDController({name})", getattr(self, name), dtype)

        def bound(name: str) -> Array | np.ndarray | None:
            value = getattr(self, name)
            return None if value is None else positive(f"PIDController({name})", value, dtype)

        names = ("pcoeff", "icoeff", "dcoeff", "safety", "factor_min", "factor_max")
        return PIDController(
            rtol=tolerance("rtol"),
            atol=tolerance("atol"),
            **{name: coefficient(name) for name in names},
            dtmin=bound("dtmin"),
            dtmax=bound("dtmax"),
            norm=self.norm,
            jump_ts=canonical_jumps(self.jump_ts, dtype),
        )

    def on_pairs(self) -> "PIDController":
        def norm(pair: tuple[PyTree[Any], PyTree[Any]]) -> Scalar:
            return jnp.maximum(self.norm(pair[0]), self.norm(pair[1]))

        rtol, atol = (self.rtol, self.rtol), (self.atol, self.atol)
        return dataclasses.replace(self, rtol=rtol, atol=atol, norm=norm)

    @property
    def tolerance(self) -> Tolerance:
        return Tolerance(self.rtol, self.atol, self.norm)

    def first(self, problem: Problem, solver: AbstractSolver, slope: Arrays, dt0: Scalar | None) -> Proposal:
        if solver.error_order is None:
            raise ValueError(
                f"{type(solver).__name__} has no error estimate, which PIDController needs: use ConstantStepSize(dt=...) "
                "or FixedSteps(n), or a method such as Tsit5()."
            )
        span = problem.t1 - problem.t0
        h = self._first_size(problem, solver.error_order, slope) if dt0 is None else jnp.where(dt0 == 0, span, dt0)
        size = self._bounded(jnp.abs(h))
        zero = jnp.zeros((), jax.eval_shape(self.tolerance.ratio, problem.y0, problem.y0, problem.y0).dtype)
        memory = _Errors(zero, zero, jnp.array(False))
        return Proposal(jax.lax.stop_gradient(size * jnp.sign(span)), memory, 1 if dt0 is None else 0)

    def _first_size(self, problem: Problem, order: int, slope: Arrays) -> Scalar:
        """Two guesses: one step of explicit Euler changes y by 1 %; the next term of Taylor's series is 1 %."""
        span = problem.t1 - problem.t0
        y0 = problem.y0
        d0 = self.tolerance.ratio(y0, y0, y0).astype(span.dtype)
        d1 = self.tolerance.ratio(slope, y0, y0).astype(span.dtype)
        tiny = 1e-6 * jnp.minimum(1.0, jnp.abs(span))
        flat = (d0 < 1e-5) | (d1 < 1e-5) | ~jnp.isfinite(d1)
        guess = jnp.minimum(jnp.where(flat, tiny, 0.01 * d0 / jnp.where(flat, 1.0, d1)), jnp.abs(span))
        euler = tree.add(problem.y0, tree.scale(guess * jnp.sign(span), slope))
        change = tree.map(lambda a, b: a - b, problem.field(problem.t0 + guess * jnp.sign(span), euler), slope)
        d2 = self.tolerance.ratio(change, y0, y0).astype(span.dtype) / jnp.where(guess > 0, guess, 1.0)
        steepest = jnp.maximum(d1, d2)
        still = (steepest <= 1e-15) | ~jnp.isfinite(steepest)
        second = (0.01 / jnp.where(still, 1.0, steepest)) ** (1.0 / (order + 1))
        return jnp.minimum(100 * guess, jnp.where(still, jnp.maximum(tiny, 1e-3 * guess), second))

    def ratio(self, solver: AbstractSolver, step: Step) -> Scalar:
        y0, y1, error = jax.lax.stop_gradient((solver.output(step.before), solver.output(step.after), step.error))
        blown = tree.map(lambda e, y: jnp.where(jnp.isfinite(y), jnp.abs(e), jnp.inf), error, y1)
        return self.tolerance.ratio(blown, y0, y1)

    def judge(self, solver: AbstractSolver, trial: Trial, memory: _Errors) -> Verdict:
        assert solver.error_order is not None
        ratio, proposal, size = trial.ratio, trial.proposal, jax.lax.stop_gradient(trial.size)
        accepted, finite = ratio <= 1.0, jnp.isfinite(ratio)
        log_ratio = jnp.log(jnp.maximum(ratio, jnp.finfo(ratio.dtype).tiny ** 0.25))
        factor = self._factor(log_ratio, memory, solver.error_order + 1) if trial.factor is None else trial.factor
        factor = factor.astype(size.dtype)
        factor = jnp.where(finite, jnp.clip(factor, self.factor_min, self.factor_max), self.factor_min)
        factor = jnp.minimum(factor, jnp.where(accepted & ~memory.rejected, self.factor_max, 1.0))
        adapted = self._bounded(jnp.abs(size) * factor)
        # A step cut short to end at a given time says little about the size that it was cut from. The margin is for
        # rounding: without a cut, size is (t + h) - t.
        cut_short = accepted & (jnp.abs(size) < 0.999 * jnp.abs(proposal))
        adapted = jnp.where(cut_short, jnp.maximum(adapted, jnp.abs(proposal)), adapted)
        remembered = _Errors(
            jnp.where(accepted, log_ratio, memory.last), jnp.where(accepted, memory.last, memory.before), ~accepted
        )
        return Verdict(accepted, finite, adapted * jnp.sign(proposal), remembered)

    def _factor(self, now: Scalar, memory: _Errors, k: int) -> Scalar:
        """The formula above, with one logarithm and one exponential: powers cost several times as much."""
        p, i, d = self.pcoeff, self.icoeff, self.dcoeff
        exponents = (-(p + i + d) / k, (p + 2 * d) / k, -d / k)
        logarithms = (now, memory.last, memory.before)
        terms = (jnp.asarray(e, now.dtype) * r for e, r in zip(exponents, logarithms, strict=True))
        return self.safety * jnp.exp(sum(terms, start=jnp.zeros((), now.dtype)))

    def smallest(self, t: Scalar) -> Scalar:
        return _resolution(t) if self.dtmin is None else jnp.maximum(_resolution(t), self.dtmin)

    def unresolvable(self, y: Arrays) -> Bool[Array, ""]:
        """Leaves of one precision are scaled together, so that XLA finds the norm of y that the first step asks for."""
        roundings = {float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(y)}
        if len(roundings) == 1:
            return self.tolerance.ratio(y, y, y) * roundings.pop() > 1.0
        rounding = tree.map(lambda leaf: jnp.finfo(leaf.dtype).eps * leaf, y)
        return self.tolerance.ratio(rounding, y, y) > 1.0

    def _bounded(self, size: Scalar) -> Scalar:
        return size if self.dtmax is None else jnp.minimum(size, self.dtmax)


def _resolution(t: Scalar) -> Scalar:
    """The distance between neighbouring floating-point times around t, a few times over."""
    info = jnp.finfo(t.dtype)
    return jnp.maximum(4 * info.eps * jnp.abs(t), 16 * info.tiny)
