"""Classify handwritten digits with an ODE network, and measure what its gradient costs.

Scikit-learn's 1,797 real digits of 8 x 8 pixels: a strided convolution to 4 x 4 x 32 features, an ODE block in place of
a stack of residual layers, a linear readout. The network is trained with the gradient of the computed solution
(`DiscreteAdjoint`) and with the continuous adjoint (`BacksolveAdjoint`), from the same weights and in the same order of
samples. The architecture was chosen with an eye on the same test images, so their accuracy is a little optimistic.

Then the memory and time of the ODE block's gradient, for a growing number of steps of RK4, beside plain reverse-mode
differentiation of the same loop. Memory is the scratch memory that XLA plans for the compiled gradient.

    python examples/digits.py            # a few minutes on two cores
    python examples/digits.py --short    # a few training steps, one size
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import BLUE, GREEN, ORANGE, RED, STYLE, parse_arguments, train
from jaxtyping import Array, Float, Int
from matplotlib.ticker import LogLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import adjoint_jax as aj

CHANNELS, WIDTH = 32, 128
FEATURES = 4 * 4 * CHANNELS
BATCH = 128
MEASURED_BATCH = 32
"""Images in the ODE block whose gradient is measured."""
EVALUATIONS = 16
"""How often the test accuracy is computed during training."""
ADJOINTS = {"DiscreteAdjoint": aj.DiscreteAdjoint(), "BacksolveAdjoint": aj.BacksolveAdjoint()}
COLORS = {"plain autodiff": GREEN, "DiscreteAdjoint": BLUE, "BacksolveAdjoint": ORANGE}
LINES = {"DiscreteAdjoint": "-", "BacksolveAdjoint": (0, (4, 3))}
MARKERS = {"plain autodiff": "^", "DiscreteAdjoint": "o", "BacksolveAdjoint": "s"}


class Digits(NamedTuple):
    """Images with values in [0, 1], and what they show."""

    images: Float[Array, "samples 8 8"]
    labels: Int[Array, " samples"]


class Layer(eqx.Module):
    """The vector field of a batch of feature vectors: a tanh network of one hidden layer that also sees the time."""

    inner: eqx.nn.Linear
    outer: eqx.nn.Linear

    def __init__(self, key: Array):
        keys = jax.random.split(key)
        self.inner = eqx.nn.Linear(FEATURES + 1, WIDTH, key=keys[0])
        self.outer = eqx.nn.Linear(WIDTH, FEATURES, key=keys[1])

    def __call__(self, t: Float[Array, ""], y: Float[Array, "batch c"], args: Any) -> Float[Array, "batch c"]:
        with_time = jnp.concatenate([y, jnp.full((len(y), 1), t, y.dtype)], axis=1)
        return jax.vmap(self.outer)(jnp.tanh(jax.vmap(self.inner)(with_time)))


class Classifier(eqx.Module):
    """8 x 8 pixels -> 4 x 4 x 32 features -> ODE from t = 0 to 1 -> ten logits."""

    stem: eqx.nn.Linear
    field: Layer
    readout: eqx.nn.Linear
    adjoint: Any = eqx.field(static=True)

    def __init__(self, adjoint: Any, key: Array):
        keys = jax.random.split(key, 3)
        self.stem = eqx.nn.Linear(9, CHANNELS, key=keys[0])
        self.field = Layer(keys[1])
        self.readout = eqx.nn.Linear(FEATURES, 10, key=keys[2])
        self.adjoint = adjoint

    def features(self, images: Float[Array, "batch 8 8"]) -> Float[Array, "batch c"]:
        """A 3 x 3 convolution of stride 2, as a matrix product: XLA's own convolution is slow inside of loops on CPUs."""
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1)))
        patches = jnp.stack([padded[:, i : i + 8 : 2, j : j + 8 : 2] for i in range(3) for j in range(3)], axis=-1)
        return jax.nn.gelu(patches @ self.stem.weight.T + self.stem.bias).reshape(len(images), FEATURES)

    def __call__(self, images: Float[Array, "batch 8 8"]) -> Float[Array, "batch 10"]:
        controller = aj.PIDController(rtol=1e-3, atol=1e-3)
        start = self.features(images)
        solution = aj.solve(self.field, 0.0, 1.0, start, controller=controller, adjoint=self.adjoint, max_steps=256)
        return jax.vmap(self.readout)(solution.ys[-1])


