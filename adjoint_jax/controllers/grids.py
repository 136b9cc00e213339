"""Grids that are known before the solution is."""

import operator
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from adjoint_jax import tree
from adjoint_jax.controllers.controller import AbstractGrid
from adjoint_jax.ends import EvenEnds, GivenEnds
from adjoint_jax.tree import Scalar


class FixedSteps(AbstractGrid):
    """`n` steps of equal size from t0 to t1, as one `lax.scan`.

    The number of steps is static, so that the compiled program has no data-dependent loop. `n` must be a positive
    integer (`ValueError`); `max_steps` does not apply.
    """

    n: int = eqx.field(static=True, converter=operator.index)

    def __check_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"FixedSteps(n) needs at least one step, got n = {self.n}.")

    def prepare(self, dtype: DTypeLike) -> "FixedSteps":
        del dtype
        return self

    @property
    def grid_steps(self) -> int:
        return self.n

    def grid(self, t0: Scalar, t1: Scalar) -> EvenEnds:
        return EvenEnds(t0, t1, self.n)


class StepTo(AbstractGrid):
    """Steps from each time of `ts` to the next, as one `lax.scan`. `ts[0]` must be t0 and `ts[-1]` must be t1.

    The inner times are constants of the derivative; those with respect to the two ends are t0's and t1's.
    """

    ts: Any = eqx.field(converter=tree.as_times)

    def __check_init__(self) -> None:
        if np.ndim(self.ts) != 1 or np.size(self.ts) < 2:
            raise ValueError(
                f"StepTo(ts) needs a one-dimensional array of at least two times, got shape {np.shape(self.ts)}."
            )

    def prepare(self, dtype: DTypeLike) -> "StepTo":
        return StepTo(tree.as_array(self.ts, dtype))

    @property
    def given_times(self) -> Any:
        return self.ts

    @property
    def grid_steps(self) -> int:
        return np.size(self.ts) - 1

    def grid(self, t0: Scalar, t1: Scalar) -> GivenEnds:
        return GivenEnds(jnp.asarray(self.ts).at[0].set(t0).at[-1].set(t1))
