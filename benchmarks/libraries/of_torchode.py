"""torchode: lanes, and samples of a batch, each with their own step size; backpropagation through the solver."""

from typing import Any

import torch
import torchode

from benchmarks.libraries.of_torch import DEVICE, TorchProgram


class Backpropagation(TorchProgram):
    """Tsit5 with an integral controller, as in its documentation; eagerly."""

    def solve(self, parameters: Any, tolerance: float | None) -> torch.Tensor:
        problem = self.problem
        single = problem.lanes is None and self.y0.dim() == 1
        y0 = self.y0[None] if single else self.y0
        term = torchode.ODETerm(self.field, with_args=True)
        method = torchode.Tsit5(term=term)
        controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        times = self.times if problem.ts is not None else None
        start = torch.full((len(y0),), problem.t0, dtype=y0.dtype, device=DEVICE)
        end = torch.full((len(y0),), problem.t1, dtype=y0.dtype, device=DEVICE)
        evaluate = None if times is None else times.repeat(len(y0), 1)
        value = torchode.InitialValueProblem(y0=y0, t_start=start, t_end=end, t_eval=evaluate)
        solution = torchode.AutoDiffAdjoint(method, controller).to(DEVICE).solve(value, args=parameters)
        ys = solution.ys if evaluate is not None else solution.ys[:, -1:]
        return ys[0] if single else ys


backpropagation = Backpropagation
