"""The rows: what is solved by whom, and what ratio is wanted."""

import functools
from collections.abc import Callable, Iterable

import numpy as np

from benchmarks import contestants as by
from benchmarks import problems
from benchmarks.cases import EVERY_PEER, Case, Contestant, Measured, Mode, Quality, Row, Want
from benchmarks.lengths import Length
from benchmarks.problems import Problem
from benchmarks.programs import Quantity

FORWARD, GRADIENT = Quantity.FORWARD, Quantity.GRADIENT
ALL_DIFFRAX = (by.DIFFRAX.name, by.DIFFRAX_TUNED.name, by.DIFFRAX_TUPLE.name, by.DIFFRAX_FORWARD_MODE.name)


def rows(length: Length) -> dict[str, Row]:
    """All rows, by the names that the command line knows, with sizes that fit the length of the run."""
    return {
        "lv-forward": _lotka_volterra_forward(length),
        "lv-gradient": _lotka_volterra_gradient(length),
        "lv-lanes": _lotka_volterra_lanes(length),
        "cores": _lotka_volterra_on_cores(length),
        "node-small": _small_network(length),
        "node-large": _large_network(length),
        "node-deep": _deep_network(length),
        "wide": _wide_networks(length),
        "state-size": _state_sizes(length),
        "duffing": _duffing(length),
        "rk4-memory": _long_gradients(length),
        "lorenz": _lorenz(length),
        "vdp-lanes": _unequal_lanes(length),
        "stiff": _stiff(length),
        "stiff-lanes": _stiff_lanes(length),
        "saves": _save_times(),
        "compile": _compile(length),
        "import": _imports(),
    }


def _race(
    name: str,
    problem: Callable[[], Problem],
    quantity: Quantity,
    contestants: Iterable[Contestant],
    tolerances: tuple[float | None, ...] = (None,),
    size: float | None = None,
) -> Measured:
    return Measured(Case(name, problem, quantity, tuple(contestants), tolerances, size), Mode.RACE)


def _also(measured: Measured, mode: Mode, contestants: Iterable[Contestant]) -> Measured:
    """The same case, measured in another way with some of its contestants."""
    return Measured(measured.case._replace(contestants=tuple(contestants)), mode)


def _lotka_volterra_forward(length: Length) -> Row:
    tolerances = length.of((1e-6, 1e-9, 1e-4, 1e-10))
    peers = (by.DIFFRAX, by.DIFFRAX_TUNED, by.JAX_ODE, by.GRADSOLVE, by.TORCHDIFFEQ, by.LSODA, by.DOP853, by.CVODES)
    wants = (
        Want("forward", by.DISCRETE.name, (against,), ratio, tolerance)
        for tolerance in (1e-6, 1e-9)
        for against, ratio in ((by.JAX_ODE.name, 0.9), (by.DIFFRAX.name, 0.3), (by.DIFFRAX_TUNED.name, 0.3))
    )
    race = _race("forward", problems.lotka_volterra, FORWARD, (by.DISCRETE, by.FORWARD_MODE, *peers), tolerances)
    return Row("Lotka-Volterra, 100 save times, float64: solve", (race,), tuple(wants))


def _lotka_volterra_gradient(length: Length) -> Row:
    tolerances = length.of((1e-6, 1e-9, 1e-4, 1e-10))
    ours = (by.DISCRETE, by.FORWARD_MODE)
    peers = (by.DIFFRAX, by.DIFFRAX_TUNED, by.DIFFRAX_FORWARD_MODE, by.JAX_ODE, by.TORCHDIFFEQ, by.CVODES)
    wants = (
        Want("gradient", by.DISCRETE.name, against, ratio, tolerance)
        for tolerance in (1e-6, 1e-9)
        for against, ratio in (((by.JAX_ODE.name,), 0.6), (ALL_DIFFRAX, 0.35))
    )
    race = _race("gradient", problems.lotka_volterra, GRADIENT, ours + peers, tolerances)
    counted = _also(race, Mode.COUNTED, (by.DISCRETE, by.DIFFRAX, by.DIFFRAX_TUNED, by.JAX_ODE))
    return Row("Lotka-Volterra, 100 save times, float64: gradient", (race, counted), tuple(wants))


