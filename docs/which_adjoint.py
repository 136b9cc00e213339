"""The tables and the picture of `which_adjoint.md`: every adjoint on four problems, and each where it fails.

python docs/which_adjoint.py            # prints the tables, writes docs/which_adjoint.png
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib

import adjoint_jax as aj
from adjoint_jax.diagnostics import AdjointComparison, compare_adjoints, reconstruction_error

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

Row = tuple[str, ...]
ADJOINTS = {
    "Discrete": aj.DiscreteAdjoint(),
    "Discrete(checkpoints=4)": aj.DiscreteAdjoint(checkpoints=4),
    "Reversible": aj.ReversibleAdjoint(),
    "Interpolating": aj.InterpolatingAdjoint(),
    "Gauss": aj.GaussAdjoint(),
    "Backsolve": aj.BacksolveAdjoint(),
    "ForwardMode": aj.ForwardMode(),
}
TIGHT = aj.PIDController(rtol=1e-10, atol=1e-12)


class Problem(NamedTuple):
    """A title, a loss of (inputs, options of solve), inputs, and adjoints that are left out as too slow."""

    title: str
    loss: Callable[[Any, dict[str, Any]], Any]
    inputs: Any
    without: frozenset[str] = frozenset()

    def compare(self) -> AdjointComparison:
        """All adjoints at rtol = 1e-6, against the exact gradient at rtol = 1e-10."""
        methods = {name: options(adjoint) for name, adjoint in ADJOINTS.items() if name not in self.without}
        tight = {"solver": aj.Dopri8(), "controller": TIGHT, "adjoint": aj.DiscreteAdjoint()}
        return compare_adjoints(self.loss, self.inputs, methods, reference=lambda inputs: self.loss(inputs, tight))


def options(adjoint: Any) -> dict[str, Any]:
    """Tsit5 at rtol = 1e-6, made reversible where the adjoint asks for that."""
    solver = aj.Reversible(aj.Tsit5()) if isinstance(adjoint, aj.ReversibleAdjoint) else aj.Tsit5()
    return {"solver": solver, "controller": aj.PIDController(rtol=1e-6, atol=1e-8), "adjoint": adjoint}


# Four problems


def lotka_volterra(t: Any, y: Any, args: Any) -> Any:
    hare, lynx = y
    a, b, c, d = args
    return jnp.stack([a * hare - b * hare * lynx, -c * lynx + d * hare * lynx])


def populations(inputs: Any, options: dict[str, Any]) -> Any:
    """The mean square of both populations at 20 times."""
    ts = jnp.linspace(0.0, 10.0, 21)
    return jnp.mean(aj.solve(lotka_volterra, 0.0, 10.0, *inputs, saveat=aj.SaveAt(ts[1:]), **options).ys ** 2)


def network(field: Any, options: dict[str, Any], y0: Any) -> Any:
    """The mean square of what a network makes of y0."""
    return jnp.mean(aj.solve(lambda t, y, net: jax.vmap(net)(y), 0.0, 1.0, y0, field, **options).ys ** 2)


POINTS = 32


def heat(t: Any, y: Any, conductivity: Any) -> Any:
    """The heat equation on a rod whose ends are cold, in central differences."""
    padded = jnp.pad(y, 1)
    return conductivity * (POINTS + 1) ** 2 * (padded[2:] - 2 * y + padded[:-2])


def temperature(inputs: Any, options: dict[str, Any]) -> Any:
    """The mean square temperature at t = 0.1."""
    return jnp.mean(aj.solve(heat, 0.0, 0.1, *inputs, **options).ys ** 2)


def rod() -> tuple[Any, Any]:
    """Initial temperature and conductivity."""
    x = jnp.arange(1, POINTS + 1) / (POINTS + 1)
    return jnp.sin(jnp.pi * x) + 0.3 * jnp.sin(5 * jnp.pi * x), jnp.ones(())


def problems() -> list[Problem]:
    small = eqx.nn.MLP(4, 4, 32, 2, jnp.tanh, key=jax.random.key(0))
    large = eqx.nn.MLP(8, 8, 512, 2, jnp.tanh, key=jax.random.key(1))
    batch, single = jax.random.normal(jax.random.key(2), (64, 4)), jax.random.normal(jax.random.key(3), (1, 8))
    rates = jnp.array([1.5, 1.0, 3.0, 1.0])
    no_forward = frozenset({"ForwardMode"})
    return [
        Problem("Lotka-Volterra, 6 inputs", populations, (jnp.ones(2), rates)),
        Problem("network 4-32-32-4 on 64 points", functools.partial(network, y0=batch), small, no_forward),
        Problem("heat equation, 32 points", temperature, rod()),
        Problem("network 8-512-512-8 on 1 point", functools.partial(network, y0=single), large, no_forward),
    ]


# Where each fails


def gradient(loss: Callable[[Any], Any], x: Any) -> float:
    """Of what is run once: to compile it in a hurry changes rounding at most."""
    return float(jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})(x))


def decay(k: Any, adjoint: Any, **options: Any) -> Any:
    return aj.solve(lambda t, y, k: -k * y, 0.0, 1.0, 1.0, k, adjoint=adjoint, **options).ys[0]


def backsolve_fails() -> list[Row]:
    """The derivative of e^-k at k = 30, and the guard that stands before the wrong one."""
    unguarded = gradient(lambda k: decay(k, aj.BacksolveAdjoint(max_drift=jnp.inf)), 30.0)
    try:
        gradient(lambda k: decay(k, aj.BacksolveAdjoint()), 30.0)
        guarded = "no error"
    except Exception as error:
        guarded = str(error).rpartition("SolveError: ")[2].partition(",")[0]
    right = gradient(lambda k: decay(k, aj.DiscreteAdjoint(), controller=TIGHT), 30.0)
    return [
        ("true: -e^-30", f"{-jnp.exp(-30.0):.4e}"),
        ("`BacksolveAdjoint()`", f"raises `{guarded}`"),
        ("`BacksolveAdjoint(max_drift=jnp.inf)`", f"{unguarded:.4e}"),
        ("`DiscreteAdjoint()`, rtol 1e-10", f"{right:.4e}"),
    ]


def reversible_heun_fails() -> list[Row]:
    """y' = -20 y in 50 steps of 1/25: h times the eigenvalue is -0.8."""
    grid = {"controller": aj.FixedSteps(50)}
    rows = [("true: e^-40", f"{jnp.exp(-40.0):.2e}", f"{-2 * jnp.exp(-40.0):.2e}")]
    methods: list[tuple[str, Any, Any]] = [
        ("`ReversibleHeun()`, `ReversibleAdjoint()`", aj.ReversibleHeun(), aj.ReversibleAdjoint()),
        ("`Reversible(Heun())`, `ReversibleAdjoint()`", aj.Reversible(aj.Heun()), aj.ReversibleAdjoint()),
        ("`Heun()`, `DiscreteAdjoint()`", aj.Heun(), aj.DiscreteAdjoint()),
    ]
    for name, solver, adjoint in methods:
        value, slope = jax.value_and_grad(functools.partial(two_units, solver=solver, adjoint=adjoint, **grid))(20.0)
        rows.append((name, f"{value:.2e}", "`REVERSE_DRIFT`" if jnp.isnan(slope) else f"{slope:.2e}"))
    return rows


