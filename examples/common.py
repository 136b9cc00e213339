"""What the examples share: a training loop and a plotting style."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tqdm import tqdm

matplotlib.use("Agg")

Model = TypeVar("Model", bound=Any)

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#d55e00", "#009e73", "#cc3311", "#5f5f5f"

STYLE = {
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}


def parse_arguments(description: str | None, adjoints: Sequence[str] = ()) -> argparse.Namespace:
    """The options of every example: `--short` and `--output DIR`, which is created; and `--adjoint`, one of the given
    names, the first by default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--short", action="store_true", help="a few seconds of training, to see that everything runs")
    parser.add_argument("--output", type=Path, default=Path("examples/output"), help="where the plot goes")
    if adjoints:
        parser.add_argument("--adjoint", choices=adjoints, default=adjoints[0], help="what computes the gradient")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def train(
    loss: Callable[[Model, Int[Array, ""]], Float[Array, "*members"]],
    model: Model,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    label: str,
    every: int = 50,
    after_chunk: Callable[[int, Model], None] | None = None,
) -> tuple[Model, np.ndarray]:
    """Minimise `loss(model, step)` over the arrays of `model`; returns the trained model and the loss at every step.

    Of an ensemble, `loss` may return one value for each member: the sum is minimised, so that members do not notice each
    other under an optimizer that, like Adam, treats every number by itself.

    `every` steps are one compiled `lax.scan`, after which the progress bar moves and `after_chunk(step, model)` is called.
    """
    arrays, static = eqx.partition(model, eqx.is_inexact_array)

    def total(arrays: Any, index: Array) -> tuple[Array, Array]:
        value = loss(eqx.combine(arrays, static), index)
        return jnp.sum(value), value

    def step(carry: Any, index: Array) -> tuple[Any, Array]:
        arrays, state = carry
        gradient, value = jax.grad(total, has_aux=True)(arrays, index)
        updates, state = optimizer.update(gradient, state, arrays)
        return (optax.apply_updates(arrays, updates), state), value

    @jax.jit
    def chunk(carry: Any, first: Array) -> tuple[Any, Array]:
        return jax.lax.scan(step, carry, first + jnp.arange(every))

    assert steps % every == 0, (steps, every)
    carry, losses = (arrays, optimizer.init(arrays)), []
    with tqdm(total=steps, desc=label, unit="step", mininterval=0.5) as bar:
        for first in range(0, steps, every):
            carry, values = chunk(carry, jnp.int32(first))
            losses.append(np.asarray(values))
            bar.update(every)
            bar.set_postfix(loss=f"{np.median(losses[-1][-1]):.2e}", refresh=False)
            if after_chunk is not None:
                after_chunk(first + every, eqx.combine(carry[0], static))
    return eqx.combine(carry[0], static), np.concatenate(losses)
