"""Swing up a pendulum by a torque that is too weak to lift it: optimal control by the adjoint method.

The pendulum, angle'' = -sin(angle) - friction angle' + torque(t), hangs at rest at t = 0 and is to stand upright at rest at
T. The torque is at most 0.4, gravity's up to 1, so it has to swing to and fro first. Minimised is

    J = integral of torque(t)^2 dt  +  10 ((angle(T) - pi)^2 + velocity(T)^2),

a Lagrangian (`running_cost`) and a terminal cost. The control is piecewise linear on 48 intervals, each of them a few steps
of RK4, so that no step crosses a kink. Adam, projected onto the torque limits, follows the gradient by one adjoint method.

Two things that the optimiser does not know of are checked at the end. By Pontryagin's maximum principle the optimal torque
is -p(t) / 2, clipped to its limits, with the costate p from its own equation, which is written by hand here and solved
backward in time: the two torques agree, and the Hamiltonian is nearly constant. And the work of the torque is the change of
mechanical energy plus the heat of friction.

    python examples/pendulum.py                      # about half a minute
    python examples/pendulum.py --short              # fewer steps
    python examples/pendulum.py --adjoint Backsolve  # or Discrete, Interpolating, Gauss, Reversible
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import BLUE, GREEN, GREY, STYLE, parse_arguments, train
from jaxtyping import Array, Float

import adjoint_jax as aj

jax.config.update("jax_enable_x64", True)

LINES = (-0.8, -0.4, 0.0, 0.5, 1.8, 2.7)
LIMIT, FRICTION, T, INTERVALS, WEIGHT = 0.4, 0.1, 14.0, 48, 10.0
STEPS = aj.FixedSteps(4 * INTERVALS)
ADJOINTS = {
    "Discrete": aj.DiscreteAdjoint(),
    "Interpolating": aj.InterpolatingAdjoint(),
    "Gauss": aj.GaussAdjoint(),
    "Backsolve": aj.BacksolveAdjoint(),
    "Reversible": aj.ReversibleAdjoint(),
}

Knots = Float[Array, "knots"]


class Integrals(NamedTuple):
    """Over the whole swing: of torque^2, and of the powers of torque and friction."""

    effort: Float[Array, ""]
    work: Float[Array, ""]
    heat: Float[Array, ""]


class Swing(NamedTuple):
    """A trajectory and the costate of Pontryagin's principle along it, at some times."""

    ts: Float[Array, " times"]
    ys: Float[Array, "times 2"]
    torques: Float[Array, " times"]
    costates: Float[Array, "times 2"]

    @property
    def optimal_torques(self) -> Float[Array, " times"]:
        """What minimises the Hamiltonian torque^2 + costate . dy/dt."""
        return jnp.clip(-self.costates[:, 1] / 2, -LIMIT, LIMIT)

    @property
    def hamiltonians(self) -> Float[Array, " times"]:
        flow = jnp.stack(motion(self.ys.T, self.torques), axis=-1)
        return self.torques**2 + jnp.sum(self.costates * flow, axis=-1)


class Progress(NamedTuple):
    """J at every step of the optimiser, and the size of the projected gradient at some."""

    costs: np.ndarray
    steps: list[int]
    gradients: list[float]


def torque(t: Float[Array, ""], knots: Knots) -> Float[Array, ""]:
    """Linear between the knots. (The index is computed, not searched for as by `jnp.interp`.)"""
    place = t / T * INTERVALS
    index = jnp.clip(place.astype(int), 0, INTERVALS - 1)
    return knots[index] + (place - index) * (knots[index + 1] - knots[index])


def motion(y: Any, torque: Array) -> tuple[Array, Array]:
    angle, velocity = y
    return velocity, -jnp.sin(angle) - FRICTION * velocity + torque


def pendulum(t: Float[Array, ""], y: Float[Array, "2"], knots: Knots) -> Float[Array, "2"]:
    return jnp.stack(motion(y, torque(t, knots)))


def powers(t: Float[Array, ""], y: Float[Array, "2"], knots: Knots) -> Integrals:
    return Integrals(torque(t, knots) ** 2, torque(t, knots) * y[1], FRICTION * y[1] ** 2)