def _lotka_volterra_lanes(length: Length) -> Row:
    always = (by.DISCRETE, by.DIFFRAX_TUPLE, by.JAX_ODE, by.GRADSOLVE)
    races, wants = [], []
    for lanes in length.lanes(256, 4096):
        problem = functools.partial(problems.lotka_volterra, lanes)
        who = always if races else (*always, by.TORCHODE)
        tolerances = length.of((1e-6,) if races else (1e-6, 1e-5))
        for quantity, ratio in ((FORWARD, 0.35), (GRADIENT, 0.25)):
            name = f"{quantity.value}, {lanes:,} lanes"
            races.append(_race(name, problem, quantity, who, tolerances, lanes))
            wants.append(Want(name, by.DISCRETE.name, EVERY_PEER, ratio, 1e-6))
    return Row("Lotka-Volterra with random parameters, 100 save times, float64, vmap", tuple(races), tuple(wants), "lanes")


def _lotka_volterra_on_cores(length: Length) -> Row:
    """The same with a device for each of two cores."""
    lanes = min(4096, length.largest_lanes)
    races, wants = [], []
    for quantity, ratio in ((FORWARD, 0.35), (GRADIENT, 0.25)):
        problem = functools.partial(problems.lotka_volterra, lanes, devices=2)
        races.append(_race(quantity.value, problem, quantity, (by.DISCRETE, by.DIFFRAX_TUPLE, by.JAX_ODE), (1e-6,)))
        wants.append(Want(quantity.value, by.DISCRETE.name, EVERY_PEER, ratio, 1e-6))
    return Row(f"Lotka-Volterra, {lanes:,} lanes on two CPU devices, jax.shard_map of vmap", tuple(races), tuple(wants))


def _small_network(length: Length) -> Row:
    ours = (by.DISCRETE, by.LINEARISATIONS, by.GAUSS, by.BACKSOLVE)
    race = _race(
        "gradient",
        functools.partial(problems.network, *problems.SMALL),
        GRADIENT,
        ours + _NETWORK_PEERS,
        length.of((1e-4, 1e-3, 1e-6)),
    )
    peers = (by.DIFFRAX_TUNED, by.DIFFRAX_BACKSOLVE, by.JAX_ODE)
    counted = _also(race, Mode.COUNTED, (by.DISCRETE, by.LINEARISATIONS, by.GAUSS, by.BACKSOLVE, *peers))
    wants = (Want("gradient", by.DISCRETE.name, EVERY_PEER, 0.7, 1e-4),)
    return Row("Neural ODE 16-64-64-16, batch 128, float32", (race, counted), wants)


_NETWORK_PEERS = (by.DIFFRAX_TUNED, by.DIFFRAX_BACKSOLVE, by.JAX_ODE, by.TORCHDIFFEQ, by.TORCHODE)


def _large_network(length: Length) -> Row:
    peers = (by.DIFFRAX, by.DIFFRAX_TUNED, by.JAX_ODE, by.TORCHDIFFEQ, by.TORCHODE)
    race = _race(
        "gradient",
        functools.partial(problems.network, *problems.LARGE),
        GRADIENT,
        (by.DISCRETE, by.LINEARISATIONS, by.GAUSS, *peers),
        length.of((1e-4, 1e-3, 1e-6)),
    )
    wants = (Want("gradient", by.DISCRETE.name, EVERY_PEER, 0.85, 1e-4),)
    counted = _also(race, Mode.COUNTED, (by.DISCRETE, by.LINEARISATIONS, by.GAUSS, by.DIFFRAX_TUNED, by.JAX_ODE))
    return Row("Neural ODE 64-512-512-64, batch 256, float32", (race, counted), wants)


def _deep_network(length: Length) -> Row:
    race = _race(
        "gradient",
        functools.partial(problems.residual_network, *problems.RESIDUAL),
        GRADIENT,
        (by.DISCRETE, by.GAUSS, by.DIFFRAX_TUNED, by.JAX_ODE, by.TORCHDIFFEQ),
        length.of((1e-4, 1e-3, 1e-6)),
    )
    wants = (Want("gradient", by.DISCRETE.name, EVERY_PEER, 0.85, 1e-4),)
    return Row("Neural ODE of 32 normalised residual layers, 32 wide, batch 64, float32", (race,), wants)


