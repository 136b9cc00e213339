"""A method that finds out whether the problem is stiff."""

from typing import ClassVar, NamedTuple

from adjoint_jax.linear.dense import DenseJacobian
from adjoint_jax.linear.jacobian import AbstractJacobian
from adjoint_jax.solvers.methods import Tsit5
from adjoint_jax.solvers.solver import AbstractSolver
from adjoint_jax.tree import Arrays, Scalar

LIMIT = 3.0
"""Stiff: where the step size times the field's largest rate comes to Tsit5's limit of stability, about 3.5."""
PATIENCE = 10
"""Steps in a row that must speak for the other method."""


class Watched(NamedTuple):
    """y; the direction in which the field changes fastest, as far as it is known, of length one; and for how many steps in a
    row the problem has looked stiff, or, as a negative number, has not looked so since it was."""

    y: Arrays
    direction: Arrays
    evidence: Scalar


class AutoSolver(AbstractSolver):
    """Tsit5 where the problem is not stiff, Rodas5P where it is: order 5(4), dense output of order 4.

    After each step, the largest rate of the field is estimated by one product with its Jacobian (a power iteration along the
    solution). If the step size times this rate has stayed above the limit of Tsit5's stability for ten steps, Rodas5P takes
    over; if it has stayed below a third of it, Tsit5 does again. Under `vmap` each lane has its own method, and as long as
    no lane is stiff, no Jacobian is computed.

    - `jacobian`: that of `Rodas5P`.
    """

    jacobian: AbstractJacobian = DenseJacobian()

    _explicit: ClassVar[Tsit5] = Tsit5()
    order: ClassVar[int] = 5
    error_order: ClassVar[int] = 4
    dense_degree: ClassVar[int] = 4
    extra_stages: ClassVar[int] = 0
