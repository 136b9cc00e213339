"""Raising Python errors from solves, jitted or not."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from adjoint_jax import tree
from adjoint_jax.lanes import any_lane
from adjoint_jax.solution import Solution, SolveError, Status
from adjoint_jax.tree import Scalar

Values = TypeVar("Values")


class _Facts(NamedTuple):
    """What an error message tells, of one solve or of many lanes."""

    status: Any
    t: Any
    accepted: Any
    rejected: Any


def raise_on_failure(solution: Solution) -> Solution:
    """The solution, if t1 was reached in all lanes; else `SolveError`.

    Values that are known now are looked at now. Within a trace, the compiled program looks at the status when it runs, and
    calls back into Python if, and only if, it has failed.
    """
    stats = solution.stats
    facts = jax.lax.stop_gradient(_Facts(solution.status, solution.t_end, stats.accepted, stats.rejected))
    if not tree.is_traced(*facts):
        _raise_from_forward(*facts)
        return solution
    return _depending_on(_checked_forward(*facts), solution)


def raise_on_reverse_failure(values: Values, status: Int[Array, ""], t: Scalar) -> Values:
    """The values, if the status of the reverse integration that gave them is a success; else `SolveError`."""
    return _depending_on(_checked_reverse(*jax.lax.stop_gradient((status, t))), values)


def _depending_on(status: Int[Array, ""], values: Values) -> Values:
    """A use of the checked status that never changes a value: without one, the check would be dead code."""
    return tree.map(lambda leaf: jnp.where(status < 0, jnp.zeros_like(leaf), leaf), values)


def _checked(raise_error: Callable[..., np.ndarray]) -> Callable[..., Int[Array, ""]]:
    """The first of the facts, the status; if it says that any lane has failed, Python is called back and raises. Has no
    derivative."""

    def call_back(*facts: Array) -> Int[Array, ""]:
        shape = jax.ShapeDtypeStruct((), facts[0].dtype)
        return jax.pure_callback(raise_error, shape, *facts, vmap_method="broadcast_all")

    @jax.custom_jvp
    def checked(*facts: Array) -> Int[Array, ""]:
        failed = any_lane(facts[0] != Status.SUCCESS)
        return jax.lax.cond(failed, call_back, lambda *facts: facts[0], *facts)

    @checked.defjvp
    def no_derivative(primals: Any, tangents: Any) -> Any:
        del tangents
        return checked(*primals), np.zeros(np.shape(primals[0]), jax.dtypes.float0)

    return checked


def _raise(describe: Callable[..., str], *facts: Any) -> np.ndarray:
    """Raise an error that tells of the first failure; return the status if there is none."""
    facts = tuple(np.asarray(fact) for fact in facts)
    failures = np.argwhere(facts[0] != Status.SUCCESS)
    if not len(failures):
        return facts[0]
    lane = tuple(failures[0])
    kind = Status(int(facts[0][lane]))
    where = f" in lane {lane[0] if len(lane) == 1 else lane} of {facts[0].shape}" if lane else ""
    raise SolveError(f"{kind.name}{where} {describe(*(fact[lane] for fact in facts[1:]))} {kind.explanation}")


def _forward(t: Any, accepted: Any, rejected: Any) -> str:
    return (
        f"at t = {t:.9g}, after {accepted} accepted and {rejected} rejected steps. (With throw=False, solve returns what "
        "it has, and solution.status.)"
    )


def _reverse(t: Any) -> str:
    return f"at t = {t:.9g}, in the reverse integration of a gradient. (With throw=False, the gradient is NaN.)"


_raise_from_forward = functools.partial(_raise, _forward)
_checked_forward = _checked(_raise_from_forward)
_checked_reverse = _checked(functools.partial(_raise, _reverse))