def swing(knots: Knots, adjoint: Any, **options: Any) -> aj.Solution:
    solver = aj.Reversible(aj.RK4()) if isinstance(adjoint, aj.ReversibleAdjoint) else aj.RK4()
    options |= {"solver": solver, "controller": STEPS, "adjoint": adjoint}
    return aj.solve(pendulum, 0.0, T, jnp.zeros(2), knots, running_cost=powers, **options)


def terminal_cost(y: Float[Array, "2"]) -> Float[Array, ""]:
    return WEIGHT * jnp.sum((y - jnp.array([jnp.pi, 0.0])) ** 2)


def total_cost(knots: Knots, adjoint: Any) -> Float[Array, ""]:
    solution = swing(knots, adjoint)
    return solution.cost.effort + terminal_cost(solution.ys[-1])


def within_limits() -> optax.GradientTransformation:
    """Cuts an update short where it would leave the limits of the torque."""

    def update(updates: Knots, state: Any, knots: Knots) -> tuple[Knots, Any]:
        return jnp.clip(knots + updates, -LIMIT, LIMIT) - knots, state

    return optax.GradientTransformation(lambda knots: optax.EmptyState(), update)


def optimise(adjoint: Any, steps: int) -> tuple[Knots, Progress]:
    """From a small nudge at the pendulum's own frequency."""

    @jax.jit
    def projected_gradient(knots: Knots) -> Float[Array, ""]:
        """Zero at the optimum within the limits."""
        gradient = jax.grad(total_cost)(knots, adjoint)
        return jnp.linalg.norm(knots - jnp.clip(knots - gradient, -LIMIT, LIMIT))

    def record(step: int, knots: Knots) -> None:
        progress.steps.append(step)
        progress.gradients.append(float(projected_gradient(knots)))

    start = 0.1 * jnp.sin(jnp.linspace(0.0, T, INTERVALS + 1))
    progress = Progress(np.zeros(0), [], [])
    record(0, start)
    optimizer = optax.chain(optax.adam(optax.cosine_decay_schedule(1e-2, steps, alpha=0.1), eps=1e-1), within_limits())
    knots, costs = train(lambda k, _: total_cost(k, adjoint), start, optimizer, steps, label="torque", after_chunk=record)
    return knots, progress._replace(costs=costs)


def with_costate(knots: Knots) -> Swing:
    """The swing, and the costate: its equation is written by hand, and solved from T to 0 along the dense output."""
    solution = swing(knots, aj.DiscreteAdjoint(), saveat=aj.SaveAt(dense=True))
    ts = jnp.linspace(0.0, T, 8 * INTERVALS + 1)
    ys = solution.evaluate(ts)

    def costate(t: Float[Array, ""], p: Float[Array, "2"], args: Any) -> Float[Array, "2"]:
        return jnp.stack([p[1] * jnp.cos(solution.evaluate(t)[0]), FRICTION * p[1] - p[0]])

    backward = aj.odeint(costate, jax.grad(terminal_cost)(ys[-1]), ts[::-1], rtol=1e-8, atol=1e-8)
    return Swing(ts, ys, jax.vmap(torque, (0, None))(ts, knots), backward[::-1])


def energy(y: Float[Array, "2"]) -> Float[Array, ""]:
    return y[1] ** 2 / 2 - jnp.cos(y[0])


def report(knots: Knots, swung: Swing, progress: Progress, adjoint: Any) -> None:
    solution = swing(knots, adjoint)
    y, integrals = solution.ys[-1], solution.cost
    gained = energy(y) - energy(jnp.zeros(2))
    difference = jnp.sqrt(jnp.mean((swung.torques - swung.optimal_torques) ** 2))
    hamiltonians = swung.hamiltonians
    print(f"J                     {progress.costs[0]:.4f} -> {total_cost(knots, adjoint):.6f}")
    print(f"  of which effort     {integrals.effort:.6f}, end {terminal_cost(y):.6f}")
    print(f"projected gradient    {progress.gradients[0]:.2e} -> {progress.gradients[-1]:.2e}")
    print(f"end                   angle pi {y[0] - jnp.pi:+.4f}, velocity {y[1]:+.4f}")
    print(f"largest torque        {jnp.max(jnp.abs(swung.torques)):.4f} of at most {LIMIT}")
    print(f"Pontryagin's torque   differs by {difference:.4f} (root mean square over time)")
    print(f"Hamiltonian           {jnp.mean(hamiltonians):.4f} +- {jnp.std(hamiltonians):.4f} over time")
    print(f"work                  {integrals.work:.8f} = {gained:.8f} energy + {integrals.heat:.8f} heat", end="")
    print(f"; difference {integrals.work - gained - integrals.heat:.1e}")


