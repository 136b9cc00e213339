"""Raising Python errors from solves, jitted or not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from adjoint_jax import tree
from adjoint_jax.lanes import any_lane
from adjoint_jax.solution import Solution, SolveError, Status


def raise_on_failure(solution: Solution) -> Solution:
    """The solution, if t1 was reached in all lanes; else `SolveError`.

    Values that are known now are looked at now. Within a trace, the compiled program looks at the status when it runs, and
    calls back into Python if, and only if, it has failed.
    """
    facts = jax.lax.stop_gradient((solution.status, solution.t_end, solution.stats.accepted, solution.stats.rejected))
    if not tree.is_traced(*facts):
        _raise(*facts)
        return solution
    status = _checked(*facts)

    def depend(leaf: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """A use of the checked status that never changes the leaf: without one, the check would be dead code."""
        return jnp.where(status < 0, jnp.zeros_like(leaf), leaf)

    return tree.map(depend, solution)


@jax.custom_jvp
def _checked(*facts: Array) -> Int[Array, ""]:
    """The status; if it says that any lane has failed, Python is called back and raises. Has no derivative."""
    failed = any_lane(facts[0] != Status.SUCCESS)
    return jax.lax.cond(failed, _call_back, lambda *facts: facts[0], *facts)


@_checked.defjvp
def _no_derivative(primals: Any, tangents: Any) -> Any:
    del tangents
    return _checked(*primals), np.zeros(np.shape(primals[0]), jax.dtypes.float0)


def _call_back(*facts: Array) -> Int[Array, ""]:
    shape = jax.ShapeDtypeStruct((), facts[0].dtype)
    return jax.pure_callback(_raise, shape, *facts, vmap_method="broadcast_all")


def _raise(status: Any, t: Any, accepted: Any, rejected: Any) -> np.ndarray:
    """Raise an error that tells of the first failure; return the status if there is none."""
    status, t, accepted, rejected = (np.asarray(fact) for fact in (status, t, accepted, rejected))
    failures = np.argwhere(status != Status.SUCCESS)
    if not len(failures):
        return status
    lane = tuple(failures[0])
    kind = Status(int(status[lane]))
    where = f" in lane {lane[0] if len(lane) == 1 else lane} of {status.shape}" if lane else ""
    raise SolveError(
        f"{kind.name}{where} at t = {t[lane]:.9g}, after {accepted[lane]} accepted and {rejected[lane]} rejected steps. "
        f"{kind.explanation} (With throw=False, solve returns what it has, and solution.status.)"
    )