def load() -> tuple[Digits, Digits]:
    """A fixed split, with the same proportions of digits in both parts: 1,437 for training, 360 for the test."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    parts = train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


def fit(adjoint: Any, digits: Digits, test: Digits, steps: int, label: str) -> tuple[Classifier, list[float]]:
    """Train a classifier, with noise on images and labels; returns it, and its test accuracy at regular intervals."""

    def loss(model: Classifier, step: Int[Array, ""]) -> Float[Array, ""]:
        key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
        chosen = jax.random.choice(key, len(digits.labels), (BATCH,))
        noise = 0.1 * jax.random.normal(noise_key, (BATCH, 8, 8))
        targets = optax.smooth_labels(jax.nn.one_hot(digits.labels[chosen], 10), 0.1)
        return jnp.mean(optax.softmax_cross_entropy(model(digits.images[chosen] + noise), targets))

    accuracies = []
    accuracy = eqx.filter_jit(lambda model: jnp.mean(jnp.argmax(model(test.images), axis=1) == test.labels))
    model, _ = train(
        loss,
        Classifier(adjoint, jax.random.key(0)),
        optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-2),
        steps,
        label=label,
        every=steps // EVALUATIONS,
        after_chunk=lambda step, model: accuracies.append(float(accuracy(model))),
    )
    return model, accuracies


def plain_autodiff(field: Layer, y: Float[Array, "batch c"], steps: int) -> Float[Array, "batch c"]:
    """Classical Runge-Kutta as a loop that JAX differentiates by itself, remembering every stage of every step."""
    h = 1.0 / steps

    def step(y: Array, index: Array) -> tuple[Array, None]:
        t = index * h
        k1 = field(t, y, None)
        k2 = field(t + h / 2, y + h / 2 * k1, None)
        k3 = field(t + h / 2, y + h / 2 * k2, None)
        k4 = field(t + h, y + h * k3, None)
        return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    return jax.lax.scan(step, y, jnp.arange(steps))[0]


class Cost(NamedTuple):
    """Of one gradient of the ODE block: the way it is computed, steps of RK4, memory, time, relative error."""

    method: str
    steps: int
    mebibytes: float
    milliseconds: float
    error: float


def gradient_costs(field: Layer, features: Float[Array, "batch c"], numbers: list[int]) -> list[Cost]:
    """Memory and time of the gradient, and its distance from plain autodiff's, for each method and number of steps."""

    def end(field: Layer, y: Array, method: str, steps: int) -> Array:
        if method == "plain autodiff":
            return plain_autodiff(field, y, steps)
        grid = aj.FixedSteps(steps)
        return aj.solve(field, 0.0, 1.0, y, solver=aj.RK4(), controller=grid, adjoint=ADJOINTS[method]).ys[-1]

    arrays, static = eqx.partition(field, eqx.is_array)
    costs = []
    with tqdm(total=len(numbers) * len(COLORS), desc="gradient costs", unit="case") as bar:
        for steps in numbers:
            for method in COLORS:

                def loss(arrays: Any, y: Array, method: str = method, steps: int = steps) -> Array:
                    return jnp.mean(end(eqx.combine(arrays, static), y, method, steps) ** 2)

                compiled = jax.jit(jax.grad(loss)).lower(arrays, features).compile()
                memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
                gradient = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(compiled(arrays, features))])
                exact = gradient if method == "plain autodiff" else exact
                error = float(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))
                costs.append(Cost(method, steps, memory, median_milliseconds(compiled, arrays, features), error))
                bar.update()
    return costs


def median_milliseconds(function: Any, *arguments: Any, repetitions: int = 5) -> float:
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def print_costs(costs: list[Cost]) -> None:
    print(f"\nGradient of the ODE block, {MEASURED_BATCH} images, RK4")
    print(f"{'':>18}   steps   memory (MiB)   time (ms)   relative difference")
    for cost in costs:
        print(f"{cost.method:>18} {cost.steps:8} {cost.mebibytes:14.2f} {cost.milliseconds:11.1f} {cost.error:21.1e}")


