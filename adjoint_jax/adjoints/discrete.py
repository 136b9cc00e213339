"""The discrete adjoint: the transposed method on the forward's own grid, from recorded states."""

import equinox as eqx

from adjoint_jax.adjoints.adjoint import Inputs
from adjoint_jax.adjoints.exact import AbstractExactAdjoint
from adjoint_jax.adjoints.keep import AbstractKeep, KeepStates
from adjoint_jax.adjoints.tape import TapeRecorder, check_checkpoints, tape_recorder
from adjoint_jax.integrate import Integrator


class DiscreteAdjoint(AbstractExactAdjoint):
    """The exact derivative of the computed solution: each step's transpose, from the last to the first.

    The transposed method is itself a Runge-Kutta method for the adjoint ODE, on the forward's grid (derivation in
    `solvers/explicit_runge_kutta.py`). Step sizes are constants of the derivative; derivatives with respect to t0, t1 and
    `ts` are those of the flow, f at that time. Where an explicit method's steps are near its limit of stability, the
    computed solution can depend on directions that it does not contain much more than the true one does, and so does this
    gradient: on stiff problems use `InterpolatingAdjoint` or `GaussAdjoint`.

    Times are recorded for all steps. States are kept at checkpoints, the starts of some segments of steps, and throughout
    the last segment; the steps of an earlier segment are taken again, on the recorded grid, when its turn comes.

    - `checkpoints`: how many states to keep besides those of one segment. With fewer than there are segments, of about the
      square root of the largest number of steps each, they divide what remains again and again: with k checkpoints, r
      repetitions of the forward steps suffice for (k - 1 + r)! / ((k - 1)! r!) segments. By default, all states of a given
      grid are kept if they fit in 16 MiB, and otherwise those at the starts of all segments: one repetition.

    - `keep`: what is kept of the steps of a segment: `KeepStates()`, by default; `KeepStages()`; or `KeepLinearisations()`,
      all that backpropagation needs, so that nothing is computed twice where it fits.

    Memory: O(checkpoints + sqrt(steps)) states. Works under `jit`, `vmap`, and forward-mode differentiation of the
    gradient (`jax.jvp(jax.grad(loss), ...)`).
    """

    checkpoints: int | None = eqx.field(static=True, default=None)
    keep: AbstractKeep = KeepStates()

    def __check_init__(self) -> None:
        check_checkpoints(self.checkpoints, "DiscreteAdjoint")
        if not isinstance(self.keep, AbstractKeep):
            raise TypeError(f"DiscreteAdjoint(keep=...) must be KeepStates() or another of its kind, got {self.keep!r}.")

    def recorder(self, integrator: Integrator, inputs: Inputs) -> TapeRecorder:
        return tape_recorder(self.keep, self.checkpoints, integrator, inputs, whole=True)
