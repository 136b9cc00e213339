"""Results of a program that follow from others of its results by a few cheap operations: need not be kept with those."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from adjoint_jax.hoisting import is_computed

_CHEAP = """
    abs add add_any and broadcast_in_dim conj convert_element_type copy eq expand_dims ge gt imag integer_pow le lt max min
    mul ne neg not one_minus_square or real reshape select_n sign squeeze square sub
"""
CHEAP = frozenset(_CHEAP.split())
"""Operations that take no longer than reading what they compute, within others."""
MOST_EQUATIONS = 8
"""That lead to a result."""


class Derivation(NamedTuple):
    """Which results of a program are kept, by their positions, and the equations that lead from these to the others."""

    kept: list[int]
    equations: list[Any]

    @staticmethod
    def of(program: Any, known: Sequence[Any]) -> "Derivation":
        """That which keeps the fewest, where some variables are known."""
        maker = {variable: equation for equation in program.eqns for variable in equation.outvars}
        settled, used = set(filter(is_computed, known)), set()
        given = settled.union(filter(is_computed, program.outvars))

        def leading_to(variable: Any, most: int) -> list[Any] | None:
            """The equations, the last one first; None if they are too many or not cheap."""
            equation = maker.get(variable)
            if most == 0 or equation is None or equation.primitive.name not in CHEAP:
                return None
            equations = [equation]
            for operand in equation.invars:
                if is_computed(operand) and operand not in given:
                    before = leading_to(operand, most - len(equations))
                    if before is None:
                        return None
                    equations += before
            return equations

        kept: list[int] = []
        for index, variable in enumerate(program.outvars):
            if not is_computed(variable) or variable in settled:
                continue
            settled.add(variable)
            equations = leading_to(variable, MOST_EQUATIONS)
            if equations is None:
                kept.append(index)
            else:
                used.update(map(id, equations))
        return Derivation(kept, [equation for equation in program.eqns if id(equation) in used])