def plot_accuracies(axes: Any, accuracies: dict[str, list[float]], steps: int) -> None:
    done = steps // EVALUATIONS * np.arange(1, EVALUATIONS + 1)
    for name, values in accuracies.items():
        axes.plot(
            done,
            100 * np.asarray(values),
            color=COLORS[name],
            linestyle=LINES[name],
            marker=MARKERS[name],
            ms=3,
            label=name,
        )
    best = max(max(values) for values in accuracies.values())
    axes.set(xlabel="training step", ylabel="test accuracy (%)", title="Training", ylim=(min(90, 80 * best), 100))
    axes.legend(loc="lower right")


def plot_costs(axes: Any, costs: list[Cost], quantity: str, ylabel: str, title: str) -> None:
    for method, color in COLORS.items():
        chosen = [cost for cost in costs if cost.method == method]
        values = [getattr(cost, quantity) for cost in chosen]
        axes.loglog([cost.steps for cost in chosen], values, color=color, marker=MARKERS[method], label=method)
    numbers = sorted({cost.steps for cost in costs})
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set(xlabel="steps of RK4", ylabel=ylabel, title=title)
    axes.legend()


def plot_digits(figure: Any, model: Classifier, test: Digits) -> None:
    """Two rows of test images: the first ones, and those that the network is wrong or least sure about."""
    probabilities = np.asarray(jax.nn.softmax(eqx.filter_jit(model)(test.images)))
    labels = np.asarray(test.labels)
    hardest = np.argsort(probabilities[np.arange(len(labels)), labels])[:14]
    for row, chosen in zip(figure.subplots(2, 14), (np.arange(14), hardest), strict=True):
        for axes, index in zip(row, chosen, strict=True):
            guess = int(np.argmax(probabilities[index]))
            right = guess == labels[index]
            axes.imshow(1 - np.asarray(test.images[index]), cmap="gray", vmin=0, vmax=1)
            text = f"{guess}" if right else f"{guess}, is {labels[index]}"
            axes.set_title(text, fontsize=8.5, loc="center", color="black" if right else RED, pad=3)
            axes.set_axis_off()
    figure.suptitle(
        "Test images with predictions: the first fourteen, and the fourteen hardest", x=0.01, ha="left", fontsize=10.5
    )


def plot(
    accuracies: dict[str, list[float]], steps: int, costs: list[Cost], model: Classifier, test: Digits, path: Path
) -> None:
    figure = plt.figure(figsize=(11.5, 5.9))
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.75, 1])
    left, middle, right = upper.subplots(1, 3)
    plot_accuracies(left, accuracies, steps)
    plot_costs(middle, costs, "mebibytes", "MiB", "Memory of the ODE block's gradient")
    plot_costs(right, costs, "milliseconds", "ms", "Time of the ODE block's gradient")
    plot_digits(lower, model, test)
    figure.savefig(path)


def main() -> None:
    arguments = parse_arguments("Classify handwritten digits with an ODE network.")
    plt.rcParams.update(STYLE)
    steps, numbers = (EVALUATIONS, [10]) if arguments.short else (400, [10, 50, 200])
    digits, test = load()
    models, accuracies = {}, {}
    for name, adjoint in ADJOINTS.items():
        models[name], accuracies[name] = fit(adjoint, digits, test, steps, name)
    for name, values in accuracies.items():
        print(f"{name:>18}: {100 * values[-1]:.2f} % of {len(test.labels)} test images are right after {steps} steps")

    model = models["DiscreteAdjoint"]
    costs = gradient_costs(model.field, model.features(digits.images[:MEASURED_BATCH]), numbers)
    print_costs(costs)
    path = arguments.output / "digits.png"
    plot(accuracies, steps, costs, model, test, path)
    print(f"\nplot: {path}")
    if not arguments.short:
        assert min(values[-1] for values in accuracies.values()) >= 0.97, "a test accuracy is below 97 %"


if __name__ == "__main__":
    main()
