"""The discrete adjoint: the transposed method on the forward's own grid, from recorded states."""

import equinox as eqx

from adjoint_jax.adjoints.adjoint import Inputs, Run, Saved
from adjoint_jax.adjoints.componentwise import solve_in_scalars
from adjoint_jax.adjoints.exact import AbstractExactAdjoint
from adjoint_jax.adjoints.keep import AbstractKeep, KeepStates
from adjoint_jax.adjoints.linearisations import suitable_keep
from adjoint_jax.adjoints.tape import check_checkpoints, tape_recorder
from adjoint_jax.integrate import Integrator, Report
from adjoint_jax.lanes import are_lanes
from adjoint_jax.recorders import AbstractRecorder


class DiscreteAdjoint(AbstractExactAdjoint):
    """The exact derivative of the computed solution: each step's transpose, from the last to the first.

    The transposed method is itself a Runge-Kutta method for the adjoint ODE, on the forward's grid (derivation in
    `solvers/explicit_runge_kutta.py`). Step sizes are constants of the derivative; derivatives with respect to t0, t1 and
    `ts` are those of the flow, f at that time. Where an explicit method's steps are near its limit of stability, the
    computed solution can depend on directions that it does not contain much more than the true one does, and so does this
    gradient: on stiff problems use `InterpolatingAdjoint` or `GaussAdjoint`.

    States are kept at checkpoints, the starts of some segments of steps, and throughout the last segment, and the times of
    all steps; the steps of an earlier segment are taken again when its turn comes. In lanes of few numbers, times would be
    most of it: there steps are chosen again just as they were chosen, with the rejected ones among them.

    - `checkpoints`: how many states to keep besides those of one segment. With fewer than there are segments, of about the
      square root of the largest number of steps each, they divide what remains again and again: with k free checkpoints,
      r repetitions of the forward steps suffice for (k + r)! / (k! r!) segments, but few are free at first. By default, all
      states of a given grid are kept if they fit in 128 MiB (16 MiB in every lane of a `vmap`), or in the `bytes` of
      `KeepStates(bytes)`, and otherwise those at the starts of all segments: one repetition, about a fifth of the time.
    - `keep`: what is kept of the steps of a segment: `KeepStates()`; `KeepStages()`; or `KeepLinearisations()`, all that
      backpropagation needs, so that nothing is computed twice where it fits. By default linearisations of explicit
      methods where those of one step are no larger than the parameters (arrays of the vector field and of `args`), and
      those of all steps of a given grid fit in 16 MiB, or parameters are at least 1 MiB; where no checkpoints are asked for
      and no lanes of a `vmap` are seen. Otherwise states. `diagnostics.memory_plan` tells which, and what it takes.

    Systems of a few components and parameters, in a field of plain arithmetic, are computed in scalars instead of arrays
    under `vmap` and on given grids, where that is several times as fast.

    Memory: O(checkpoints + sqrt(steps)) states. Works under `jit`, `vmap`, and forward-mode differentiation of the
    gradient (`jax.jvp(jax.grad(loss), ...)`).
    """

    checkpoints: int | None = eqx.field(static=True, default=None)
    keep: AbstractKeep | None = None

    def __check_init__(self) -> None:
        check_checkpoints(self.checkpoints, "DiscreteAdjoint")
        if not isinstance(self.keep, AbstractKeep | None):
            raise TypeError(f"DiscreteAdjoint(keep=...) must be KeepStates() or another of its kind, got {self.keep!r}.")

    def solve(self, inputs: Inputs, run: Run) -> tuple[Saved, Report]:
        small = solve_in_scalars(inputs, run, self) if isinstance(self.keep, KeepStates | None) else None
        return super().solve(inputs, run) if small is None else small

    def recorders(self, integrator: Integrator, inputs: Inputs) -> list[AbstractRecorder]:
        keep = self._keep(integrator, inputs)
        whole = keep.budget(in_lanes=are_lanes(inputs))
        return [tape_recorder(keep, self.checkpoints, integrator, inputs, whole=whole)]

    def _keep(self, integrator: Integrator, inputs: Inputs) -> AbstractKeep:
        if self.keep is not None:
            return self.keep
        if self.checkpoints is not None:
            return KeepStates()
        return suitable_keep(inputs, integrator)
