"""Learn a sine from ten points: dy/dt = network(y), where the kind of gradient is one argument of `odeint`.

The trajectory (sin t, cos t) is sampled at ten times; a 2-16-2 tanh network is the vector field, and RK4 takes one step
from each time to the next. The network is trained twice, with the gradient of the computed solution (`DiscreteAdjoint`)
and with the continuous adjoint of Chen et al. (2018), which integrates the state backward in time instead of
remembering it (`BacksolveAdjoint`).

    python examples/sine_fit.py            # about 15 s
    python examples/sine_fit.py --short    # fewer steps
"""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import BLUE, GREY, ORANGE, STYLE, parse_arguments, train
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

import adjoint_jax as aj

TIMES = jnp.linspace(0.0, 2 * jnp.pi, 10)
ADJOINTS = {
    "DiscreteAdjoint": aj.DiscreteAdjoint(),
    "BacksolveAdjoint": aj.BacksolveAdjoint(),
}
COLORS = {"DiscreteAdjoint": BLUE, "BacksolveAdjoint": ORANGE}


class Network(eqx.Module):
    """A 2-16-2 tanh network as a vector field."""

    mlp: eqx.nn.MLP

    def __init__(self, key: Array):
        self.mlp = eqx.nn.MLP(2, 2, width_size=16, depth=1, activation=jnp.tanh, key=key)

    def __call__(self, t: Float[Array, ""], y: Float[Array, "2"], args: Any) -> Float[Array, "2"]:
        return self.mlp(y)


def circle(ts: Float[Array, " times"]) -> Float[Array, "times 2"]:
    """What is to be learned."""
    return jnp.stack([jnp.sin(ts), jnp.cos(ts)], axis=-1)


def mean_squared_error(network: Network, adjoint: Any) -> Float[Array, ""]:
    """The loss. Replacing the adjoint replaces one argument; everything else stays."""
    ys = aj.odeint(network, circle(TIMES)[0], TIMES, solver=aj.RK4(), controller=aj.StepTo(TIMES), adjoint=adjoint)
    return jnp.mean((ys - circle(TIMES)) ** 2)


def compare_gradients(network: Network, label: str) -> None:
    """Print how far the two gradients of the same loss are apart."""
    gradients = [
        ravel_pytree(eqx.filter_jit(eqx.filter_grad(mean_squared_error))(network, adjoint))[0]
        for adjoint in ADJOINTS.values()
    ]
    exact, continuous = gradients
    difference = jnp.linalg.norm(continuous - exact) / jnp.linalg.norm(exact)
    print(f"{label:>18}: |gradient| = {jnp.linalg.norm(exact):.3e}, relative difference of the two = {difference:.1e}")


def plot(losses: dict[str, np.ndarray], networks: dict[str, Network], path: Path) -> None:
    """Loss curves, and both fits over the sampled interval and one more period."""
    ts = jnp.linspace(0.0, 4 * jnp.pi, 200)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=[1, 1.5])
    right.axvspan(2 * np.pi, 4 * np.pi, color="#f3f3f3", zorder=0)
    right.text(3 * np.pi, 1.27, "not in the data", ha="center", color=GREY)
    right.plot(ts, jnp.sin(ts), color="#c4c4c4", linewidth=5, label="sin t")
    styles = {"DiscreteAdjoint": "-", "BacksolveAdjoint": (0, (4, 3))}
    for name, values in losses.items():
        left.semilogy(np.arange(1, len(values) + 1), values, color=COLORS[name], linestyle=styles[name], label=name)
        ys = aj.odeint(networks[name], circle(TIMES)[0], ts)
        right.plot(ts, ys[:, 0], color=COLORS[name], linestyle=styles[name], label=f"network, {name}")
    left.set(xlabel="training step", ylabel="mean squared error", title="Training")
    left.legend()
    right.plot(TIMES, jnp.sin(TIMES), "o", color="black", markersize=4.5, label="the ten samples")
    right.set(xlabel="t", ylabel="first component of y", ylim=(-1.35, 1.5), title="Fit")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path)


def main() -> None:
    arguments = parse_arguments("Learn a sine from ten points with two kinds of adjoint.")
    plt.rcParams.update(STYLE)
    steps = 300 if arguments.short else 3000
    initial = Network(jax.random.key(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps, alpha=0.02))
    compare_gradients(initial, "before training")
    losses, networks = {}, {}
    for name, adjoint in ADJOINTS.items():
        networks[name], losses[name] = train(
            lambda network, step, adjoint=adjoint: mean_squared_error(network, adjoint),
            initial,
            optimizer,
            steps,
            label=name,
            every=100,
        )
    compare_gradients(networks["DiscreteAdjoint"], "after training")
    for name, values in losses.items():
        print(f"{name:>18}: mean squared error {values[0]:.3f} before, {values[-1]:.2e} after {steps} steps")
    path = arguments.output / "sine_fit.png"
    plot(losses, networks, path)
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