def plot_time_series(axes: Any, swung: Swing) -> None:
    upper, middle, lower = axes
    for y, target, axis, name in ((0, np.pi, upper, "angle"), (1, 0.0, middle, "velocity")):
        axis.axhline(target, color=GREY, linewidth=0.8, linestyle=":")
        axis.plot(swung.ts, swung.ys[:, y], color=BLUE)
        axis.set(ylabel=name, xticklabels=[])
    upper.set(yticks=[-np.pi, 0, np.pi], yticklabels=["-π", "0", "π"], title="The swing")
    for limit in (-LIMIT, LIMIT):
        lower.axhline(limit, color=GREY, linewidth=0.8, linestyle=":")
    lower.plot(swung.ts, swung.optimal_torques, color="#f0b48c", linewidth=4, label="Pontryagin's, from the costate")
    lower.plot(swung.ts, swung.torques, color=BLUE, label="found by its gradient")
    lower.set(ylabel="torque", xlabel="t", ylim=(-1.2 * LIMIT, 1.9 * LIMIT))
    lower.legend(loc="upper center", ncols=2, borderaxespad=0.0, fontsize=8, columnspacing=1.0)


def plot_phases(axes: Any, swung: Swing) -> None:
    """Angle against velocity, over the lines of constant energy; the separatrix leads to the upright position."""
    angles, velocities = np.meshgrid(np.linspace(-4.2, 4.2, 200), np.linspace(-2.7, 2.7, 200))
    levels = velocities**2 / 2 - np.cos(angles)
    axes.contour(angles, velocities, levels, levels=LINES, colors="#d8d8d8", linewidths=0.8, linestyles="-")
    axes.contour(angles, velocities, levels, levels=[1.0], colors=GREY, linewidths=1.0, linestyles="--")
    colored = axes.scatter(swung.ys[:, 0], swung.ys[:, 1], c=swung.torques, cmap="coolwarm", s=7, zorder=3)
    axes.plot(0, 0, "o", color="black", fillstyle="none", zorder=4)
    axes.plot(np.pi, 0, "o", color="black", zorder=4)
    axes.annotate("start", (0, 0), xytext=(6, 5), textcoords="offset points")
    axes.annotate("upright", (np.pi, 0), xytext=(-36, -14), textcoords="offset points")
    axes.annotate("separatrix", (-1.9, 2 * np.cos(0.95)), xytext=(-38, 12), textcoords="offset points", color=GREY)
    axes.set(xlabel="angle", ylabel="velocity", xticks=[-np.pi, 0, np.pi], xticklabels=["-π", "0", "π"])
    axes.set_title("Phase portrait, over lines of constant energy")
    axes.grid(False)
    plt.colorbar(colored, ax=axes, label="torque", shrink=0.8)


def plot_progress(axes: Any, progress: Progress) -> None:
    costs = progress.costs[:-1]
    axes.semilogy(np.arange(len(costs)), np.maximum(costs - costs.min(), 1e-9), color=BLUE, label="J - least J")
    axes.semilogy(progress.steps, progress.gradients, color=GREEN, label="projected gradient")
    axes.set(xlabel="optimiser's step", title="Convergence")
    axes.legend()


def plot(swung: Swing, progress: Progress, path: Path) -> None:
    figure = plt.figure(figsize=(13, 4.6))
    layout = figure.add_gridspec(3, 3, width_ratios=[1.1, 1.1, 0.8])
    plot_time_series([figure.add_subplot(layout[row, 0]) for row in range(3)], swung)
    plot_phases(figure.add_subplot(layout[:, 1]), swung)
    plot_progress(figure.add_subplot(layout[:, 2]), progress)
    figure.savefig(path)


def main() -> None:
    arguments = parse_arguments("Swing up a pendulum by the least torque.", list(ADJOINTS))
    plt.rcParams.update(STYLE)
    adjoint = ADJOINTS[arguments.adjoint]
    knots, progress = optimise(adjoint, steps=1000 if arguments.short else 6000)
    swung = with_costate(knots)
    report(knots, swung, progress, adjoint)
    path = arguments.output / "pendulum.png"
    plot(swung, progress, path)
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
