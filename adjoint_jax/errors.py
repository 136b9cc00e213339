"""Raising Python errors from solves, jitted or not."""

from typing import Any

import jax
import numpy as np

from adjoint_jax.lanes import any_lane
from adjoint_jax.solution import Solution, SolveError, Status


def raise_on_failure(solution: Solution) -> Solution:
    """The solution, if t1 was reached in all lanes; else `SolveError`.

    Values that are known now are looked at now. Within a trace, the compiled program looks at the status when it runs, and
    calls back into Python if, and only if, it has failed.
    """
    facts = jax.lax.stop_gradient((solution.status, solution.t_end, solution.stats.accepted, solution.stats.rejected))
    if not any(isinstance(fact, jax.core.Tracer) for fact in facts):
        _raise(*facts)
        return solution
    failed = any_lane(solution.status != Status.SUCCESS)
    jax.lax.cond(failed, lambda: jax.debug.callback(_raise, *facts), lambda: None)
    return solution


def _raise(status: Any, t: Any, accepted: Any, rejected: Any) -> None:
    status, t, accepted, rejected = np.broadcast_arrays(status, t, accepted, rejected)
    failures = np.argwhere(status != Status.SUCCESS)
    if failures.size == 0 and status.size and np.all(status == Status.SUCCESS):
        return
    lane = tuple(failures[0])
    kind = Status(int(status[lane]))
    where = f" in lane {lane[0] if len(lane) == 1 else lane} of {status.shape}" if lane else ""
    raise SolveError(
        f"{kind.name}{where} at t = {t[lane]:.9g}, after {accepted[lane]} accepted and {rejected[lane]} rejected steps. "
        f"{kind.explanation} (With throw=False, solve returns what it has, and solution.status.)"
    )