def two_units(k: Any, **options: Any) -> Any:
    return aj.solve(lambda t, y, k: -k * y, 0.0, 2.0, 1.0, k, throw=False, **options).ys[0]


def reversible_loses_digits() -> list[Row]:
    """A pendulum for 10 units of time, at several couplings; relative error against DiscreteAdjoint of the same solver."""
    rows = []
    for coupling, steps in ((0.9, 100), (0.9, 400), (0.99, 400)):

        def loss(length: Any, adjoint: Any, coupling: float = coupling, steps: int = steps) -> Any:
            options = {"solver": aj.Reversible(aj.RK4(), coupling=coupling), "controller": aj.FixedSteps(steps)}
            return jnp.sum(aj.solve(pendulum, 0.0, 10.0, jnp.array([1.0, 0.0]), length, adjoint=adjoint, **options).ys)

        adjoints = aj.DiscreteAdjoint(), aj.ReversibleAdjoint(max_drift=jnp.inf)
        exact, got = (gradient(functools.partial(loss, adjoint=adjoint), 1.3) for adjoint in adjoints)
        rows.append((str(coupling), str(steps), f"{coupling**-steps:.0e}", f"{abs(got / exact - 1):.0e}"))
    return rows


def pendulum(t: Any, y: Any, length: Any) -> Any:
    return jnp.stack([y[1], -jnp.sin(y[0]) / length])


