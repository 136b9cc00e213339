"""Gauss-Newton and Hessian-vector products: fit an ODE in a dozen steps, and say how well the data determine it.

Forty noisy observations of both species of a Lotka-Volterra cycle, made from known rates; four rates and two initial values
are fitted by least squares from a start that is wrong by about a third. Three optimisers descend the same loss:

- Levenberg-Marquardt: the Jacobian J of the residuals by `jax.jacfwd` through `ForwardMode()`, steps by J'J + damping.
- Newton-CG: Hessian-vector products in conjugate gradients, by `jax.linearize` of `jax.grad` through `DiscreteAdjoint()`.
- Adam, with the gradient of `DiscreteAdjoint()`.

The first two reach the minimum to rounding in about ten steps, Adam in a thousand. At the minimum, noise^2 (J'J)^-1 is the
covariance of the estimate, as far as the model is linear in it. To see whether this is so, 200 further data sets with fresh
noise are fitted, all at once: `jax.vmap` of the whole Levenberg-Marquardt fit. Their scatter agrees with the covariance.

    python examples/second_order.py            # about half a minute
    python examples/second_order.py --short    # 40 data sets, fewer steps of Adam
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import BLUE, GREEN, ORANGE, STYLE, parse_arguments
from jaxtyping import Array, Float
from tqdm import tqdm

import adjoint_jax as aj

jax.config.update("jax_enable_x64", True)

NAMES = ("alpha", "beta", "gamma", "delta", "prey at 0", "predators at 0")
TRUTH = jnp.log(jnp.array([1.0, 0.5, 1.2, 0.4, 2.0, 1.0]))
START = TRUTH + jnp.array([0.3, -0.3, -0.3, 0.3, 0.3, -0.3])
GRID = jnp.linspace(0.0, 12.0, 241)
EVERY = 6
"""Steps from one observation to the next."""
TIMES = GRID[EVERY::EVERY]
NOISE = 0.15
"""Standard deviation of the logarithm of an observation."""
COLORS = {"Levenberg-Marquardt": BLUE, "Newton-CG": ORANGE, "Adam": GREEN}

Parameters = Float[Array, "6"]
"""Logarithms of the rates and of the initial populations."""
Observations = Float[Array, "times 2"]
Direction = Callable[[Parameters, Float[Array, ""], Observations], Parameters]
"""From parameters, damping and data to a step."""


class Descent(NamedTuple):
    """Parameters, and the loss at the start and after each step."""

    parameters: Parameters
    losses: Float[Array, " steps"]


class Timed(NamedTuple):
    """A descent, and the seconds that it took after compilation."""

    descent: Descent
    seconds: float


def lotka_volterra(t: Float[Array, ""], y: Float[Array, "2"], parameters: Parameters) -> Float[Array, "2"]:
    """For the logarithms of prey and predators."""
    alpha, beta, gamma, delta = jnp.exp(parameters[:4])
    prey, predators = jnp.exp(y)
    return jnp.stack([alpha - beta * predators, delta * prey - gamma])


def trajectory(parameters: Parameters, adjoint: Any = aj.DiscreteAdjoint(), every: int = 1) -> Float[Array, "times 2"]:
    """At the times of the grid, or every so many of them. On a given grid the loss is smooth, without steps that adapt."""
    grid = {"solver": aj.RK4(), "controller": aj.StepTo(GRID)}
    return aj.odeint(lotka_volterra, parameters[4:], GRID[::every], parameters, adjoint=adjoint, throw=False, **grid)


def residuals(parameters: Parameters, data: Observations, adjoint: Any) -> Float[Array, " residuals"]:
    return ((trajectory(parameters, adjoint, EVERY)[1:] - data) / NOISE).ravel()


def loss(parameters: Parameters, data: Observations) -> Float[Array, ""]:
    return 0.5 * jnp.sum(residuals(parameters, data, aj.DiscreteAdjoint()) ** 2)


class Linearised(NamedTuple):
    residuals: Float[Array, " residuals"]
    jacobian: Float[Array, "residuals 6"]


def linearised(parameters: Parameters, data: Observations) -> Linearised:
    def twice(parameters: Parameters) -> tuple[Array, Array]:
        values = residuals(parameters, data, aj.ForwardMode())
        return values, values

    jacobian, values = jax.jacfwd(twice, has_aux=True)(parameters)
    return Linearised(values, jacobian)


def levenberg_marquardt(parameters: Parameters, damping: Float[Array, ""], data: Observations) -> Parameters:
    values, jacobian = linearised(parameters, data)
    normal = jacobian.T @ jacobian
    return -jnp.linalg.solve(normal + damping * jnp.diag(jnp.diag(normal)), jacobian.T @ values)


def newton_cg(parameters: Parameters, damping: Float[Array, ""], data: Observations) -> Parameters:
    def gradient(at: Parameters) -> Parameters:
        return jax.grad(loss)(at, data)

    slope, hessian_times = jax.linearize(gradient, parameters)
    size = jnp.linalg.norm(slope)
    step, _ = jax.scipy.sparse.linalg.cg(lambda v: hessian_times(v) + damping * size * v, -slope / size, maxiter=6)
    return step * size


class Stand(NamedTuple):
    """The best parameters so far, and the next candidate."""

    best: Parameters
    loss: Float[Array, ""]
    damping: Float[Array, ""]
    candidate: Parameters


def minimise(direction: Direction, start: Parameters, data: Observations, steps: int) -> Descent:
    """A step that does not lower the loss is taken back, and the damping is raised; otherwise it is lowered."""

    def step(stand: Stand, _: None) -> tuple[Stand, Float[Array, ""]]:
        value = loss(stand.candidate, data)
        better = value < stand.loss
        best = jnp.where(better, stand.candidate, stand.best)
        damping = stand.damping * jnp.where(better, 0.1, 10.0)
        least = jnp.minimum(value, stand.loss)
        return Stand(best, least, damping, best + direction(best, damping, data)), least

    end, losses = jax.lax.scan(step, Stand(start, jnp.array(jnp.inf), jnp.array(1.0), start), None, steps + 1)
    return Descent(end.best, losses)


def adam(start: Parameters, data: Observations, steps: int) -> Descent:
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, steps))

    def step(carry: tuple[Parameters, Any], _: None) -> tuple[tuple[Parameters, Any], Float[Array, ""]]:
        parameters, state = carry
        value, gradient = jax.value_and_grad(loss)(parameters, data)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(parameters, updates), state), value

    (parameters, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), None, steps + 1)
    return Descent(parameters, losses)


def timed(fit: Callable[[Parameters, Observations], Descent], data: Observations) -> Timed:
    compiled = jax.jit(fit).lower(START, data).compile()
    begin = time.perf_counter()
    descent = jax.block_until_ready(compiled(START, data))
    return Timed(descent, time.perf_counter() - begin)


def compare(data: Observations, adam_steps: int) -> dict[str, Timed]:
    fits = {
        "Levenberg-Marquardt": lambda start, data: minimise(levenberg_marquardt, start, data, 20),
        "Newton-CG": lambda start, data: minimise(newton_cg, start, data, 20),
        "Adam": lambda start, data: adam(start, data, adam_steps),
    }
    return {name: timed(fit, data) for name, fit in tqdm(fits.items(), desc="optimisers", unit="fit")}


def observed(keys: Array) -> Float[Array, "sets times 2"]:
    """The true trajectory with fresh noise for each key."""
    truth = trajectory(TRUTH)[EVERY::EVERY]
    return truth + NOISE * jax.vmap(lambda key: jax.random.normal(key, truth.shape))(keys)


def refits(start: Parameters, sets: Float[Array, "sets times 2"], batch: int = 20) -> Float[Array, "sets 6"]:
    """The fits to many data sets, a batch at a time."""
    fit = jax.jit(jax.vmap(lambda data: minimise(levenberg_marquardt, start, data, 8).parameters))
    batches = jnp.split(sets, len(sets) // batch)
    return jnp.concatenate([fit(data) for data in tqdm(batches, desc="refits", unit="batch")])


def print_optimisers(runs: dict[str, Timed]) -> None:
    least = min(run.descent.losses[-1] for run in runs.values())
    print(f"\n{'':>20}    steps to 1e-6 of the minimum    loss - minimum at the end    seconds for all steps")
    for name, run in runs.items():
        excess = run.descent.losses - least
        steps = int(jnp.argmax(excess < 1e-6)) if jnp.any(excess < 1e-6) else f"more than {len(excess) - 1}"
        print(f"{name:>20} {steps:>31} {excess[-1]:28.1e} {run.seconds:14.3f} for {len(excess) - 1}")


def print_estimates(fitted: Parameters, covariance: Float[Array, "6 6"], scatter: Float[Array, "sets 6"]) -> None:
    """In relative terms: an error of 0.01 in a logarithm is one per cent."""
    errors, spread = jnp.sqrt(jnp.diag(covariance)), jnp.std(scatter - TRUTH, axis=0, ddof=1)
    print(f"\n{'':>20} {'truth':>8} {'fit':>8} {'off by':>12} {'std. error':>12} {'scatter':>12} of refits")
    for i, name in enumerate(NAMES):
        off = (fitted[i] - TRUTH[i]) / errors[i]
        print(f"{name:>20} {jnp.exp(TRUTH[i]):8.3f} {jnp.exp(fitted[i]):8.3f} {off:+6.2f} errors", end="")
        print(f" {100 * errors[i]:10.2f} % {100 * spread[i]:10.2f} %")
    distances = jnp.einsum("si,ij,sj->s", scatter - TRUTH, jnp.linalg.inv(covariance), scatter - TRUTH)
    inside = jnp.mean(distances < 10.645)
    print(f"{100 * inside:.0f} % of {len(scatter)} refits lie in the ellipsoid that should hold 90 %")


def plot_ellipse(axes: Any, pair: tuple[int, int], covariance: Array, scatter: Array, fitted: Parameters) -> None:
    """Refits around the truth, with the 90 % ellipse of the covariance at one fit, moved to the truth."""
    values, vectors = jnp.linalg.eigh(covariance[jnp.ix_(jnp.array(pair), jnp.array(pair))])
    angles = jnp.linspace(0, 2 * jnp.pi, 200)
    circle = jnp.sqrt(4.605) * jnp.stack([jnp.cos(angles), jnp.sin(angles)])
    i, j = pair
    x, y = jnp.exp(TRUTH[jnp.array(pair), None] + vectors @ (jnp.sqrt(values)[:, None] * circle))
    axes.plot(*jnp.exp(scatter[:, pair]).T, ".", color="#9ecae1", markersize=4, label="fits to fresh noise")
    axes.plot(x, y, color=BLUE, label="90 % by noise² (JᵀJ)⁻¹")
    axes.plot(jnp.exp(TRUTH[i]), jnp.exp(TRUTH[j]), "+", color="black", markersize=9, label="truth")
    axes.plot(jnp.exp(fitted[i]), jnp.exp(fitted[j]), "o", color=ORANGE, markersize=5, label="the fit")
    axes.set(xlabel=NAMES[i], ylabel=NAMES[j])


def plot_fit(axes: Any, data: Observations, fitted: Parameters) -> None:
    before, after = (jnp.exp(trajectory(parameters)) for parameters in (START, fitted))
    for species, color, name in ((0, BLUE, "prey"), (1, ORANGE, "predators")):
        axes.plot(GRID, before[:, species], color=color, linewidth=0.9, linestyle=":")
        axes.plot(GRID, after[:, species], color=color, label=name)
        axes.plot(TIMES, jnp.exp(data[:, species]), "o", color=color, markersize=3)
    axes.set(xlabel="t", ylabel="population", title="The fit (dotted: where it starts)")
    axes.legend()


def plot_descents(axes: Any, runs: dict[str, Timed]) -> None:
    least = min(run.descent.losses[-1] for run in runs.values())
    for name, run in runs.items():
        excess = np.maximum(run.descent.losses - least, 1e-10)
        axes.loglog(np.arange(1, len(excess) + 1), excess, color=COLORS[name], label=name)
    axes.set(xlabel="step", ylabel="loss - minimum", title="Convergence")
    axes.legend(loc="upper right", fontsize=8)


def main() -> None:
    arguments = parse_arguments("Fit an ODE by Gauss-Newton and by Newton-CG.")
    plt.rcParams.update(STYLE)
    sets, steps = (40, 500) if arguments.short else (200, 3000)
    data, *fresh = observed(jax.random.split(jax.random.key(0), sets + 1))
    runs = compare(data, steps)
    print_optimisers(runs)
    fitted = runs["Levenberg-Marquardt"].descent.parameters
    jacobian = jax.jit(linearised)(fitted, data).jacobian
    covariance = jnp.linalg.inv(jacobian.T @ jacobian)
    scatter = refits(fitted, jnp.stack(fresh))
    print_estimates(fitted, covariance, scatter)

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.9))
    plot_fit(axes[0], data, fitted)
    plot_descents(axes[1], runs)
    for axis, pair in zip(axes[2:], ((0, 1), (2, 3)), strict=True):
        plot_ellipse(axis, pair, covariance, scatter, fitted)
    axes[2].set_title("How well the data determine the rates")
    axes[3].legend(loc="upper left", fontsize=8)
    path: Path = arguments.output / "second_order.png"
    figure.savefig(path)
    print(f"\nplot: {path}")


if __name__ == "__main__":
    main()