def _wide_networks(length: Length) -> Row:
    ours = (by.DISCRETE, by.LINEARISATIONS, by.GAUSS, by.BACKSOLVE)
    races = []
    for width in length.sizes(*problems.WIDTHS):
        problem = functools.partial(problems.network, (16, width, width, 16), None)
        parameters = width * width + 34 * width + 16
        tolerances = length.of((1e-4, 1e-3, 1e-6) if width == max(problems.WIDTHS) else (1e-4,))
        narrow = (by.DISCRETE, by.GAUSS, by.BACKSOLVE, by.DIFFRAX_TUNED, by.JAX_ODE)
        who = ours + _NETWORK_PEERS if width == max(problems.WIDTHS) else narrow
        races.append(_race(f"gradient, width {width}", problem, GRADIENT, who, tolerances, parameters))
    counted = (by.DISCRETE, by.LINEARISATIONS, by.GAUSS, by.BACKSOLVE, by.DIFFRAX_TUNED, by.JAX_ODE)
    races.append(_also(races[-1], Mode.COUNTED, counted))
    case = f"gradient, width {max(problems.WIDTHS)}"
    own = ((by.GAUSS.name, 2.0), (by.BACKSOLVE.name, 2.0))
    wants = (
        Want(case, by.DISCRETE.name, ALL_DIFFRAX, 0.4, 1e-4),
        *(Want(case, name, (by.DISCRETE.name,), ratio, 1e-4) for name, ratio in own),
    )
    return Row("One sample through 16-width-width-16, float32", tuple(races), wants, "parameters")


def _state_sizes(length: Length) -> Row:
    who = (by.DISCRETE, by.BACKSOLVE, by.DIFFRAX_TUNED, by.DIFFRAX_BACKSOLVE, by.JAX_ODE, by.TORCHDIFFEQ)
    races = [
        _race(f"gradient, {size:,} states", functools.partial(problems.ring, size), GRADIENT, who, (1e-6,), size)
        for size in length.sizes(*problems.RING_SIZES)
    ]
    return Row("Bistable cells on a ring, float64: a cheap field", tuple(races), (), "states")


def _duffing(length: Length) -> Row:
    steps = min(10_000, length.largest_steps)
    problem = functools.partial(problems.duffing, steps)
    methods = {
        "RK4": (by.DISCRETE_RK4, by.DIFFRAX_TUNED_RK4, by.GRADSOLVE_RK4, by.BARE_RK4, by.BARE_RK4_REMAT),
        "Tsit5": (by.DISCRETE, by.DIFFRAX_TUNED, by.GRADSOLVE_TSIT5, by.BARE_TSIT5, by.BARE_TSIT5_REMAT),
    }
    races, wants = [], []
    for method, who in methods.items():
        for quantity, ratio in ((FORWARD, 1.2), (GRADIENT, 1.0)):
            name = f"{quantity.value}, {method}"
            races.append(_race(name, problem, quantity, who))
            wants.append(Want(name, by.DISCRETE.name, (by.BARE_RK4.name,), ratio))
    return Row(f"Duffing oscillator, {steps:,} fixed steps, float64", tuple(races), tuple(wants))


def _long_gradients(length: Length) -> Row:
    """What keeps every step does not race over many. Where a call takes a quarter of a minute, everybody is called
    once, in a process of its own."""
    essential = (by.DISCRETE_RK4, by.CHECKPOINTS_RK4, by.BACKSOLVE_RK4, by.REVERSIBLE_RK4, by.BARE_RK4_REMAT)
    essential += (by.BARE_RK4_SQUARE_ROOT, by.DIFFRAX_BACKSOLVE_RK4)
    lean = (*essential, by.DIFFRAX_RK4, by.DIFFRAX_TUNED_RK4)
    everybody = (*lean, by.LINEARISATIONS_RK4, by.BARE_RK4, by.TORCHDIFFEQ)
    who = {100: everybody, 1000: lean, 10_000: essential}
    measured, wants = [], []
    for steps in length.steps(*who):
        problem = functools.partial(problems.network, *problems.DEEP, steps)
        name = f"gradient, {steps:,} steps"
        case = Case(name, problem, GRADIENT, who[steps], size=steps)
        measured.append(Measured(case, Mode.ALONE if steps == 10_000 else Mode.RACE))
        wants += [
            Want(name, by.DISCRETE_RK4.name, (by.BARE_RK4_REMAT.name,), 1.0),
            Want(name, by.CHECKPOINTS_RK4.name, (by.BARE_RK4_SQUARE_ROOT.name,), 1.05),
            Want(name, by.CHECKPOINTS_RK4.name, (by.BARE_RK4_SQUARE_ROOT.name,), 1.05, quality=Quality.MEMORY),
            Want(name, by.BACKSOLVE_RK4.name, (by.DIFFRAX_BACKSOLVE_RK4.name,), 1.0),
        ]
    flat = (
        Want("gradient, 10,000 steps", name, (name,), 1.1, quality=Quality.MEMORY, than_in="gradient, 100 steps")
        for name in (by.BACKSOLVE_RK4.name, by.REVERSIBLE_RK4.name)
    )
    return Row("RK4 on 32-128-128-32, batch 64, float32: time and memory", tuple(measured), (*wants, *flat), "steps")


