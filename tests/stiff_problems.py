"""Stiff initial value problems with published end values, and reference gradients of losses of their solutions.

`PROBLEMS` holds them by name; each is made when it is asked for. The right-hand sides are written as `rows`: a function
of t, y and args whose components are plain arithmetic on y[i] and args[i], so that JAX, NumPy and CasADi run the same
text. `field` is the same as one array. All args are vectors of rate constants or parameters, so that any of them can be
differentiated, drawn at random or put into lanes.

The published values come from the Test Set for IVP Solvers (Mazzia and Magherini, University of Bari, release 2.4),
where extended precision RADAU or RADAU5 computed them at tolerances of about 1e-18, and from the tables of Hairer's
collection (E. Hairer and G. Wanner, Solving Ordinary Differential Equations II).

`reference(name)` reads `references/stiff.json`, which `references/make_stiff.py` computes.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

BARI = "Test Set for IVP Solvers, release 2.4"
HAIRER = "Hairer, stiff test set"
REFERENCES = pathlib.Path(__file__).parent / "references" / "stiff.json"


class StiffProblem(NamedTuple):
    """mass · dy/dt = field(t, y, args) from t0 to t1."""

    rows: Callable[[Any, Any, Any], Sequence[Any]]
    """Components of the right-hand side, of scalars of any library."""
    field: Callable[[Any, Any, Any], Any]
    """The same as one JAX array."""
    y0: np.ndarray
    args: np.ndarray
    t1: float
    scale: float
    """Sizes below it do not matter: atol = rtol · scale is a typical choice."""
    t0: float = 0.0
    end: np.ndarray | None = None
    """Published y(t1)."""
    source: str = ""
    digits: float = 0.0
    """Digits to which a solution in double precision at tiny tolerances agreed with them."""
    mass: np.ndarray | None = None
    bandwidth: tuple[int, int] | None = None
    """Lower and upper bandwidth of the Jacobian, where it is banded."""
    exact: Callable[[Any, Any, Any], Any] | None = None
    """The solution at t from y0 and args, where it has a closed form."""


class Loss(NamedTuple):
    """The sum of weights[i, k] · y_k(ts[i]), and its derivatives."""

    ts: np.ndarray
    weights: np.ndarray
    value: float
    args: np.ndarray
    y0: np.ndarray
    digits: float
    """-log10 of the largest error estimated, relative to the largest derivative with respect to a logarithm."""


class Reference(NamedTuple):
    """The solution at several times, and two losses: of the last of them alone (`end`), and of all (`path`)."""

    problem: str
    ts: np.ndarray
    ys: np.ndarray
    end: Loss
    path: Loss


def reference(name: str) -> Reference:
    """What `make_stiff.py` computed for a problem."""
    stored = json.loads(REFERENCES.read_text())[name]
    ts, ys = np.array(stored["ts"]), np.array(stored["ys"])

    def loss(entry: dict[str, Any], ts: np.ndarray) -> Loss:
        arrays = {key: np.array(entry[key]) for key in ("weights", "args", "y0")}
        return Loss(ts=ts, value=entry["value"], digits=entry["digits"], **arrays)

    return Reference(name, ts, ys, loss(stored["end"], ts[-1:]), loss(stored["path"], ts))


def stacked(rows: Callable[[Any, Any, Any], Sequence[Any]]) -> Callable[[Any, Any, Any], Any]:
    """Rows as one array."""

    def field(t: Any, y: Any, args: Any) -> Any:
        return jnp.stack(rows(t, y, args))

    return field


# Van der Pol


def _van_der_pol(t, y, args):
    return y[1], args[0] * (1.0 - y[0] * y[0]) * y[1] - y[0]


def _van_der_pol_scaled(t, y, args):
    return y[1], ((1.0 - y[0] * y[0]) * y[1] - y[0]) / args[0]


_van_der_pol_field, _van_der_pol_scaled_field = stacked(_van_der_pol), stacked(_van_der_pol_scaled)


def van_der_pol(mu: float, t1: float) -> StiffProblem:
    """The oscillator in its own time; it jumps about every 0.807 mu, t1 should not be near a jump."""
    problem = StiffProblem(
        _van_der_pol, _van_der_pol_field, np.array([2.0, 0.0]), np.array([mu]), t1=t1, scale=min(1.0, 1.0 / mu)
    )
    if (mu, t1) == (1e3, 2e3):
        return problem._replace(end=np.array([1.706167732170469, -8.928097010248125e-4]), source=BARI, digits=12)
    return problem


def van_der_pol_scaled(t1: float = 2.0) -> StiffProblem:
    """The test set's form: time divided by mu, velocity multiplied by it, eps = 1 / mu² = 1e-6."""
    published = {1.0: [-1.863646254808130, 0.7535430865435460], 2.0: [1.706167732170483, -0.8928097010247975]}
    end = np.array(published[t1]) if t1 in published else None
    return StiffProblem(
        _van_der_pol_scaled,
        _van_der_pol_scaled_field,
        np.array([2.0, 0.0]),
        np.array([1e-6]),
        t1=t1,
        scale=1.0,
        end=end,
        source=BARI if t1 == 2.0 else HAIRER,
        digits=12,
    )


