"""What is solved: initial value problems written once, for every library, with a loss whose gradient is wanted."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from tests import stiff_problems

Field = Callable[[Any, Any, Any], Any]
"""field(t, y, parameters) -> dy/dt, of one lane, in arrays of one library."""


class Equation(Protocol):
    """A right-hand side that every array library can evaluate."""

    def field(self, xp: ModuleType) -> Field:
        """The field with the functions of jax.numpy, numpy or torch; leading axes of y and parameters are lanes."""
        ...


class Components(NamedTuple):
    """A right-hand side written in scalars: of(t, y, parameters) -> the components of dy/dt, by arithmetic alone."""

    of: Callable[[Any, Sequence[Any], Sequence[Any]], tuple[Any, ...]]

    def field(self, xp: ModuleType) -> Field:
        return lambda t, y, p: xp.stack(self.of(t, unstacked(y), unstacked(p)), -1)


def unstacked(array: Any) -> list[Any]:
    """The components along the last axis."""
    return [array[..., i] for i in range(array.shape[-1])]


class Tensors(NamedTuple):
    """A right-hand side written in arrays: of(xp, t, y, parameters) -> dy/dt."""

    of: Callable[[ModuleType, Any, Any, Any], Any]

    def field(self, xp: ModuleType) -> Field:
        return lambda t, y, p: self.of(xp, t, y, p)


@dataclasses.dataclass(frozen=True)
class Problem:
    """dy/dt = equation(t, y, parameters), y(t0) = y0, saved at `ts`, or at t1 alone without them.

    The loss is the mean square of what is saved, or its sum with `weights`, its gradient that with respect to the
    parameters. With `lanes`, so many solves from the same y0, whose parameters have a leading axis; every lane has its own
    loss, step sizes and gradient. With more `devices` than one, each has its share of them.

    - `reference`: the name of its stored reference; problems that differ in the number of steps or of lanes share one.
    - `steps`: the number of steps of a fixed grid; none for adaptive steps.
    - `max_steps`: what every library is told is the largest number of steps.
    - `scale`: values that are smaller do not matter: the absolute tolerance is the relative one times this.
    - `bound`: a tight bound on the steps at every tolerance at which the problem is solved here. Peers whose memory or time
      depends on it are given it in their tuned settings; ours where its name says so.
    """

    reference: str
    equation: Equation
    parameters: Any
    y0: np.ndarray
    t0: float
    t1: float
    ts: np.ndarray | None = None
    lanes: int | None = None
    devices: int = 1
    steps: int | None = None
    max_steps: int = 4096
    bound: int = 4096
    scale: float = 1.0
    weights: np.ndarray | None = None

    @property
    def dtype(self) -> np.dtype:
        return self.y0.dtype

    @property
    def times(self) -> np.ndarray:
        """t0 and the times at which something is saved, for libraries that know no others."""
        return np.array([self.t0, self.t1], self.dtype) if self.ts is None else self.ts


SAVE_TIMES = ((1.0, 2), (1.0, 1000), (100.0, 2), (100.0, 5))
"""Ends and numbers of save times: few and many, within few steps and over many."""
RING_SIZES = (256, 4096, 65536)
WIDTHS = (64, 256, 1024)
SMALL, LARGE, DEEP = ((16, 64, 64, 16), 128), ((64, 512, 512, 64), 256), ((32, 128, 128, 32), 64)
NETWORKS = (SMALL, LARGE, DEEP, *(((16, width, width, 16), None) for width in WIDTHS))
"""Layers and batches of the networks."""
RESIDUAL = (32, 32, 64)
"""Layers, width and batch of the deep field."""
RANDOM_LANES = 10_000
"""Lanes of a problem are the first of so many random ones, whatever their number."""


def lotka_volterra(lanes: int | None = None, devices: int = 1) -> Problem:
    """Lotka and Volterra's equations: two states, four parameters, 100 save times, float64."""
    parameters, ts = np.array([1.5, 1.0, 3.0, 1.0]), np.linspace(0.0, 10.0, 100)
    if lanes is not None:
        parameters = (parameters * _random().uniform(0.9, 1.1, size=(RANDOM_LANES, 4)))[:lanes]
    name = "lotka-volterra" if lanes is None else "lotka-volterra-lanes"
    bound = 640 if lanes is None else 256
    return Problem(name, Components(predator_prey), parameters, np.ones(2), 0.0, 10.0, ts, lanes, devices, bound=bound)


def predator_prey(t: Any, y: Sequence[Any], p: Sequence[Any]) -> tuple[Any, ...]:
    del t
    (hare, lynx), (a, b, c, d) = y, p
    return a * hare - b * hare * lynx, -c * lynx + d * hare * lynx


def save_times(end: float, count: int, lanes: int | None) -> Problem:
    """Lotka-Volterra to a given time, saved so many times."""
    problem = lotka_volterra(lanes)
    name = f"saves-{count}-to-{end:g}" + ("" if lanes is None else "-lanes")
    return dataclasses.replace(problem, reference=name, t1=end, ts=np.linspace(0.0, end, count), bound=2048)


def lorenz(lanes: int, dtype: type[np.floating[Any]]) -> Problem:
    """Lorenz's equations to t = 1, every lane with its own sigma, rho and beta."""
    spread = _random().uniform(0.9, 1.1, size=(RANDOM_LANES, 3))
    parameters = (np.array([10.0, 28.0, 8 / 3]) * spread)[:lanes].astype(np.float32).astype(dtype)
    y0 = np.array([1.0, 0.0, 0.0], dtype)
    return Problem("lorenz", Components(convection), parameters, y0, 0.0, 1.0, lanes=lanes, bound=64)