def interpolating_on_a_coarse_grid() -> list[Row]:
    """The pendulum for 4 units of time, whose dense output is of order 3, with reverse solves at rtol = 1e-10."""
    rows = []
    for steps in (8, 32):

        def loss(length: Any, adjoint: Any, steps: int = steps) -> Any:
            options = {"solver": aj.RK4(), "controller": aj.FixedSteps(steps), "adjoint": adjoint}
            return jnp.sum(aj.solve(pendulum, 0.0, 4.0, jnp.array([1.0, 0.0]), length, **options).ys)

        exact = gradient(functools.partial(loss, adjoint=aj.DiscreteAdjoint()), 1.3)
        errors = [
            abs(gradient(functools.partial(loss, adjoint=adjoint), 1.3) / exact - 1)
            for adjoint in (aj.InterpolatingAdjoint(), aj.InterpolatingAdjoint(aj.Dopri8(), TIGHT))
        ]
        rows.append((str(steps), *(f"{error:.0e}" for error in errors)))
    return rows


def forward_mode_and_many_inputs() -> list[Row]:
    """A linear chain of n states, differentiated with respect to all n initial values."""
    rows = []
    for size in (4, 256):

        def loss(y0: Any, adjoint: Any) -> Any:
            return jnp.sum(aj.solve(lambda t, y, args: jnp.sin(jnp.roll(y, 1)) - y, 0.0, 1.0, y0, adjoint=adjoint).ys ** 2)

        adjoints = [aj.ForwardMode(), aj.DiscreteAdjoint()]
        found = compare_adjoints(loss, jnp.linspace(0.0, 1.0, size), adjoints, count=False)
        rows.append((str(size), *(f"{1e3 * row.measured.seconds:.2f}" for row in found.rows if row.measured)))
    return rows


def discrete_and_memory() -> list[Row]:
    """2,000 steps of RK4 for a state of 32 KiB: the memory that XLA plans for the gradient, and its time."""

    def loss(y0: Any, options: dict[str, Any]) -> Any:
        grid = {"controller": aj.FixedSteps(2000)}
        return jnp.sum(aj.solve(lambda t, y, args: jnp.sin(y), 0.0, 1.0, y0, **grid, **options).ys ** 2)

    adjoints = {
        "Discrete(keep=KeepStates(2**24))": {"adjoint": aj.DiscreteAdjoint(keep=aj.KeepStates(2**24)), "solver": aj.RK4()},
        "Discrete(checkpoints=4)": {"adjoint": aj.DiscreteAdjoint(checkpoints=4), "solver": aj.RK4()},
        "Reversible()": {"adjoint": aj.ReversibleAdjoint(), "solver": aj.Reversible(aj.RK4())},
        "Backsolve()": {"adjoint": aj.BacksolveAdjoint(), "solver": aj.RK4()},
    }
    found = compare_adjoints(loss, jnp.linspace(0.0, 1.0, 4096), adjoints, repeats=3, count=False)
    return [
        (f"`{row.name}`", f"{(row.measured.temporary_bytes or 0) / 2**20:.2f}", f"{1e3 * row.measured.seconds:.0f}")
        for row in found.rows
        if row.measured
    ]


