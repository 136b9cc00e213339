"""Reaction rates from noisy concentrations: a stiff mechanism, fitted by Levenberg-Marquardt, with its uncertainty.

Robertson's mechanism, in which the rates differ by nine orders of magnitude:

    A -> B         k1 = 0.04
    B + C -> A + C k2 = 1e4
    2 B -> B + C   k3 = 3e7

All three species are observed at 40 times from 1e-5 to 1e4, with noise of 3 % of the size of each, which is one for A and C
and 4e-5 for B. The logarithms of the rates are fitted from a start at which every rate is wrong by a factor of five.
`Rodas5P` solves the equations in about a hundred steps; `Tsit5` would take thirty thousand to t = 40 already. The Jacobian
of the residuals is exact for the computed solution: `jax.jacfwd` through `ForwardMode()`, three tangents carried along.

At the minimum, (J'J)^-1 of the residuals in units of the noise is the covariance of the estimate, as far as the model is
linear in it. To see whether this is so, further data sets with fresh noise are fitted, many at once by `jax.vmap` of the
whole fit, and those are counted that lie in the ellipsoid that should hold 90 % of them.

    python examples/kinetics.py            # 1000 data sets, a minute
    python examples/kinetics.py --short    # 100 data sets
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from common import BLUE, GREEN, ORANGE, STYLE, parse_arguments
from jaxtyping import Array, Float
from tqdm import tqdm

import adjoint_jax as aj

jax.config.update("jax_enable_x64", True)

NAMES = ("k1", "k2", "k3")
TRUTH = jnp.log(jnp.array([0.04, 1e4, 3e7]))
START = TRUTH + jnp.log(5.0) * jnp.array([1.0, -1.0, 1.0])
Y0 = jnp.array([1.0, 0.0, 0.0])
SIZES = jnp.array([1.0, 4e-5, 1.0])
GRID = jnp.logspace(-5, 4, 313)
EVERY = 8
"""Points of the grid from one observation to the next."""
TIMES = GRID[::EVERY]
NOISE = 0.03
"""Standard deviation of an observation, in parts of the size of its species."""
CONTROLLER = aj.PIDController(rtol=1e-6, atol=1e-8 * SIZES)
LM_STEPS = 15
NINETY = {2: 4.605, 3: 6.251}
"""The squared radius that holds 90 % of a normal distribution, by its dimension."""

Rates = Float[Array, "3"]
"""Logarithms of k1, k2, k3."""
Observations = Float[Array, "times 3"]
"""Concentrations in parts of their sizes."""


def robertson(t: Float[Array, ""], y: Float[Array, "3"], rates: Rates) -> Float[Array, "3"]:
    k1, k2, k3 = jnp.exp(rates)
    a, b, c = y
    first, second, third = k1 * a, k2 * b * c, k3 * b * b
    return jnp.stack([second - first, first - second - third, third])


def solved(rates: Rates, times: Float[Array, " times"], adjoint: Any = aj.DiscreteAdjoint()) -> aj.Solution:
    options = {"solver": aj.Rodas5P(), "controller": CONTROLLER, "saveat": aj.SaveAt(times), "adjoint": adjoint}
    return aj.solve(robertson, 0.0, times[-1], Y0, rates, throw=False, **options)


def residuals(rates: Rates, data: Observations) -> Float[Array, " residuals"]:
    """In units of the noise."""
    return ((solved(rates, TIMES, aj.ForwardMode()).ys / SIZES - data) / NOISE).ravel()


class Linearised(NamedTuple):
    """The residuals and their Jacobian at some rates."""

    at: Rates
    residuals: Float[Array, " residuals"]
    jacobian: Float[Array, "residuals 3"]

    @property
    def loss(self) -> Float[Array, ""]:
        return 0.5 * jnp.sum(self.residuals**2)

    @property
    def normal(self) -> Float[Array, "3 3"]:
        """J'J, the Gauss-Newton Hessian."""
        return self.jacobian.T @ self.jacobian


def linearised(rates: Rates, data: Observations) -> Linearised:
    def twice(rates: Rates) -> tuple[Array, Array]:
        values = residuals(rates, data)
        return values, values

    jacobian, values = jax.jacfwd(twice, has_aux=True)(rates)
    return Linearised(rates, values, jacobian)


class Fit(NamedTuple):
    """The best linearisation, and the loss at the start and after each step."""

    best: Linearised
    losses: Float[Array, " steps"]


def levenberg_marquardt(data: Observations) -> Fit:
    """One solve a step. A step that does not lower the loss is taken back, and the damping is raised; otherwise it is
    lowered. A solve that fails gives NaN, which lowers nothing."""

    def step(carry: tuple[Linearised, Array, Rates], _: None) -> tuple[tuple[Linearised, Array, Rates], Array]:
        best, damping, at = carry
        candidate = linearised(at, data)
        better = candidate.loss < best.loss
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), candidate, best)
        damping = damping * jnp.where(better, 0.1, 10.0)
        damped = best.normal + damping * jnp.diag(jnp.diag(best.normal))
        return (best, damping, best.at - jnp.linalg.solve(damped, best.jacobian.T @ best.residuals)), best.loss

    nothing = Linearised(START, jnp.full(data.size, jnp.inf), jnp.zeros((data.size, 3)))
    (best, _, _), losses = jax.lax.scan(step, (nothing, jnp.array(1.0), START), None, LM_STEPS + 1)
    return Fit(best, losses)


def observed(sets: int) -> Float[Array, "sets times 3"]:
    """The true concentrations, with fresh noise in each set."""
    truth = solved(TRUTH, GRID).ys[::EVERY] / SIZES
    return truth + NOISE * jax.random.normal(jax.random.key(0), (sets, *truth.shape))