def convection(t: Any, y: Sequence[Any], p: Sequence[Any]) -> tuple[Any, ...]:
    del t
    (x, y, z), (sigma, rho, beta) = y, p
    return sigma * (y - x), x * (rho - z) - y, x * y - beta * z


def van_der_pol(lanes: int) -> Problem:
    """Van der Pol's oscillator to t = 20, with mu log-uniform in [0.1, 50]: some need many times the steps of others."""
    mu = np.exp(_random().uniform(np.log(0.1), np.log(50.0), size=(RANDOM_LANES, 1)))[:lanes]
    y0 = np.array([2.0, 0.0])
    return Problem("van-der-pol", Components(relaxation), mu, y0, 0.0, 20.0, lanes=lanes, bound=1024)


def relaxation(t: Any, y: Sequence[Any], p: Sequence[Any]) -> tuple[Any, ...]:
    del t
    (x, v), (mu,) = y, p
    return v, mu * (1 - x * x) * v - x


def duffing(steps: int) -> Problem:
    """An undamped Duffing oscillator, x'' = -a x - b x^3, to t = 100, float64, on a fixed grid."""
    equation, parameters = Components(stiffening_spring), np.array([1.0, 0.5])
    return Problem("duffing", equation, parameters, np.array([1.0, 0.0]), 0.0, 100.0, steps=steps, max_steps=steps)


def stiffening_spring(t: Any, y: Sequence[Any], p: Sequence[Any]) -> tuple[Any, ...]:
    del t
    (x, v), (a, b) = y, p
    return v, -a * x - b * x * x * x


def network(sizes: tuple[int, ...], batch: int | None, steps: int | None = None) -> Problem:
    """A neural ODE to t = 1: a tanh network of these layers on a batch of samples, or on one; float32."""
    generator = _random()
    parameters = tuple(
        (
            (generator.normal(size=(m, n)) / np.sqrt(m)).astype(np.float32),
            (0.1 * generator.normal(size=n)).astype(np.float32),
        )
        for m, n in itertools.pairwise(sizes)
    )
    shape = (sizes[0],) if batch is None else (batch, sizes[0])
    y0 = generator.normal(size=shape).astype(np.float32)
    name = "network-" + "-".join(map(str, sizes)) + ("" if batch is None else f"-batch-{batch}")
    bound = 16 if steps is None else steps
    limit = 4096 if steps is None else steps
    return Problem(name, Tensors(perceptron), parameters, y0, 0.0, 1.0, steps=steps, max_steps=limit, bound=bound)


def perceptron(xp: ModuleType, t: Any, y: Any, p: Any) -> Any:
    del t
    *hidden, (weight, bias) = p
    for w, b in hidden:
        y = xp.tanh(y @ w + b)
    return y @ weight + bias


def residual_network(layers: int, width: int, batch: int) -> Problem:
    """A neural ODE to t = 1 whose field is itself deep: so many residual layers, each with normalised inputs; float32."""
    generator = _random()
    shape = (layers, width, width)
    weights = (generator.normal(size=shape) / np.sqrt(layers * width)).astype(np.float32)
    biases = (0.1 * generator.normal(size=shape[:2])).astype(np.float32)
    y0 = generator.normal(size=(batch, width)).astype(np.float32)
    parameters = tuple(zip(weights, biases, strict=True))
    name = f"residual-network-{layers}-{width}-batch-{batch}"
    return Problem(name, Tensors(residual), parameters, y0, 0.0, 1.0, bound=16)


def residual(xp: ModuleType, t: Any, y: Any, p: Any) -> Any:
    del t
    z = y
    for weight, bias in p:
        centred = z - xp.mean(z, -1)[..., None]
        deviation = xp.sqrt(xp.mean(centred * centred, -1) + 1e-5)[..., None]
        z = z + xp.tanh((centred / deviation) @ weight + bias)
    return z - y


def ring(size: int) -> Problem:
    """So many bistable cells on a ring, each coupled to its neighbours, to t = 5, float64: a large state, a cheap field."""
    y0 = np.cos(np.arange(size)) * 0.5
    return Problem(f"ring-{size}", Tensors(bistable), np.array([0.5, 1.0]), y0, 0.0, 5.0, bound=32)


def bistable(xp: ModuleType, t: Any, y: Any, p: Any) -> Any:
    del t
    return p[0] * (xp.roll(y, 1, -1) - 2 * y + xp.roll(y, -1, -1)) + p[1] * y * (1 - y * y)


STIFF = ("van_der_pol_100", "robertson_1e4", "hires", "pollu")
"""Names of stiff problems in `tests/stiff_problems.py`, where their sources are."""


def stiff(name: str, lanes: int | None = None) -> Problem:
    """A stiff problem to its end; in lanes, every parameter multiplied by a random factor between 0.8 and 1.25."""
    given, weights = stiff_problems.PROBLEMS[name](), stiff_problems.reference(name).end.weights
    parameters = given.args
    if lanes is not None:
        factors = _random().uniform(np.log(0.8), np.log(1.25), size=(RANDOM_LANES, parameters.size))
        parameters = (parameters * np.exp(factors))[:lanes]
    reference = name if lanes is None else f"{name}-lanes"
    limits = {"max_steps": 16384, "bound": 4096}
    return Problem(
        reference,
        Components(given.rows),
        parameters,
        given.y0,
        given.t0,
        given.t1,
        lanes=lanes,
        scale=given.scale,
        weights=weights[0],
        **limits,
    )


def _random() -> np.random.Generator:
    return np.random.default_rng(0)