# Robertson's three reactions


def _robertson(t, y, args):
    slow, back, fast = args[0] * y[0], args[1] * y[1] * y[2], args[2] * y[1] * y[1]
    return back - slow, slow - back - fast, fast


def _robertson_dae(t, y, args):
    slow, back, fast = args[0] * y[0], args[1] * y[1] * y[2], args[2] * y[1] * y[1]
    return back - slow, slow - back - fast, y[0] + y[1] + y[2] - 1.0


_robertson_field, _robertson_dae_field = stacked(_robertson), stacked(_robertson_dae)
ROBERTSON_RATES = (0.04, 1e4, 3e7)


def robertson(t1: float) -> StiffProblem:
    """Three reactions whose rates lie nine orders of magnitude apart."""
    published = {
        40.0: ([0.7158270687194, 9.185534764558e-6, 0.2841637457459], HAIRER, 10),
        1e11: ([0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050], BARI, 12),
    }
    end, source, digits = published.get(t1, (None, "", 0))
    return StiffProblem(
        _robertson,
        _robertson_field,
        np.array([1.0, 0.0, 0.0]),
        np.array(ROBERTSON_RATES),
        t1=t1,
        scale=1e-6 if t1 <= 1e5 else 1e-10,
        end=None if end is None else np.array(end),
        source=source,
        digits=digits,
    )


def robertson_dae(t1: float) -> StiffProblem:
    """The same with conservation of mass instead of the third equation: a DAE of index 1.

    The solution is that of `robertson`; it depends on the first two components of y0 only, of which the third follows.
    """
    return robertson(t1)._replace(rows=_robertson_dae, field=_robertson_dae_field, mass=np.diag([1.0, 1.0, 0.0]))


# HIRES: high irradiance responses of photomorphogenesis


def _hires(t, y, args):
    k1, k2, k3, k4, k5, k6, k_plus, k_minus, k_star, oks = (args[i] for i in range(10))
    complexing = k_plus * y[5] * y[7]
    released = (k2 + k_minus + k_star) * y[6]
    return (
        -k1 * y[0] + k2 * y[1] + k6 * y[2] + oks,
        k1 * y[0] - (k2 + k3) * y[1],
        -(k6 + k1) * y[2] + k2 * y[3] + k5 * y[4],
        k3 * y[1] + k1 * y[2] - (k4 + k2) * y[3],
        -(k1 + k5) * y[4] + k2 * (y[5] + y[6]),
        k4 * y[3] + k1 * y[4] - k2 * y[5] + k_minus * y[6] - complexing,
        complexing - released,
        released - complexing,
    )


_hires_field = stacked(_hires)


def hires(t1: float = 321.8122) -> StiffProblem:
    """Eight states, ten rates (three of them equal, as published)."""
    published = [
        0.7371312573325668e-3,
        0.1442485726316185e-3,
        0.5888729740967575e-4,
        0.1175651343283149e-2,
        0.2386356198831331e-2,
        0.6238968252742796e-2,
        0.2849998395185769e-2,
        0.2850001604814231e-2,
    ]
    return StiffProblem(
        _hires,
        _hires_field,
        np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057]),
        np.array([1.71, 0.43, 8.32, 0.69, 0.035, 8.32, 280.0, 0.69, 0.69, 0.0007]),
        t1=t1,
        scale=1e-4,
        end=np.array(published) if t1 == 321.8122 else None,
        source=BARI,
        digits=12,
    )


# The Oregonator


def _orego(t, y, args):
    s, q, w = args[0], args[1], args[2]
    return s * (y[1] - y[0] * y[1] + y[0] - q * y[0] * y[0]), (y[2] - y[1] - y[0] * y[1]) / s, w * (y[0] - y[2])


_orego_field = stacked(_orego)


def orego(t1: float = 360.0) -> StiffProblem:
    """The Belousov-Zhabotinskii reaction: states go up to 1e5 and back within a period of 300."""
    return StiffProblem(
        _orego,
        _orego_field,
        np.array([1.0, 2.0, 3.0]),
        np.array([77.27, 8.375e-6, 0.161]),
        t1=t1,
        scale=1.0,
        end=np.array([0.1000814870318523e1, 0.1228178521549917e4, 0.1320554942846706e3]) if t1 == 360.0 else None,
        source=BARI,
        digits=11,
    )


