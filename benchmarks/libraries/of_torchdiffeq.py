"""torchdiffeq. A batch, or all lanes, share one step size: they are one system to it."""

from typing import Any

import torch
import torchdiffeq

from benchmarks.libraries.of_torch import TorchProgram


class Backpropagation(TorchProgram):
    """Plain backpropagation through the solver, its documentation's default."""

    def solve(self, parameters: Any, tolerance: float | None) -> torch.Tensor:
        return self._arranged(torchdiffeq.odeint, parameters, tolerance)

    def _arranged(self, odeint: Any, parameters: Any, tolerance: float | None, **options: Any) -> torch.Tensor:
        problem = self.problem
        if problem.steps is None:
            options |= {"rtol": tolerance, "atol": tolerance, "method": "dopri5"}
        else:
            step = (problem.t1 - problem.t0) / problem.steps
            options |= {"method": "rk4", "options": {"step_size": step, "perturb": False}}
        field = Bound(self.field, parameters)
        ys = odeint(field, self.y0, self.times, **options)
        ys = ys if problem.ts is not None else ys[-1:]
        return ys if problem.lanes is None else ys.transpose(0, 1)


class Adjoint(Backpropagation):
    """The continuous adjoint with the state integrated backward."""

    def solve(self, parameters: Any, tolerance: float | None) -> torch.Tensor:
        leaves = tuple(torch.utils._pytree.tree_leaves(parameters))
        return self._arranged(torchdiffeq.odeint_adjoint, parameters, tolerance, adjoint_params=leaves)


class Bound(torch.nn.Module):
    """The field with its parameters, as torchdiffeq wants it."""

    def __init__(self, field: torch.nn.Module, parameters: Any):
        super().__init__()
        self.field, self.bound = field, parameters

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.field(t, y, self.bound)


backpropagation, adjoint = Backpropagation, Adjoint
