"""The picture of failures in `which_adjoint.md`: for each adjoint, the problem on which it should not be used.

python docs/which_adjoint_failures.py    # writes docs/which_adjoint_failures.png
"""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from tqdm import tqdm
from which_adjoint import POINTS, gradient, options, pendulum, rod, temperature

import adjoint_jax as aj
from adjoint_jax.diagnostics import memory_plan

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


def backsolve_on_a_decay(axes: Axes) -> None:
    """y' = -30 y to t = 1, and what integrating y backward from there makes of it."""

    def field(t: Any, y: Any, k: Any) -> Any:
        return -k * y

    ts = np.linspace(0.0, 1.0, 41)
    end = aj.solve(field, 0.0, 1.0, 1.0, 30.0).ys[0]
    back = aj.solve(field, 1.0, 0.0, end, 30.0, saveat=aj.SaveAt(ts[::-1])).ys
    axes.plot(ts, np.exp(-30 * ts), label="y")
    axes.plot(ts[::-1], np.abs(back), label="backward from y(1)")
    axes.set(yscale="log", xlabel="t", title="Backsolve: the reversed flow is unstable")


def reversible_with_damping(axes: Axes) -> None:
    """y' = -20 y, fifty steps of 1/25."""
    methods = {"ReversibleHeun": aj.ReversibleHeun(), "Reversible(Heun)": aj.Reversible(aj.Heun()), "Heun": aj.Heun()}
    for name, solver in methods.items():
        saveat = aj.SaveAt(steps=True, t0=True)
        options = {"solver": solver, "controller": aj.FixedSteps(50), "saveat": saveat}
        solution = aj.solve(lambda t, y, args: -20.0 * y, 0.0, 2.0, 1.0, **options)
        axes.plot(solution.ts, np.abs(solution.ys), label=name)
    axes.plot(solution.ts, np.exp(-20 * solution.ts), "k--", linewidth=1, label="y")
    axes.set(yscale="log", xlabel="t", title="Reversible: so is the method, with damping")


def interpolating_on_coarse_grids(axes: Axes) -> None:
    """The pendulum's gradient against that of the computed solution, RK4."""
    counts = (8, 16, 32, 64, 128)
    methods = {"InterpolatingAdjoint": aj.InterpolatingAdjoint(), "GaussAdjoint": aj.GaussAdjoint()}
    for name, adjoint in methods.items():
        errors = []
        for steps in counts:

            def loss(length: Any, adjoint: Any, steps: int = steps) -> Any:
                grid = {"solver": aj.RK4(), "controller": aj.FixedSteps(steps), "adjoint": adjoint}
                return jnp.sum(aj.solve(pendulum, 0.0, 4.0, jnp.array([1.0, 0.0]), length, **grid).ys)

            exact = gradient(functools.partial(loss, adjoint=aj.DiscreteAdjoint()), 1.3)
            errors.append(abs(gradient(functools.partial(loss, adjoint=adjoint), 1.3) / exact - 1))
        axes.plot(counts, errors, "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="steps", title="Interpolating, Gauss: a coarse grid")


def forward_mode_with_many_inputs(axes: Axes) -> None:
    """Milliseconds of the gradient with respect to all initial values of a chain."""
    sizes = (4, 16, 64, 256)
    for name, adjoint in {"ForwardMode": aj.ForwardMode(), "DiscreteAdjoint": aj.DiscreteAdjoint()}.items():
        derivative = jax.jacfwd if name == "ForwardMode" else jax.grad
        taken = []
        for size in sizes:

            def loss(y0: Any, adjoint: Any = adjoint) -> Any:
                return jnp.sum(
                    aj.solve(lambda t, y, args: jnp.sin(jnp.roll(y, 1)) - y, 0.0, 1.0, y0, adjoint=adjoint).ys ** 2
                )

            y0, compiled = jnp.linspace(0.0, 1.0, size), jax.jit(derivative(loss))
            jax.block_until_ready(compiled(y0))
            taken.append(min(_milliseconds(compiled, y0) for _ in range(10)))
        axes.plot(sizes, taken, "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="inputs", ylabel="ms", title="ForwardMode: many inputs")


def _milliseconds(compiled: Any, y0: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(compiled(y0))
    return 1e3 * (time.perf_counter() - start)


def discrete_at_the_limit_of_stability(axes: Axes) -> None:
    """The derivative of the rod's mean square temperature with respect to its initial temperature."""
    x = np.arange(1, POINTS + 1) / (POINTS + 1)
    for name, adjoint in {
        "DiscreteAdjoint": aj.DiscreteAdjoint(),
        "InterpolatingAdjoint": aj.InterpolatingAdjoint(),
    }.items():
        slope = jax.jit(jax.grad(lambda inputs, adjoint=adjoint: temperature(inputs, options(adjoint))))(rod())[0]
        axes.plot(x, slope, label=name)
    axes.set(yscale="symlog", xlabel="point of the rod", title="Discrete: steps at the limit of stability")
    axes.set_yscale("symlog", linthresh=1e-2)


def memory_of_many_steps(axes: Axes) -> None:
    """What is planned to be kept of RK4 steps of a state of 32 KiB."""
    counts = (100, 1_000, 10_000, 100_000)
    methods = {
        "DiscreteAdjoint": (aj.DiscreteAdjoint(), aj.RK4()),
        "Discrete, checkpoints=4": (aj.DiscreteAdjoint(checkpoints=4), aj.RK4()),
        "Reversible": (aj.ReversibleAdjoint(), aj.Reversible(aj.RK4())),
    }
    for name, (adjoint, solver) in methods.items():
        plans = [
            memory_plan(
                lambda t, y, args: jnp.sin(y),
                0.0,
                1.0,
                jnp.ones(4096),
                adjoint=adjoint,
                solver=solver,
                controller=aj.FixedSteps(steps),
            )
            for steps in counts
        ]
        axes.plot(counts, [plan.bytes / 2**20 for plan in plans], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="MiB", title="Discrete: memory of many steps")


PANELS = (
    backsolve_on_a_decay,
    reversible_with_damping,
    interpolating_on_coarse_grids,
    forward_mode_with_many_inputs,
    discrete_at_the_limit_of_stability,
    memory_of_many_steps,
)


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    figure, grid = plt.subplots(2, 3, figsize=(12.5, 7.0), dpi=120, layout="constrained")
    for panel, axes in zip(tqdm(PANELS), grid.flat, strict=True):
        panel(axes)
        axes.title.set_fontsize(10)
        axes.title.set_horizontalalignment("left")
        axes.title.set_position((0.0, 1.0))
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