# POLLU: the chemical part of an air pollution model


POLLU_REACTIONS = (
    "1 -> 2 3",
    "2 4 -> 1",
    "5 2 -> 1 6",
    "7 -> 5 5 8",
    "7 -> 8",
    "7 6 -> 5 8",
    "9 -> 5 8 10",
    "9 6 -> 11",
    "11 2 -> 1 10 12",
    "11 1 -> 13",
    "13 -> 1 11",
    "10 2 -> 1 14",
    "14 -> 5 7",
    "1 6 -> 15",
    "3 -> 4",
    "4 -> 16",
    "4 -> 3",
    "16 -> 6 6",
    "16 -> 3",
    "17 6 -> 5 18",
    "19 -> 2",
    "19 -> 1 3",
    "1 4 -> 19",
    "19 1 -> 20",
    "20 -> 1 19",
)
"""Reactants and those products that the model keeps, by the published numbers of the species."""


def _species(side: str) -> tuple[int, ...]:
    return tuple(int(number) - 1 for number in side.split())


_POLLU = tuple(tuple(map(_species, reaction.split("->"))) for reaction in POLLU_REACTIONS)


def _pollu(t, y, args):
    dy: list[Any] = [0.0] * 20
    for i, (reactants, products) in enumerate(_POLLU):
        flux = args[i] * y[reactants[0]]
        for species in reactants[1:]:
            flux = flux * y[species]
        for species in reactants:
            dy[species] = dy[species] - flux
        for species in products:
            dy[species] = dy[species] + flux
    return dy


_pollu_field = stacked(_pollu)


def pollu(t1: float = 60.0) -> StiffProblem:
    """Twenty species, 25 rates; rates between 1e-4 and 4e11."""
    rates = [0.35, 26.6, 1.23e4, 8.6e-4, 8.2e-4, 1.5e4, 1.3e-4, 2.4e4, 1.65e4, 9e3, 0.022, 1.2e4, 1.88, 1.63e4, 4.8e6]
    rates += [3.5e-4, 0.0175, 1e8, 4.44e11, 1.24e3, 2.1, 5.78, 0.0474, 1.78e3, 3.12]
    y0 = np.zeros(20)
    y0[[1, 3, 6, 7, 8, 16]] = 0.2, 0.04, 0.1, 0.3, 0.01, 0.007
    published = [
        0.5646255480022769e-1,
        0.1342484130422339,
        0.4139734331099427e-8,
        0.5523140207484359e-2,
        0.2018977262302196e-6,
        0.1464541863493966e-6,
        0.7784249118997964e-1,
        0.3245075353396018,
        0.7494013383880406e-2,
        0.1622293157301561e-7,
        0.1135863833257075e-7,
        0.2230505975721359e-2,
        0.2087162882798630e-3,
        0.1396921016840158e-4,
        0.8964884856898295e-2,
        0.4352846369330103e-17,
        0.6899219696263405e-2,
        0.1007803037365946e-3,
        0.1772146513969984e-5,
        0.5682943292316392e-4,
    ]
    return StiffProblem(
        _pollu,
        _pollu_field,
        y0,
        np.array(rates),
        t1=t1,
        scale=1e-6,
        end=np.array(published) if t1 == 60.0 else None,
        source=BARI,
        digits=12,
    )


# E5: chemical pyrolysis


def _e5(t, y, args):
    a, b, c, m = args[0], args[1], args[2], args[3]
    first, second, third, fourth = a * y[0], b * y[0] * y[2], c * m * y[1] * y[2], c * y[3]
    dy2, dy4 = first - third, second - fourth
    return -first - second, dy2, dy2 - dy4, dy4


_e5_field = stacked(_e5)


def e5(t1: float = 1e13) -> StiffProblem:
    """Four states between 1e-3 and 1e-25: an absolute tolerance must be far below the smallest of interest.

    y2 - y3 - y4 = 0 for all time, but rounding while they are of size 1e-10 leaves a difference of about 1e-26 in double
    precision: at 1e13 it is the fourth digit of both (the values of the Bari set show it too), and only their product
    has more.
    """
    published = {
        1e3: (
            [1.6180769999072942552e-3, 1.3822370304983735443e-10, 8.2515735006838336e-12, 1.2997212954915352e-10],
            HAIRER,
        ),
        1e5: ([7.4813208224292220e-6, 2.3734781561205975e-12, 2.2123586689581664e-12, 1.6111948716243114e-13], HAIRER),
        1e13: ([0.0, 8.8612334976263783e-23, 8.8612334976263783e-23, 0.0], HAIRER),
    }
    end, source = published.get(t1, (None, ""))
    return StiffProblem(
        _e5,
        _e5_field,
        np.array([1.76e-3, 0.0, 0.0, 0.0]),
        np.array([7.89e-10, 1.1e7, 1.13e3, 1e6]),
        t1=t1,
        scale=1e-16 if t1 <= 1e5 else 1e-24,
        end=None if end is None else np.array(end),
        source=source,
        digits=3 if t1 == 1e13 else 12,
    )


