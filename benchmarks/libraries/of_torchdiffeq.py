"""torchdiffeq. A batch, or all lanes, share one step size: they are one system to it."""

from typing import Any

import torch
import torchdiffeq

from benchmarks.libraries.of_torch import TorchProgram


class Backpropagation(TorchProgram):
    """Plain backpropagation through the solver, its documentation's default."""

    def solve(self, parameters: Any, tolerance: float | None) -> torch.Tensor:
        problem = self.problem
        if problem.steps is None:
            options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "method": "dopri5"}
        else:
            step = (problem.t1 - problem.t0) / problem.steps
            options = {"method": "rk4", "options": {"step_size": step, "perturb": False}}
        field = Bound(self.field, parameters)
        ys = torchdiffeq.odeint(field, self.y0, self.times, **options)
        ys = ys if problem.ts is not None else ys[-1:]
        return ys if problem.lanes is None else ys.transpose(0, 1)


class Bound(torch.nn.Module):
    """The field with its parameters, as torchdiffeq wants it."""

    def __init__(self, field: torch.nn.Module, parameters: Any):
        super().__init__()
        self.field, self.bound = field, parameters

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.field(t, y, self.bound)


backpropagation = Backpropagation
