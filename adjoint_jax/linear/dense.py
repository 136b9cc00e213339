"""The whole Jacobian, and direct solves."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adjoint_jax import tree
from adjoint_jax.kernels import in_a_small_kernel, stored
from adjoint_jax.lanes import with_rule
from adjoint_jax.linear.jacobian import AbstractInverse, AbstractJacobian, ravel
from adjoint_jax.linear.mass import mass_of
from adjoint_jax.problem import Problem
from adjoint_jax.tree import Arrays, Scalar


class DenseJacobian(AbstractJacobian):
    """The whole Jacobian, n forward derivatives at once for a state of n real numbers, and direct solves.

    - `jac(t, y, args)`: the Jacobian, if it is known: a real array of shape (n, n) for the n entries of y (of all leaves in
      the order of `jax.flatten_util.ravel_pytree`, real and then imaginary parts of complex ones).
    """

    jac: Callable[[Scalar, Any, Any], Any] | None = eqx.field(static=True, default=None)

    def inverse(self, problem: Problem, t: Scalar, y: Arrays, g: Scalar) -> AbstractInverse:
        flat, unravel = ravel(y)
        if self.jac is None:
            jacobian = jax.jacfwd(lambda flat: ravel(problem.field(t, unravel(flat)))[0])(flat)
        else:
            jacobian = self._given(self.jac(t, y, problem.args), flat)
        matrix = mass_of(problem, flat) - g.astype(flat.dtype) * jacobian
        if flat.size <= INVERTED:
            return Inverted(_inverse(matrix))
        return Factorised(*jax.scipy.linalg.lu_factor(matrix))

    def _given(self, jacobian: Any, flat: Float[Array, " n"]) -> Float[Array, "n n"]:
        jacobian = jnp.asarray(jacobian, flat.dtype)
        if jacobian.shape != (flat.size, flat.size):
            raise ValueError(
                f"DenseJacobian(jac): jac(t, y, args) must return an array of shape {(flat.size, flat.size)} for a state "
                f"of {flat.size} real numbers, got {jacobian.shape}."
            )
        return jacobian


INVERTED = 24
"""Matrices of up to so many rows are inverted, since products with an inverse fuse with what surrounds them; and by
elimination in plain arithmetic, since LAPACK can be no part of a larger kernel. Larger ones are factorised. Measured on a
CPU, an inverse and eight products in us, by elimination and with LAPACK's inverse: 3 rows 0.15 and 0.94, 8 rows 0.95 and
2.1, 12 rows 1.8 and 4.9, 20 rows 3.3 and 9.5, 24 rows 4.4 and 12; in 64 lanes 3 rows 6 and 22, 8 rows 75 and 115, 12 rows
154 and 209, 20 rows 530 and 650, 24 rows 1,030 and 1,080. Of 32 rows in 32 lanes, factors take 0.7 to 0.9 of the time of
inverses."""


class Inverted(AbstractInverse):
    """An inverse matrix."""

    matrix: Float[Array, "n n"]

    def times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        return jnp.sum(self.matrix * _stored_if_long(right), axis=1)

    def transposed_times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        return jnp.sum(self.matrix * _stored_if_long(right)[:, None], axis=0)


SHORT = 4
"""Rows of a matrix for each of which its factor may be computed anew: to store two or three numbers takes longer in lanes.
POLLU, of 20 rows, takes three quarters of the time if the factor is stored, HIRES, of 8, nine tenths."""


def _stored_if_long(right: Float[Array, " n"]) -> Float[Array, " n"]:
    return right if len(right) <= SHORT else stored(right)


class Factorised(AbstractInverse):
    """Factors L U of a matrix with permuted rows."""

    factors: Float[Array, "n n"]
    pivots: Array

    def times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        return jax.scipy.linalg.lu_solve((self.factors, self.pivots), right)

    def transposed_times(self, right: Float[Array, " n"]) -> Float[Array, " n"]:
        return jax.scipy.linalg.lu_solve((self.factors, self.pivots), right, trans=1)


class _Elimination(NamedTuple):
    """Where it stands: the matrix; for every row, the column whose pivot it had, or -1; for every column, that row."""

    matrix: Float[Array, "n columns"]
    column_of: Int[Array, " n"]
    row_of: Int[Array, " n"]


NARROW, VECTORISED = 12, 32
"""Rows of more entries than the first are filled up to a multiple of the second, for which LLVM uses vectors: an inverse
takes 3.1 instead of 5.6 us for 20 rows, 4.1 instead of 9.4 for 24. In lanes, it would take 1.3 to 1.6 of the time."""


def _inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    if len(matrix) <= NARROW:
        return in_a_small_kernel(inverted, matrix)

    def of_lanes(axis_size: int, in_batched: list[bool], matrices: Array) -> tuple[Array, bool]:
        del axis_size, in_batched
        return jax.vmap(inverted)(matrices), True

    filled_up = functools.partial(inverted, columns=-(-len(matrix) // VECTORISED) * VECTORISED)
    return with_rule(lambda matrix: in_a_small_kernel(filled_up, matrix), of_lanes)(matrix)


def inverted(matrix: Float[Array, "n n"], columns: int | None = None) -> Float[Array, "n n"]:
    """The inverse, by Gauss-Jordan elimination with partial pivoting, in place and without exchanging rows. For a singular
    matrix it is not finite. `columns`: to how many each row is filled up meanwhile, with zeros.

    After k steps, A x = b has been solved for the unknowns of k columns, whose places entries of b have taken: with the
    pivot a_pk, row p becomes that of x_k, (b_p - sum_{j != k} a_pj x_j) / a_pk, and what it says of x_k is put into all
    other rows (G. H. Golub and C. F. Van Loan, "Matrix Computations", section 3.4, has the pivots). Row and column of the
    pivot are stored first: then each entry depends on its own place in the matrix alone, and XLA writes the next one over
    it instead of copying it back, which takes a third of the time."""
    n = len(matrix)
    if n == 0:
        return matrix
    width = n if columns is None else columns
    indices, of_columns = jnp.arange(n, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)

    def eliminate(k: Array, so_far: _Elimination) -> _Elimination:
        matrix, column_of, row_of = so_far
        column = tree.take(matrix.T, k)
        p = jnp.argmax(jnp.where(column_of < 0, jnp.abs(column), -1.0)).astype(jnp.int32)
        of_p, of_k = indices == p, of_columns == k
        row, column = stored((jnp.where(of_k, 1.0, tree.take(matrix, p)) / tree.take(column, p), column))
        others = jnp.where(of_k, 0.0, matrix) - column[:, None] * row
        matrix = jnp.where(of_p[:, None], row, others)
        return _Elimination(matrix, jnp.where(of_p, k, column_of), jnp.where(indices == k, p, row_of))

    filled_up = jnp.pad(matrix, ((0, 0), (0, width - n)))
    start = _Elimination(filled_up, jnp.full(n, -1, jnp.int32), jnp.zeros(n, jnp.int32))
    solved, column_of, row_of = jax.lax.fori_loop(0, n, eliminate, start)
    return solved[row_of][:, column_of]