# Prothero and Robinson


def _prothero_robinson(t, y, args):
    rate, frequency = args[0], args[1]
    angle = frequency * t
    return (rate * (y[0] - jnp.cos(angle)) - frequency * jnp.sin(angle),)


_prothero_robinson_field = stacked(_prothero_robinson)


def prothero_robinson(rate: float = -1e4, t1: float = 2.0, offset: float = 0.0) -> StiffProblem:
    """dy/dt = rate · (y - cos wt) - w sin wt: stiff, not autonomous, with a closed form; methods lose order on it.

    With an `offset` of the initial value from the smooth solution there is a transient.
    """

    def exact(t, y0, args):
        return jnp.cos(args[1] * t) + (y0 - 1.0) * jnp.exp(args[0] * t)

    return StiffProblem(
        _prothero_robinson,
        _prothero_robinson_field,
        np.array([1.0 + offset]),
        np.array([rate, 1.3]),
        t1=t1,
        scale=1.0,
        exact=exact,
    )


# The Brusselator with diffusion on a line


def _brusselator_rows(nodes, t, y, args):
    production, diffusion = args[0], args[1]
    weight = diffusion * float((nodes + 1) ** 2)
    u, v = [1.0, *(y[2 * i] for i in range(nodes)), 1.0], [3.0, *(y[2 * i + 1] for i in range(nodes)), 3.0]
    dy = []
    for i in range(1, nodes + 1):
        reaction = u[i] * u[i] * v[i]
        dy.append(1.0 + reaction - (production + 1.0) * u[i] + weight * (u[i - 1] - 2.0 * u[i] + u[i + 1]))
        dy.append(production * u[i] - reaction + weight * (v[i - 1] - 2.0 * v[i] + v[i + 1]))
    return dy


def _brusselator_field(t, y, args):
    u, v = y[0::2], y[1::2]
    weight = args[1] * float((u.size + 1) ** 2)
    reaction = u * u * v
    du = 1.0 + reaction - (args[0] + 1.0) * u + weight * _second_difference(u, 1.0)
    dv = args[0] * u - reaction + weight * _second_difference(v, 3.0)
    return jnp.stack([du, dv], axis=1).reshape(-1)


def _second_difference(u, edge):
    padded = jnp.pad(u, 1, constant_values=edge)
    return padded[:-2] - 2.0 * u + padded[2:]


def brusselator(nodes: int = 64, t1: float = 10.0) -> StiffProblem:
    """Reaction and diffusion on (0, 1) with u = 1 and v = 3 at both ends (Hairer and Wanner, IV.10); args B, diffusion.

    The state is u and v by turns, so that the Jacobian has two diagonals on either side.
    """
    x = np.arange(1, nodes + 1) / (nodes + 1)
    y0 = np.stack([1.0 + np.sin(2 * np.pi * x), np.full(nodes, 3.0)], axis=1).reshape(-1)
    return StiffProblem(
        functools.partial(_brusselator_rows, nodes),
        _brusselator_field,
        y0,
        np.array([3.0, 0.02]),
        t1=t1,
        scale=1.0,
        bandwidth=(2, 2),
    )


PROBLEMS: dict[str, Callable[[], StiffProblem]] = {
    "van_der_pol_10": lambda: van_der_pol(10.0, 20.0),
    "van_der_pol_100": lambda: van_der_pol(100.0, 200.0),
    "van_der_pol_1000": lambda: van_der_pol(1e3, 2e3),
    "van_der_pol_100000": lambda: van_der_pol(1e5, 2e5),
    "van_der_pol_scaled": van_der_pol_scaled,
    "robertson_40": lambda: robertson(40.0),
    "robertson_1e4": lambda: robertson(1e4),
    "robertson_1e8": lambda: robertson(1e8),
    "robertson_1e11": lambda: robertson(1e11),
    "robertson_dae_1e4": lambda: robertson_dae(1e4),
    "hires": hires,
    "orego": orego,
    "pollu": pollu,
    "e5": e5,
    "e5_1e5": lambda: e5(1e5),
    "prothero_robinson": prothero_robinson,
    "brusselator_64": brusselator,
    "brusselator_512": lambda: brusselator(512),
}