# What is printed and drawn


def markdown(header: Row, rows: list[Row]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def cells(comparison: AdjointComparison) -> list[Row]:
    rows = []
    for row in comparison.rows:
        cost, name = row.measured, f"**`{row.name}`**" if row is comparison.best else f"`{row.name}`"
        if cost is None or cost.forward is None or cost.backward is None:
            rows.append((name, (row.failure or "").partition(" at t")[0], *[""] * 5))
            continue
        memory = f"{(cost.temporary_bytes or 0) / 1024:.3g}"
        counts = f"{cost.forward.evaluations} + {cost.backward.evaluations}", *map(str, cost.backward[1:])
        rows.append((name, f"{cost.error:.0e}", f"{1e3 * cost.seconds:.2f}", memory, *counts))
    return rows


COMPARED = ("", "error", "time (ms)", "memory (KiB)", "evaluations", "vjps in y", "in parameters")
FAILURES: list[tuple[Callable[[], list[Row]], Row]] = [
    (backsolve_fails, ("d/dk y(1), y' = -k y, k = 30", "")),
    (reversible_heun_fails, ("y' = -k y, k = 20", "y(2)", "d/dk y(2)")),
    (reversible_loses_digits, ("coupling", "steps", "coupling^-steps", "relative error")),
    (interpolating_on_a_coarse_grid, ("steps", "error, default", "error, reverse solve at rtol 1e-10")),
    (forward_mode_and_many_inputs, ("inputs", "ForwardMode (ms)", "DiscreteAdjoint (ms)")),
    (discrete_and_memory, ("2,000 steps, state of 32 KiB", "memory (MiB)", "time (ms)")),
]


def draw(comparisons: dict[str, AdjointComparison], path: Path) -> None:
    """Error against time of all problems; a name has the same colour everywhere."""
    colours = {name: f"C{index}" for index, name in enumerate(ADJOINTS)}
    figure, panels = plt.subplots(2, 2, figsize=(9.0, 6.4), dpi=130, layout="constrained")
    for axes, (title, comparison) in zip(panels.flat, comparisons.items(), strict=True):
        for row in comparison.rows:
            if row.measured is not None:
                area = 30 + 12 * ((row.measured.temporary_bytes or 0) / 1024) ** 0.5
                axes.scatter(1e3 * row.measured.seconds, row.measured.error, s=area, color=colours[row.name], alpha=0.6)
        failed = [row.name for row in comparison.rows if row.measured is None]
        axes.set_title(f"{title}{''.join(f', {name} fails' for name in failed)}", loc="left", fontsize=9.5)
        axes.set(xscale="log", yscale="log")
        axes.xaxis.set(major_formatter="{x:g}", minor_locator=LogLocator(subs=(2, 5)), minor_formatter="{x:g}")
        axes.margins(0.2)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("time of loss and gradient (ms)", fontsize=9.5)
    figure.supylabel("relative error of the gradient", fontsize=9.5)
    handles = [plt.Line2D([], [], linestyle="", marker="o", color=colour, alpha=0.6) for colour in colours.values()]
    figure.legend(handles, list(colours), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    logging.getLogger("jax").setLevel(logging.CRITICAL)  # Failures that are meant to be, once in the table is enough.
    comparisons = {}
    for problem in problems():
        comparisons[problem.title] = comparison = problem.compare()
        print(f"### {problem.title}\n\n{markdown(COMPARED, cells(comparison))}\n{comparison.recommendation}\n", flush=True)
    draw(comparisons, Path(__file__).with_suffix(".png"))
    print(f"{reconstruction_error(heat, 0.0, 0.1, *rod())}\n")
    for failure, header in FAILURES:
        print(f"### {failure.__name__}\n\n{markdown(header, failure())}", flush=True)


if __name__ == "__main__":
    main()
