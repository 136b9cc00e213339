"""torchdiffeq and torchode, by way of what they share: programs that run eagerly, and are never compiled."""

import abc
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.problems import Field, Problem
from benchmarks.programs import Executable, Outcome, Program, Quantity, flattened

DEVICE = torch.device("cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu")


def tensors(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: torch.tensor(leaf, device=DEVICE), tree)


class CountedField(torch.nn.Module):
    """A field that counts its evaluations."""

    def __init__(self, field: Field):
        super().__init__()
        self.field, self.evaluations = field, 0

    def forward(self, t: torch.Tensor, y: torch.Tensor, parameters: Any) -> torch.Tensor:
        self.evaluations += 1
        return self.field(t, y, parameters)


class TorchProgram(Program):
    """All lanes, or all samples of a batch, as one tensor; the gradient is that of the sum of the losses of all lanes."""

    def __init__(self, problem: Problem, quantity: Quantity):
        self.problem, self.quantity = problem, quantity
        self.field = CountedField(problem.equation.field(torch))
        self.leaves, self.structure = jax.tree.flatten(tensors(problem.parameters))
        y0 = tensors(problem.y0)
        self.y0 = y0 if problem.lanes is None else y0.repeat(problem.lanes, 1)
        self.times = tensors(problem.times)

    @abc.abstractmethod
    def solve(self, parameters: Any, tolerance: float | None) -> torch.Tensor:
        """What is saved, lanes first, then times."""

    def ready(self, tolerance: float | None) -> Executable:
        run = self._forward if self.quantity is Quantity.FORWARD else self._gradient

        def call() -> Any:
            self.field.evaluations = 0
            result = run(tolerance)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            return result

        return Executable(call, self._outcome)

    def _forward(self, tolerance: float | None) -> list[torch.Tensor]:
        with torch.no_grad():
            return [self.solve(jax.tree.unflatten(self.structure, self.leaves), tolerance)]

    def _gradient(self, tolerance: float | None) -> list[torch.Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        ys = self.solve(jax.tree.unflatten(self.structure, leaves), tolerance)
        cost = ys.square().sum() * ((self.problem.lanes or 1) / ys.numel())
        return list(torch.autograd.grad(cost, leaves))

    def _outcome(self, result: list[torch.Tensor]) -> Outcome:
        numbers = [leaf.detach().cpu().numpy() for leaf in result]
        return Outcome(flattened(numbers, self.problem), {"evaluations": np.asarray(self.field.evaluations)})