def _lorenz(length: Length) -> Row:
    lanes = min(10_000, length.largest_lanes)
    forward = (by.DISCRETE, by.DIFFRAX_TUPLE, by.JAX_ODE, by.TORCHODE, by.BARE_LANES)
    gradient = (*forward, by.DISCRETE_BOUNDED)
    double = (by.DISCRETE, by.DIFFRAX_TUPLE, by.JAX_ODE, by.GRADSOLVE, by.BARE_LANES)
    races, wants = [], []
    for quantity, single, ratio in ((FORWARD, forward, 0.4), (GRADIENT, gradient, 0.3)):
        for precision, who, each in ((np.float32, single, (1e-6, 1e-5)), (np.float64, double, (1e-6,))):
            tolerances = length.of(each)
            name = f"{quantity.value}, {precision.__name__}"
            races.append(_race(name, functools.partial(problems.lorenz, lanes, precision), quantity, who, tolerances))
            wants.append(Want(name, by.DISCRETE.name, EVERY_PEER, ratio, 1e-6))
    return Row(f"Lorenz, {lanes:,} lanes to t = 1", tuple(races), tuple(wants))


def _unequal_lanes(length: Length) -> Row:
    lanes = min(4096, length.largest_lanes)
    who = (by.DISCRETE, by.DIFFRAX_TUNED, by.DIFFRAX_TUPLE, by.JAX_ODE, by.GRADSOLVE, by.BARE_LANES)
    race = _race("forward", functools.partial(problems.van_der_pol, lanes), FORWARD, who, length.of((1e-6, 1e-5)))
    want = Want("forward", by.DISCRETE.name, EVERY_PEER, 0.5, 1e-6)
    return Row(f"Van der Pol, {lanes:,} unequal lanes, mu from 0.1 to 50", (race,), (want,))


_DIFFRAX_STIFF = (by.DIFFRAX_KVAERNO5, by.DIFFRAX_KVAERNO5_NEWTON)


def _names(contestants: Iterable[Contestant]) -> tuple[str, ...]:
    return tuple(contestant.name for contestant in contestants)


def _stiff(length: Length) -> Row:
    tolerances = length.of((1e-6, 1e-4, 1e-8))
    forward = (by.RODAS5P, by.KVAERNO5, *_DIFFRAX_STIFF, by.CVODES_BDF, by.DIFFSOL, by.LSODA)
    gradient = (by.RODAS5P, by.DIFFRAX_KVAERNO5_NEWTON, by.DIFFRAX_KVAERNO5_FORWARD_MODE, by.CVODES_BDF, by.DIFFSOL)
    races, wants = [], []
    for name in problems.STIFF:
        problem = functools.partial(problems.stiff, name)
        for quantity, who, of_diffrax, of_cvodes in ((FORWARD, forward, 0.6, 1.5), (GRADIENT, gradient, 0.35, 1.0)):
            case = f"{quantity.value}, {name.replace('_', ' ')}"
            races.append(_race(case, problem, quantity, who, tolerances))
            wants.append(Want(case, by.RODAS5P.name, _names(_DIFFRAX_STIFF), of_diffrax, 1e-6))
            wants.append(Want(case, by.RODAS5P.name, (by.CVODES_BDF.name,), of_cvodes, 1e-6))
    return Row("Stiff problems, float64", tuple(races), tuple(wants))


