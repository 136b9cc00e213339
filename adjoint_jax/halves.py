"""Programs in two halves: what some results need now, and what the others need later.

The pullback of a vector field maps the cotangent of dy/dt to those of y, which the next stage waits for, and of the
parameters, which nothing waits for. For one point the latter are products of vectors, as large as all weights together;
for many points they are products of matrices, in a fraction of the time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from adjoint_jax.hoisting import computed, inlined, is_computed, results_of


class Halves(NamedTuple):
    """A program as two: the first computes some of its results, and what it passes on; the second computes the others from
    that. Both have those operands that are *given*; what depends on these alone is not passed on, but computed in both."""

    closed: Any
    equations: tuple[list[Any], list[Any]]
    results: tuple[list[Any], list[Any]]
    passed: list[Any]

    @staticmethod
    def of(closed: Any, in_first: Sequence[bool], given: Sequence[bool]) -> "Halves":
        """Those of a closed program. `in_first`: which results the first computes. `given`: which operands both have."""
        closed = inlined(closed)
        program = closed.jaxpr
        varying = {variable for variable, is_given in zip(program.invars, given, strict=True) if not is_given}
        for equation in program.eqns:
            if _any(varying, equation.invars):
                varying.update(equation.outvars)
        pairs = list(zip(program.outvars, in_first, strict=True))
        results = [v for v, is_first in pairs if is_first], [v for v, is_first in pairs if not is_first]
        wanted = set(filter(is_computed, results[0])), set(filter(is_computed, results[1]))
        equations: tuple[list[Any], list[Any]] = ([], [])
        for equation in reversed(program.eqns):
            is_first = _any(wanted[0], equation.outvars)
            is_second = _any(wanted[1], equation.outvars) and not (is_first and _any(varying, equation.outvars))
            for half, is_in in enumerate((is_first, is_second)):
                if is_in:
                    equations[half].append(equation)
                    wanted[half].update(filter(is_computed, equation.invars))
        first, second = equations[0][::-1], equations[1][::-1]
        made = [*program.invars, *(v for equation in first for v in equation.outvars)]
        passed = [v for v in made if v in varying and v in wanted[1]]
        return Halves(closed, (first, second), results, passed)

    def first(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Its results, and what is passed on."""
        known = self._known(operands)
        return results_of(self.equations[0], known, self.results[0], computed), [known[v] for v in self.passed]

    def second(self, operands: Sequence[Any], passed: Sequence[Any]) -> list[Any]:
        """The other results. Operands that are not given are not looked at."""
        known = self._known(operands) | dict(zip(self.passed, passed, strict=True))
        return results_of(self.equations[1], known, self.results[1], computed)

    @property
    def read_by_second(self) -> list[bool]:
        """Which operands the second half reads."""
        read = {v for equation in self.equations[1] for v in filter(is_computed, equation.invars)}
        read |= set(filter(is_computed, self.results[1]))
        return [variable in read for variable in self.closed.jaxpr.invars]

    def _known(self, operands: Sequence[Any]) -> dict[Any, Any]:
        program = self.closed.jaxpr
        return dict(zip([*program.constvars, *program.invars], [*self.closed.consts, *operands], strict=True))


def _any(variables: set[Any], some: Sequence[Any]) -> bool:
    return any(is_computed(variable) and variable in variables for variable in some)
