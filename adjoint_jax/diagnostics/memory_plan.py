"""`memory_plan`: what an adjoint keeps of a solve, and what it computes again, before anything is computed."""

from typing import Any, NamedTuple

import equinox as eqx
from jaxtyping import DTypeLike, PyTree

from adjoint_jax.adjoints.adjoint import AbstractAdjoint, Inputs, Run, Saved, recorders, saved
from adjoint_jax.adjoints.discrete import DiscreteAdjoint
from adjoint_jax.adjoints.memory import Memory
from adjoint_jax.adjoints.trail import Way
from adjoint_jax.diagnostics.table import BYTES, aligned, with_unit
from adjoint_jax.integrate import Report
from adjoint_jax.problem import VectorField
from adjoint_jax.solve import solve


class MemoryPlan(NamedTuple):
    """What an adjoint keeps of one solve; `str(plan)` says it in a table.

    - `adjoint`: its name. `steps`: the largest number of steps.
    - `memory`: what is kept, in segments of how many steps, and how often steps are taken again (`Memory`).
    """

    adjoint: str
    steps: int
    memory: Memory

    @property
    def bytes(self) -> int:
        """Of all that is kept."""
        return self.memory.bytes

    def __str__(self) -> str:
        headline = f"{self.adjoint}, at most {self.steps} steps: {self._segments()}"
        rows = [(one.what, f"{one.number} of {_size(one.each)}", _size(one.bytes)) for one in self.memory.kept]
        table = aligned([*rows, ("in all", "", _size(self.bytes))]) if rows else []
        return "\n".join([headline, *(f"  {line}".rstrip() for line in table), self._repetitions()])

    def _segments(self) -> str:
        if not self.memory.kept:
            return "nothing is kept for the way back."
        if self.memory.segments > 1:
            return f"one segment of {self.memory.segment} is kept at a time, of at most {self.memory.segments}."
        return "all of them are kept." if self.memory.segments else "the states of none of them are kept."

    def _repetitions(self) -> str:
        mean, most = self.memory.repetitions
        if not most:
            return "No step is taken again."
        return f"Steps are taken again {mean:.2g} times on the mean, no step more than {most} time{'s' * (most > 1)}."


def memory_plan(
    vector_field: VectorField, t0: Any, t1: Any, y0: PyTree[Any], args: PyTree[Any] = None, **options: Any
) -> MemoryPlan:
    """What the gradient of a solve keeps of the way forward, and how often it takes steps again.

        print(aj.diagnostics.memory_plan(field, 0.0, 1.0, y0, args, adjoint=aj.DiscreteAdjoint(checkpoints=8)))

    Arguments and options are those of `solve`; for arrays, `jax.ShapeDtypeStruct` will do. Nothing is computed: all numbers
    follow from shapes and from the largest number of steps, so that adaptive solves may use less of what is reserved. The
    plan is that of a solve by itself. A lane of a `vmap` takes as much each, or less: where the `vmap` is seen, all states
    of a given grid are kept in 16 MiB at most, and small systems keep the times of one segment. Not counted are the
    solution itself, its gradient, and what one step or one vjp needs for itself: nor, as steps that are taken again, the
    evaluations of a transposed step, or of an interpolant.

    Raises `TypeError` for an adjoint that is none, and what `solve` raises for its arguments.
    """
    adjoint = options.pop("adjoint", DiscreteAdjoint())
    if not isinstance(adjoint, AbstractAdjoint):
        raise TypeError(f"adjoint must be an adjoint such as DiscreteAdjoint(), got {adjoint!r}.")
    plans: list[MemoryPlan] = []
    options = {**options, "throw": False, "adjoint": _PlanningAdjoint(adjoint, plans.append)}
    eqx.filter_eval_shape(solve, vector_field, t0, t1, y0, args, **options)
    return plans[0]


class _PlanningAdjoint(AbstractAdjoint):
    """Another adjoint, whose plan is noted while the solve is traced. Has no derivative."""

    adjoint: AbstractAdjoint
    note: Any = eqx.field(static=True)

    def prepare(self, dtype: DTypeLike) -> "_PlanningAdjoint":
        return _PlanningAdjoint(self.adjoint.prepare(dtype), self.note)

    def solve(self, inputs: Inputs, run: Run) -> tuple[Saved, Report]:
        integrator, wanted = run.integrator, recorders(inputs, run.integrator)
        outcome = integrator(inputs.problem, [*wanted, *self.adjoint.recorders(integrator, inputs)], run.valid)
        way = Way(inputs.problem, integrator, outcome.report, outcome.state)
        memory = self.adjoint.memory(way, outcome.records[len(wanted) :])
        self.note(MemoryPlan(type(self.adjoint).__name__, integrator.slots, memory))
        return saved(inputs, integrator, outcome), outcome.report


def _size(size: int) -> str:
    return with_unit(size, BYTES)
