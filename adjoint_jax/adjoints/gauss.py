"""The adjoint for many parameters: a(t) alone is integrated backward, dJ/dparameters by Gauss quadrature on its steps."""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Int

from adjoint_jax import tree
from adjoint_jax.adjoints.interpolating import AbstractInterpolatingAdjoint
from adjoint_jax.adjoints.reverse_ode import AbstractReverseSystem, AfterSteps, Reverse, ReverseState
from adjoint_jax.controllers.controller import AbstractController, positive
from adjoint_jax.integrate import Integrator
from adjoint_jax.interpolation import Interpolant
from adjoint_jax.lanes import any_lane
from adjoint_jax.problem import Parameters, Problem
from adjoint_jax.quadrature import Nodes, Rule, gauss_legendre, kronrod
from adjoint_jax.recorders import AbstractRecorder, Layout, Place, QuadratureRecorder
from adjoint_jax.solvers.solver import AbstractSolver, Step
from adjoint_jax.tree import Arrays, Scalar


class GaussAdjoint(AbstractInterpolatingAdjoint):
    """The continuous adjoint for many parameters: a(t) alone is the state of the reverse ODE, with y(t) from the forward
    solution's dense output, and the parameters' integral is computed by Gauss-Legendre quadrature over each accepted step.

    As `InterpolatingAdjoint`, but the nodes of the parameters' quadrature are chosen for it, with a(t) from the accepted
    reverse step's dense output. A step's cost depends on the number of parameters through these nodes alone, all in one
    vjp.

    - `solver`, `controller`, `checkpoints`: as in `InterpolatingAdjoint`.
    - `nodes`: how many on each step; by default half the method's order, rounded up, for an error of the order of the
      method's own (three for Tsit5, which has six stages of its own).
    - `rtol`: control the quadrature's own error, which the reverse ODE's error estimate does not see where the parameters'
      integrand varies faster than a(t) and y(t) do: on every step the seven nodes of Kronrod's extension of the three-point
      rule are used, and the step is halved, and halved again, for the quadrature alone, until the two rules differ by less
      than `rtol` times the largest entry of the integral so far (at most into 64 parts). Without it there is no such
      control.
    """

    solver: AbstractSolver | None = None
    controller: AbstractController | None = None
    checkpoints: int | None = eqx.field(static=True, default=None)
    nodes: int | None = eqx.field(static=True, default=None)
    rtol: Any = None

    def __check_init__(self) -> None:
        if self.nodes is not None and self.nodes < 1:
            raise ValueError(f"GaussAdjoint(nodes=...) must be at least 1, got {self.nodes}.")
        if self.nodes is not None and self.rtol is not None:
            raise ValueError("GaussAdjoint(rtol=...) chooses the nodes itself: leave nodes out.")

    def prepare(self, dtype: DTypeLike) -> AbstractInterpolatingAdjoint:
        adjoint = super().prepare(dtype)
        if self.rtol is None:
            return adjoint
        rtol = positive("GaussAdjoint(rtol)", self.rtol, dtype)
        return eqx.tree_at(lambda gauss: gauss.rtol, adjoint, rtol)

    def reverse(self, integrator: Integrator, problem: Problem) -> Reverse:
        del problem
        if self.rtol is not None:
            return Reverse(integrator, _refined(integrator.solver, self.rtol))
        count = -(-integrator.solver.order // 2) if self.nodes is None else self.nodes
        return Reverse(integrator, _gauss_legendre(integrator.solver, count))


def _gauss_legendre(solver: AbstractSolver, count: int) -> AfterSteps:
    rule = gauss_legendre(count)

    def nodes(step: Step) -> Nodes:
        return rule.over(solver.interpolant(step))

    def recorder(system: AbstractReverseSystem, start: ReverseState) -> QuadratureRecorder:
        return QuadratureRecorder(nodes, system.integral, start.parameters, start.state, dense=True, notes=1)

    return AfterSteps(recorder)


def _refined(solver: AbstractSolver, rtol: Scalar) -> AfterSteps:
    def recorder(system: AbstractReverseSystem, start: ReverseState) -> RefinedQuadratureRecorder:
        return RefinedQuadratureRecorder(solver, system, start.parameters, start.state, rtol)

    return AfterSteps(recorder)


MOST_PARTS = 64


class _Divided(NamedTuple):
    """The integral over one step divided into equal parts, and its error relative to what is asked."""

    parts: Int[Array, ""]
    integral: Parameters
    error: Scalar


class RefinedQuadratureRecorder(AbstractRecorder):
    """Adds up the parameters' integral over accepted reverse steps, each divided until Gauss and Kronrod agree."""

    adds_up: ClassVar[bool] = True

    solver: AbstractSolver
    system: AbstractReverseSystem
    so_far: Parameters
    anywhere: Arrays
    rtol: Scalar

    @property
    def interpolates(self) -> bool:
        return True

    @property
    def longest_chunk(self) -> int:
        return 1

    def start(self, problem: Problem, layout: Layout, mark: Any) -> Parameters:
        del problem, layout, mark
        return self.so_far

    def note(self, step: Step, accepted: Bool[Array, ""]) -> Interpolant:
        interpolant = self.solver.interpolant(step)
        flat = interpolant._replace(
            end=interpolant.start, y0=self.anywhere, coefficients=tree.zeros_like(interpolant.coefficients)
        )
        return tree.where(accepted, interpolant, flat)

    def write(self, record: Parameters, place: Place, notes: Interpolant) -> Parameters:
        del place
        interpolant = tree.take(notes, jnp.int32(0))

        def unresolved(divided: _Divided) -> Bool[Array, ""]:
            return any_lane(self._is_unresolved(divided))

        def halved(divided: _Divided) -> _Divided:
            finer = self._divided(interpolant, record, 2 * divided.parts)
            return tree.where(self._is_unresolved(divided), finer, divided)

        whole = self._divided(interpolant, record, jnp.int32(1))
        return tree.add(record, jax.lax.while_loop(unresolved, halved, whole).integral)

    def _is_unresolved(self, divided: _Divided) -> Bool[Array, ""]:
        return (divided.error > 1) & (divided.parts < MOST_PARTS)

    def _divided(self, interpolant: Interpolant, record: Parameters, count: Int[Array, ""]) -> _Divided:
        """The sum of Kronrod's rule over the parts, and of its differences from Gauss's."""
        fine = kronrod()
        difference = fine.weights.copy()
        difference[1::2] -= gauss_legendre(3).weights
        length = (interpolant.end - interpolant.start) / count

        def add_part(i: Array, sums: tuple[Parameters, Parameters]) -> tuple[Parameters, Parameters]:
            begin = interpolant.start + length * i
            rules = (fine, Rule(fine.points, difference))
            parts = (self.system.integral(rule.on(interpolant, begin, begin + length)) for rule in rules)
            return tuple(tree.add(so_far, part) for so_far, part in zip(sums, parts, strict=True))

        zero = tree.zeros_like(record)
        integral, off = jax.lax.fori_loop(0, count, add_part, (zero, zero))
        size = jnp.maximum(_largest(tree.add(record, integral)), jnp.finfo(length.dtype).tiny)
        return _Divided(count, integral, (_largest(off) / (self.rtol * size)).astype(length.dtype))


def _largest(parameters: Parameters) -> Scalar:
    """The largest absolute value of any entry."""
    leaves = jax.tree.leaves(parameters)
    return jnp.max(jnp.stack([jnp.zeros(()), *(jnp.max(jnp.abs(leaf), initial=0.0) for leaf in leaves)]))
