"""What a solve returns."""

import enum
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from adjoint_jax.interpolation import Trajectory
from adjoint_jax.tree import Arrays, Scalar


class Status(enum.IntEnum):
    """How an integration ended. `solution.status` is an int32 array (one value per lane under `vmap`) of these;
    `REVERSE_DRIFT` is for the reverse integrations of gradients alone."""

    SUCCESS = 0
    MAX_STEPS_REACHED = 1
    STEP_SIZE_UNDERFLOW = 2
    NON_FINITE = 3
    TOLERANCE_TOO_SMALL = 4
    INVALID_TIMES = 5
    REVERSE_DRIFT = 6
    INCONSISTENT = 7

    @property
    def explanation(self) -> str:
        """What happened, and what to do."""
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Status.SUCCESS: "The integration reached t1.",
    Status.MAX_STEPS_REACHED: (
        "max_steps attempts were used up before t1. Raise max_steps, loosen rtol and atol, or, if the problem is stiff "
        "(many rejected steps, tiny step sizes), use another method."
    ),
    Status.STEP_SIZE_UNDERFLOW: (
        "Steps became too small: the error estimate stays too large however short they are, or they no longer change the "
        "time. Look for a jump of the vector field (pass it in PIDController(jump_ts=...)), a singularity of the solution, "
        "a dtmin that is too large, or a dt or dt0 that is too small; a float32 time far from zero may need float64."
    ),
    Status.NON_FINITE: (
        "The state or the vector field became NaN or infinite, and shorter steps did not help. Look at "
        "vector_field(t, y, args) around this time: division by zero, sqrt or log of a negative number, or a solution that "
        "blows up. With an implicit method, this is also what a step is whose equations the iteration could not solve: "
        "on a given grid, take shorter steps; or whose Jacobian has entries outside of the band or pattern that "
        "`jacobian=` gives: widen it."
    ),
    Status.TOLERANCE_TOO_SMALL: (
        "rtol and atol ask for more digits than the dtype of the state can hold. Raise them, or use a float64 state "
        "(jax.config.update('jax_enable_x64', True))."
    ),
    Status.INVALID_TIMES: (
        "t0, t1 or save times are NaN, save times are outside of [t0, t1] or not monotone in the direction of "
        "integration, or StepTo(ts) does not run from t0 to t1 without turning."
    ),
    Status.INCONSISTENT: (
        "y0 does not satisfy the algebraic equations that the singular mass_matrix leaves: w^T vector_field(t0, y0, args) "
        "must vanish for every w with w^T M = 0. Change the entries of y0 that these equations determine."
    ),
    Status.REVERSE_DRIFT: (
        "The state that was recomputed backward in time has moved away from the state that was saved there: the reversed "
        "flow is unstable, or the tolerances are too loose, and the gradient would be wrong. Use InterpolatingAdjoint() or "
        "GaussAdjoint(), give BacksolveAdjoint more save times or checkpoints, or Reversible a coupling nearer to 1, or "
        "tighten rtol and atol."
    ),
}


class SolveError(RuntimeError):
    """An integration that did not reach t1, under `throw=True`. Its message names the time, the steps and the remedy."""


class Stats(eqx.Module):
    """Counts of one integration, int32. `steps = accepted + rejected` are attempts."""

    accepted: Int[Array, ""]
    rejected: Int[Array, ""]
    evaluations: Int[Array, ""]
    """Calls of the vector field in the forward integration."""

    @property
    def steps(self) -> Int[Array, ""]:
        """Attempted steps."""
        return self.accepted + self.rejected


class Solution(eqx.Module):
    """The result of `solve`.

    - `ts`, `ys`: what `saveat` asked for, times and states (or what `fn` made of them) with one row for each; a pytree of
      such where `saveat` is one. Rows that were not reached are NaN.
    - `cost`: the integral of the running cost from t0 to t1, with its structure; None if there is none.
    - `stats`: `Stats`. `status`: see `Status`. `t_end`: the time reached: t1, or where the integration failed.
    - `trajectory`: with `SaveAt(dense=True)`, the interpolants; see `evaluate`.
    """

    ts: PyTree[Float[Array, "_"] | None]
    ys: PyTree[Any]
    cost: PyTree[Any]
    stats: Stats
    status: Int[Array, ""]
    t_end: Scalar
    trajectory: Trajectory | None

    def evaluate(self, t: Any) -> Arrays:
        """The solution at t, a number or an array of times, from the dense output; NaN outside of what was integrated.

        Differentiable with respect to t and everything that the solution depends on. Raises `ValueError` if the solve
        was not asked for dense output.
        """
        trajectory = self.trajectory
        if trajectory is None:
            raise ValueError("solution.evaluate(t) needs dense output: solve with SaveAt(dense=True).")
        t = jnp.asarray(t, trajectory.t0.dtype)
        evaluate = trajectory.evaluate
        for _ in range(t.ndim):
            evaluate = jax.vmap(evaluate)
        return evaluate(t)