def fits(sets: Float[Array, "sets times 3"], batch: int = 20) -> Fit:
    """Those to many data sets, a batch at a time."""
    fit = jax.jit(jax.vmap(levenberg_marquardt))
    batches = jnp.split(sets, len(sets) // batch)
    parts = [fit(data) for data in tqdm(batches, desc="fits", unit="batch")]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def report(fit: Fit, covariance: Float[Array, "3 3"], scatter: Float[Array, "sets 3"]) -> None:
    """Errors are in relative terms: 0.01 in a logarithm is one per cent."""
    freedom = fit.best.residuals.size - 3
    steps = int(jnp.argmax(fit.losses - fit.losses[-1] < 1e-6))
    print(f"\none solve takes {solved(fit.best.at, GRID).stats.steps} steps; the fit {steps}, loss", end=" ")
    print(f"{fit.losses[0]:.0f} -> {fit.losses[-1]:.1f}; expected {freedom / 2:.1f} ± {(freedom / 2) ** 0.5:.1f}")
    errors, spread = jnp.sqrt(jnp.diag(covariance)), jnp.std(scatter, axis=0, ddof=1)
    print(f"\n{'':>4} {'truth':>10} {'start':>10} {'fit':>10} {'off by':>14} {'std. error':>12} {'scatter':>9} of refits")
    for i, name in enumerate(NAMES):
        truth, first, last = (jnp.exp(rates[i]) for rates in (TRUTH, START, fit.best.at))
        off = (fit.best.at[i] - TRUTH[i]) / errors[i]
        print(f"{name:>4} {truth:10.4g} {first:10.4g} {last:10.4g} {off:+7.2f} errors", end="")
        print(f" {100 * errors[i]:10.2f} % {100 * spread[i]:7.2f} %")
    inside, count = int(jnp.sum(squared_distances(scatter, covariance) < NINETY[3])), len(scatter)
    print(f"{inside} of {count} refits lie in the ellipsoid that should hold 90 %: {0.9 * count:.0f}", end="")
    print(f" ± {(0.09 * count) ** 0.5:.0f}")


def squared_distances(scatter: Float[Array, "sets 3"], covariance: Float[Array, "3 3"]) -> Float[Array, " sets"]:
    """From the truth, in units of the covariance."""
    return jnp.einsum("si,ij,sj->s", scatter - TRUTH, jnp.linalg.inv(covariance), scatter - TRUTH)


def plot_fit(axes: Any, data: Observations, fitted: Rates) -> None:
    before, after = (solved(rates, GRID).ys / SIZES for rates in (START, fitted))
    for species, color, name in ((0, BLUE, "A"), (1, ORANGE, "B / 4e-5"), (2, GREEN, "C")):
        axes.semilogx(GRID, before[:, species], color=color, linewidth=0.9, linestyle=":")
        axes.semilogx(GRID, after[:, species], color=color, label=name)
        axes.semilogx(TIMES, data[:, species], "o", color=color, markersize=3)
    axes.set(xlabel="t", ylabel="concentration", title="The fit (dotted: where it starts)")
    axes.set_ylim(top=1.3)
    axes.legend(loc="upper left", ncols=3)


def plot_ellipse(axes: Any, pair: tuple[int, int], covariance: Array, scatter: Array, fitted: Rates) -> None:
    """Refits around the truth, with the 90 % ellipse of the covariance at one fit, moved to the truth; rates in parts of
    the true ones."""
    i, j = pair
    values, vectors = jnp.linalg.eigh(covariance[jnp.ix_(jnp.array(pair), jnp.array(pair))])
    angles = jnp.linspace(0, 2 * jnp.pi, 200)
    circle = jnp.sqrt(NINETY[2]) * jnp.stack([jnp.cos(angles), jnp.sin(angles)])
    x, y = jnp.exp(vectors @ (jnp.sqrt(values)[:, None] * circle))
    axes.plot(*jnp.exp((scatter - TRUTH)[:, pair]).T, ".", color="#9ecae1", markersize=4, label="fits to fresh noise")
    axes.plot(x, y, color=BLUE, label="90 % by (JᵀJ)⁻¹")
    axes.plot(1.0, 1.0, "+", color="black", markersize=9, label="truth")
    axes.plot(*jnp.exp((fitted - TRUTH)[jnp.array(pair)]), "o", color=ORANGE, markersize=5, label="the fit")
    axes.set(xlabel=f"{NAMES[i]} / true {NAMES[i]}", ylabel=f"{NAMES[j]} / true {NAMES[j]}")


def main() -> None:
    arguments = parse_arguments("Estimate the rates of a stiff reaction mechanism.")
    plt.rcParams.update(STYLE)
    sets = observed(100 if arguments.short else 1000)
    every = fits(sets)
    fit = jax.tree.map(lambda leaf: leaf[0], every)
    covariance, scatter = jnp.linalg.inv(fit.best.normal), every.best.at[1:]
    report(fit, covariance, scatter)

    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.0))
    plot_fit(axes[0], sets[0], fit.best.at)
    for axis, pair in zip(axes[1:], ((0, 1), (1, 2)), strict=True):
        plot_ellipse(axis, pair, covariance, scatter, fit.best.at)
    axes[1].set_title("How well the data determine the rates")
    axes[2].legend(loc="upper left", fontsize=8)
    path: Path = arguments.output / "kinetics.png"
    figure.savefig(path)
    print(f"\nplot: {path}")


if __name__ == "__main__":
    main()