_STIFF_LANES = {
    "van_der_pol_100": {FORWARD: 1024, GRADIENT: 256},
    "robertson_1e4": {FORWARD: 1024, GRADIENT: 1024},
    "hires": {FORWARD: 256, GRADIENT: 256},
    "pollu": {FORWARD: 64, GRADIENT: 64},
}
"""The slower the call, the fewer the lanes: in 1,024 of the largest system, one of the peer's takes minutes."""


def _stiff_lanes(length: Length) -> Row:
    """The peer is less accurate at the same tolerance: its second one is the smaller, and our error lies between."""
    races, wants = [], []
    for name, lanes_of in _STIFF_LANES.items():
        for quantity, most in lanes_of.items():
            lanes, tolerances = min(most, length.largest_lanes), length.of((1e-6, 1e-8))
            problem = functools.partial(problems.stiff, name, lanes)
            case = f"{quantity.value}, {name.replace('_', ' ')}, {lanes:,} lanes"
            races.append(_race(case, problem, quantity, (by.RODAS5P, by.DIFFRAX_KVAERNO5_NEWTON), tolerances, lanes))
            wants.append(Want(case, by.RODAS5P.name, (by.DIFFRAX_KVAERNO5_NEWTON.name,), 0.3, 1e-6))
    return Row("Stiff problems in lanes with random parameters, float64", tuple(races), tuple(wants))


def _save_times() -> Row:
    who = (by.DISCRETE, by.DIFFRAX_TUNED, by.JAX_ODE)
    races = []
    for lanes, chosen in ((None, problems.SAVE_TIMES[:3]), (64, problems.SAVE_TIMES[1:])):
        for end, count in chosen:
            name = f"{count:,} to t = {end:g}" + ("" if lanes is None else f", {lanes} lanes")
            races.append(_race(name, functools.partial(problems.save_times, end, count, lanes), FORWARD, who, (1e-6,)))
    return Row("Lotka-Volterra: what save times cost", tuple(races))


def _compile(length: Length) -> Row:
    """Gradients of the problems of the other rows; each build in a process of its own."""
    lanes = min(256, length.largest_lanes)
    steps = min(10_000, length.largest_steps)
    general = (by.DISCRETE, by.DIFFRAX, by.JAX_ODE, by.BARE_ADJOINT, by.BARE_SEGMENTS)
    on_grids = (by.DISCRETE_RK4, by.DIFFRAX_RK4, by.BARE_RK4)
    chosen: tuple[tuple[str, Callable[[], Problem], tuple[Contestant, ...], float | None], ...] = (
        ("Lotka-Volterra", problems.lotka_volterra, general, 1e-6),
        (f"Lotka-Volterra, {lanes} lanes", functools.partial(problems.lotka_volterra, lanes), general, 1e-6),
        ("small network", functools.partial(problems.network, *problems.SMALL), general, 1e-4),
        ("large network", functools.partial(problems.network, *problems.LARGE), general, 1e-4),
        ("deep network", functools.partial(problems.residual_network, *problems.RESIDUAL), general, 1e-4),
        ("wide network", functools.partial(problems.network, (16, 1024, 1024, 16), None), general, 1e-4),
        ("Duffing, RK4", functools.partial(problems.duffing, steps), on_grids, None),
        ("RK4 on a network", functools.partial(problems.network, *problems.DEEP, 1000), on_grids, None),
        ("Lorenz", functools.partial(problems.lorenz, min(10_000, length.largest_lanes), np.float32), general, 1e-6),
    )
    cases = [Case(name, problem, GRADIENT, who, (tolerance,)) for name, problem, who, tolerance in chosen]
    wants = [
        Want(case.name, by.DISCRETE.name, (against.name,), ratio, case.tolerances[0], Quality.BUILD)
        for case in cases
        for against, ratio in ((by.DIFFRAX, 0.3), (by.JAX_ODE, 1.0))
        if against.name in [contestant.name for contestant in case.contestants]
    ]
    return Row(
        "Seconds to trace, lower and compile a gradient", tuple(Measured(c, Mode.ALONE) for c in cases), tuple(wants)
    )


def _imports() -> Row:
    case = Case("import", problems.lotka_volterra, FORWARD, by.IMPORTED)
    want = Want("import", "adjoint_jax", (), 0.15, quality=Quality.IMPORT)
    return Row("Seconds to import, beyond jax and equinox", (Measured(case, Mode.IMPORT),), (want,))
