"""Makes stiff.json: solutions of stiff problems and gradients of losses of them, with an estimate of their errors.

    pip install scipy casadi mpmath jax && python tests/references/make_stiff.py [name ...]

The values stored come from collocation at the seven Radau points (Radau IIA of order 13) with a full Newton iteration
at every step, and from the linear systems of the same steps for the derivatives with respect to args and y0: the exact
derivative of a solution of order 13. It is written
out here in NumPy's extended precision and shares nothing with the package. Four
estimates of the error are stored, as the largest deviation relative to the largest entry, of the solution's components
each relative to itself and of the derivatives with respect to logarithms of what is not zero:

- `tolerance`: against the same at a tolerance a hundred times larger;
- `differences`: derivatives in four random directions, against extrapolated central differences of such solutions;
- `scipy`: against SciPy's Radau on the variational equations at rtol 1e-9, or 1e-7 where that takes too long;
- `cvodes`: against CVODES (or IDAS, for the DAE) with forward sensitivities, through CasADi, at rtol
  1e-12 (1e-10).

`digits` is -log10 of the worse of `tolerance` and `differences`. The other two, whose equations and steps are independent
of these, agree as far as their own errors allow: to 10 digits mostly, to few where a relaxation oscillation jumps.
"""

import argparse
import itertools
import json
import pathlib
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import casadi
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import scipy.integrate
import scipy.linalg
import scipy.special

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import stiff_problems

TIMES: dict[str, list[float]] = {
    "van_der_pol_10": [5.0, 10.0, 15.0, 20.0],
    "van_der_pol_100": [50.0, 100.0, 150.0, 200.0],
    "van_der_pol_1000": [500.0, 1000.0, 1500.0, 2000.0],
    "van_der_pol_100000": [5e4, 1e5, 1.5e5, 2e5],
    "robertson_40": [0.4, 4.0, 40.0],
    "robertson_1e4": [1.0, 10.0, 100.0, 1e3, 1e4],
    "robertson_1e8": [1.0, 1e2, 1e4, 1e6, 1e8],
    "robertson_1e11": [1.0, 1e5, 1e11],
    "robertson_dae_1e4": [1.0, 10.0, 100.0, 1e3, 1e4],
    "hires": [5.0, 50.0, 200.0, 321.8122],
    "orego": [60.0, 150.0, 240.0, 360.0],
    "pollu": [1.0, 10.0, 30.0, 60.0],
    "e5_1e5": [10.0, 1e3, 1e5],
    "brusselator_64": [2.5, 5.0, 10.0],
}
"""Observation times; the last is t1."""
TOLERANCE = 1e-12
STAGES = 7
STEPS = {"van_der_pol_1000": 1e-8, "van_der_pol_100000": 1e-11}
"""Of the central differences, in units of each parameter; 1e-5 but where the time of a jump would move by its length."""

jax.config.update("jax_enable_x64", True)


class Flow(NamedTuple):
    """y at the observation times, and its derivatives with respect to args and then y0: (times, n) and (times, n, p)."""

    ys: np.ndarray
    sensitivities: np.ndarray


class Dual(NamedTuple):
    """A number of the form value + tangent · e with e² = 0, for right-hand sides in extended precision."""

    value: Any
    tangent: Any

    def __add__(self, other: Any) -> "Dual":
        other = dual(other)
        return Dual(self.value + other.value, self.tangent + other.tangent)

    def __neg__(self) -> "Dual":
        return Dual(-self.value, -self.tangent)

    def __sub__(self, other: Any) -> "Dual":
        other = dual(other)
        return Dual(self.value - other.value, self.tangent - other.tangent)

    def __rsub__(self, other: Any) -> "Dual":
        return dual(other) - self

    def __mul__(self, other: Any) -> "Dual":
        other = dual(other)
        return Dual(self.value * other.value, self.tangent * other.value + self.value * other.tangent)

    def __truediv__(self, other: Any) -> "Dual":
        other = dual(other)
        value = self.value / other.value
        return Dual(value, (self.tangent - value * other.tangent) / other.value)

    __radd__ = __add__
    __rmul__ = __mul__


def sizes_of_inputs(problem: stiff_problems.StiffProblem) -> np.ndarray:
    """The units of args and y0."""
    return np.concatenate([np.abs(problem.args), np.maximum(np.abs(problem.y0), problem.scale)])


def dual(x: Any) -> Dual:
    return x if isinstance(x, Dual) else Dual(x, 0.0)


def radau_points(stages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, the matrix of integrals, and the row that gives the highest Legendre coefficient of (0, 0), (c, Y - y0)."""

    def extended(x: Any) -> np.longdouble:
        return np.longdouble(mpmath.nstr(x, 30))

    with mpmath.workdps(40):
        guesses, _ = scipy.special.roots_jacobi(stages - 1, 1.0, 0.0)
        inner = [mpmath.findroot(lambda x: mpmath.jacobi(stages - 1, 1, 0, x), float(guess)) for guess in guesses]
        nodes = [*((x + 1) / 2 for x in inner), mpmath.mpf(1)]
        powers = mpmath.matrix([[c**k for k in range(stages)] for c in nodes])
        integrals = mpmath.matrix([[c ** (k + 1) / (k + 1) for k in range(stages)] for c in nodes])
        matrix = integrals * powers**-1
        c = np.array([extended(c) for c in nodes])
        a = np.array([[extended(matrix[i, j]) for j in range(stages)] for i in range(stages)])
    legendre = np.polynomial.legendre.legvander(2 * np.append(0.0, c.astype(float)) - 1, stages)
    return c, a, np.linalg.inv(legendre)[-1, 1:]


class Collocation:
    """Radau IIA of order 13 with the exact derivatives of its steps.

    States and residuals are in extended precision; matrices are factorised in double, and iterations refine the result.
    Residuals must not be compiled by XLA: it contracts products and sums differently in each row, which then no longer
    conserve to the last digit what the equations conserve.
    """

    def __init__(self, problem: stiff_problems.StiffProblem, tolerance: float):
        self.nodes, self.matrix, self.highest = radau_points(STAGES)
        self.problem, self.tolerance, n = problem, tolerance, problem.y0.size
        self.mass = np.eye(n) if problem.mass is None else problem.mass
        self.args = problem.args.astype(np.longdouble)
        args = jnp.asarray(problem.args)
        self.jacobian = jax.jit(jax.vmap(lambda t, y: jax.jacfwd(problem.field, 1)(t, y, args)))

    def residual(self, t: np.ndarray, h: Any, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """What the collocation equations lack, (stages, n)."""
        rows = self.problem.rows(t, list((y + z).T), list(self.args))
        slopes = np.stack([np.broadcast_to(row, t.shape) for row in rows], axis=1)
        return z @ self.mass.T - h * (self.matrix @ slopes)

    def linear_residual(self, t: np.ndarray, h: Any, y: np.ndarray, s: np.ndarray, zs: np.ndarray) -> np.ndarray:
        """The same for the derivatives, (stages, n, p)."""
        along_args = np.eye(self.args.size, s.shape[-1], dtype=np.longdouble)
        states = [Dual(y[:, i, None], s[i] + zs[:, i]) for i in range(s.shape[0])]
        parameters = [Dual(value, tangent) for value, tangent in zip(self.args, along_args, strict=True)]
        rows = self.problem.rows(t[:, None], states, parameters)
        slopes = np.stack([row.tangent for row in rows], axis=1)
        return self.mass @ zs - h * np.tensordot(self.matrix, slopes, 1)

    def newton(self, ts: np.ndarray, h: Any, y: np.ndarray) -> tuple[np.ndarray, Any] | None:
        """Increments of y at all nodes, and the last matrix's factors; None where it does not converge."""
        n = y.size
        z, previous = np.zeros((STAGES, n), np.longdouble), np.inf
        size = np.abs(y) + self.problem.scale * 1e-6
        for _ in range(20):
            residual = self.residual(ts, h, y, z).astype(float)
            jacobians = np.asarray(self.jacobian(ts.astype(float), (y + z).astype(float)))
            if not np.all(np.isfinite(residual)) or not np.all(np.isfinite(jacobians)):
                return None
            blocks = float(h) * self.matrix.astype(float)[:, :, None, None] * jacobians[None]
            system = (np.eye(STAGES)[:, :, None, None] * self.mass - blocks).transpose(0, 2, 1, 3)
            factors = scipy.linalg.lu_factor(system.reshape(STAGES * n, STAGES * n))
            change = scipy.linalg.lu_solve(factors, residual.reshape(-1)).reshape(STAGES, n)
            z = z - change
            now = np.max(np.abs(change) / np.maximum(size, np.abs(y + z)))
            if now < 1e-18 or (now < 1e-12 and now > 0.2 * previous):
                break
            previous = now
        else:
            return None
        return z, factors

    def step(self, t: float, h: float, y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Increments of y and of the derivatives at all nodes; None where Newton does not converge."""
        h, ts = np.longdouble(h), np.longdouble(t) + np.longdouble(h) * self.nodes
        converged = self.newton(ts, h, y)
        if converged is None:
            return None
        z, factors = converged
        zs = np.zeros((STAGES, *s.shape), np.longdouble)
        for _ in range(3):
            residual = self.linear_residual(ts, h, y + z, s, zs).astype(float)
            zs = zs - scipy.linalg.lu_solve(factors, residual.reshape(STAGES * y.size, -1)).reshape(zs.shape)
        return z, zs

    def solve(self, ts: list[float]) -> Flow:
        """Steps that end at every observation time, as long as the highest coefficients are small; kept in `grid`."""
        problem = self.problem
        y, s, t = problem.y0.astype(np.longdouble), self.start().astype(np.longdouble), problem.t0
        ys, sensitivities, h = [], [], 1e-6 * min(ts)
        self.grid: list[list[tuple[float, float]]] = []
        for end in ts:
            self.grid.append([])
            while t < end:
                last = t + 1.01 * h >= end
                used = end - t if last else h
                increments = self.step(t, used, y, s)
                if increments is None:
                    h = used / 4
                    continue
                z, zs = increments
                floor = self.floor(np.abs(y) + problem.scale, s + zs)
                error = max(self.tail(z, y, problem.scale), self.tail(zs.reshape(STAGES, -1), s.ravel(), floor))
                factor = 0.8 * (self.tolerance / max(error, 1e-30)) ** (1 / STAGES)
                if error < self.tolerance:
                    self.grid[-1].append((t, used))
                    y, s, t = y + z[-1], s + zs[-1], end if last else t + used
                    h = max(h, used * min(4.0, max(1.0, factor))) if last else used * min(4.0, factor)
                else:
                    h = used * max(0.2, factor)
            ys.append(y)
            sensitivities.append(s)
        return Flow(np.array(ys), np.array(sensitivities))

    def again(self, args: np.ndarray, y0: np.ndarray) -> np.ndarray:
        """States at the observation times on the grid of `solve`, of other parameters and initial values."""
        self.args, y, ys = args, y0, []
        for interval in self.grid:
            for t, h in interval:
                h = np.longdouble(h)
                converged = self.newton(np.longdouble(t) + h * self.nodes, h, y)
                assert converged is not None
                y = y + converged[0][-1]
            ys.append(y)
        self.args = self.problem.args.astype(np.longdouble)
        return np.array(ys)

    def start(self) -> np.ndarray:
        """dy/d(args, y0) at t0: where an equation is algebraic, its component follows the others."""
        problem, n = self.problem, self.problem.y0.size
        s = np.eye(n)
        if problem.mass is not None:
            algebraic = ~np.any(problem.mass, axis=1)
            jacobian = np.asarray(
                jax.jacfwd(problem.field, 1)(problem.t0, jnp.asarray(problem.y0), jnp.asarray(problem.args))
            )
            rows = jacobian[algebraic]
            s[np.ix_(algebraic, ~algebraic)] = -np.linalg.solve(rows[:, algebraic], rows[:, ~algebraic])
            s[:, algebraic] = 0.0
        return np.concatenate([np.zeros((n, problem.args.size)), s], axis=1)

    def floor(self, sizes: np.ndarray, stages: np.ndarray) -> np.ndarray:
        """Sizes of derivatives that do not matter, beside those of other components or of other inputs, in their units."""
        relative = (np.abs(stages) / sizes[:, None]).max(axis=(0, 1))
        return (sizes[:, None] * (1e-3 * relative + 1e-6 / sizes_of_inputs(self.problem))).ravel()

    def tail(self, z: np.ndarray, y: np.ndarray, floor: Any) -> float:
        """The highest Legendre coefficient of the collocation polynomial, beside the size of the component."""
        size = np.maximum(np.abs(y), np.abs(y + z).max(axis=0)) + floor
        return float(np.max(np.abs(self.highest @ z) / size))


class ExpensiveError(Exception):
    """A solver takes more steps than are worth it."""


def differences_flow(solved: Collocation, columns: np.ndarray, step: float) -> Flow:
    """Extrapolated central differences in some directions of (args, y0), of solutions in extended precision."""
    problem, p = solved.problem, solved.problem.args.size
    start = solved.start()[:, p:]
    args, y0, h = problem.args.astype(np.longdouble), problem.y0.astype(np.longdouble), np.longdouble(step)
    tangents = []
    for column in columns.T.astype(np.longdouble):
        along_args, along_y0 = column[:p], start @ column[p:]
        ends = {k: solved.again(args + k * h * along_args, y0 + k * h * along_y0) for k in (-2, -1, 1, 2)}
        tangents.append((8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * h))
    return Flow(solved.again(args, y0), np.stack(tangents, axis=-1))


def scipy_flow(problem: stiff_problems.StiffProblem, ts: list[float], columns: np.ndarray) -> Flow | None:
    """The variational equations by SciPy's Radau, at the smallest tolerance that is affordable.

    `columns` are those directions of (args, y0) that are asked for.
    """
    for rtol in (1e-9, 1e-7):
        try:
            return scipy_flow_at(problem, ts, columns, rtol)
        except ExpensiveError:
            print(f"SciPy's Radau is too slow at {rtol:.0e}", file=sys.stderr)
    return None


def scipy_flow_at(problem: stiff_problems.StiffProblem, ts: list[float], columns: np.ndarray, rtol: float) -> Flow:
    """The same at a given tolerance."""
    n, p = problem.y0.size, problem.args.size
    field, args = problem.field, jnp.asarray(problem.args)
    along_args, along_y = jnp.asarray(columns[:p].T), columns[p:].T

    def augmented(t: Any, packed: Any) -> Any:
        blocks = packed.reshape(-1, n)

        def directional(s: Any, direction: Any) -> Any:
            return jax.jvp(lambda y, args: field(t, y, args), (blocks[0], args), (s, direction))[1]

        return jnp.concatenate([field(t, blocks[0], args), jax.vmap(directional)(blocks[1:], along_args).reshape(-1)])

    units = np.maximum(np.abs(problem.y0), problem.scale * 1e-2)
    per_parameter = np.abs(columns[:p]).T @ (1 / np.abs(problem.args)) + np.abs(along_y) @ (1 / units)
    atol = 0.1 * rtol * problem.scale * np.concatenate([np.ones(n), np.repeat(per_parameter, n)])
    rhs, jac = jax.jit(augmented), jax.jit(jax.jacfwd(augmented, 1))
    calls = itertools.count()

    def counted(t: float, packed: np.ndarray) -> np.ndarray:
        if next(calls) > 3 * 10**4:
            raise ExpensiveError
        return np.asarray(rhs(t, packed))

    solution = scipy.integrate.solve_ivp(
        counted,
        (problem.t0, ts[-1]),
        np.concatenate([problem.y0, along_y.ravel()]),
        method="Radau",
        t_eval=ts,
        rtol=rtol,
        atol=atol,
        jac=lambda t, packed: np.asarray(jac(t, packed)),
    )
    assert solution.success, solution.message
    blocks = solution.y.T.reshape(len(ts), -1, n)
    return Flow(blocks[:, 0], blocks[:, 1:].transpose(0, 2, 1))


def cvodes_flow(problem: stiff_problems.StiffProblem, ts: list[float]) -> Flow:
    """CVODES or IDAS with forward sensitivities, the error control of which includes the sensitivities."""
    n, p, steps = problem.y0.size, problem.args.size, len(ts)
    y, factors = casadi.SX.sym("y", n), casadi.SX.sym("factors", p)
    rows = casadi.vertcat(*problem.rows(0.0, y, problem.args * factors))
    algebraic = [] if problem.mass is None else [i for i in range(n) if not problem.mass[i].any()]
    differential = [i for i in range(n) if i not in algebraic]
    system = {"x": y[differential], "p": factors, "ode": rows[differential]}
    if algebraic:
        system |= {"z": y[algebraic], "alg": rows[algebraic]}
    tolerances = {"reltol": 1e-10, "abstol": 1e-15} if algebraic else {"reltol": 1e-12, "abstol": 1e-14 * problem.scale}
    options = tolerances | {"fsens_err_con": True, "max_num_steps": 10**6}
    integrator = casadi.integrator("flow", "idas" if algebraic else "cvodes", system, problem.t0, ts, options)
    start = {"x0": problem.y0[differential], "z0": problem.y0[algebraic], "p": np.ones(p)}
    ends, seeds = integrator(**start), np.eye(p + len(differential))
    tangents = integrator.forward(len(seeds))(**start, fwd_p=seeds[:p], fwd_x0=seeds[p:])
    ys, s = np.zeros((steps, n)), np.zeros((steps, n, p + n))
    columns = [*range(p), *(p + i for i in differential)]
    for which, indices in (("xf", differential), ("zf", algebraic)):
        if indices:
            ys[:, indices] = np.array(ends[which]).T
            by_direction = np.array(tangents[f"fwd_{which}"]).reshape(len(indices), len(seeds), steps)
            s[np.ix_(range(steps), indices, columns)] = by_direction.transpose(2, 0, 1)
    s[:, :, :p] /= problem.args
    return Flow(ys, s)


def weights_of(flow: Flow, scale: float) -> np.ndarray:
    """One weight for every observed component, of the order of its inverse, with few digits."""
    signs = np.cos(1.0 + np.arange(flow.ys.size)).reshape(flow.ys.shape)
    return np.array([[float(f"{w:.3g}") for w in row] for row in signs / (np.abs(flow.ys) + scale)])


class Derivatives(NamedTuple):
    """A loss and its gradient with respect to (args, y0)."""

    value: float
    gradient: np.ndarray


def loss_of(flow: Flow, weights: np.ndarray) -> Derivatives:
    """The loss of the last rows of the flow, as many as there are weights."""
    rows = len(weights)
    return Derivatives(
        float(np.sum(weights * flow.ys[-rows:])), np.einsum("ti,tip->p", weights, flow.sensitivities[-rows:])
    )


def deviation(sizes: np.ndarray, got: np.ndarray, expected: np.ndarray, columns: np.ndarray) -> float:
    """The largest difference of derivatives along some directions of inputs of some sizes, beside the largest of them."""
    units = np.linalg.norm(columns / sizes[:, None], axis=0)
    return float(np.max(np.abs(got - expected) / units) / np.max(np.abs(expected) / units))


def make(name: str) -> dict[str, Any]:
    """One entry of the file."""
    problem, ts = stiff_problems.PROBLEMS[name](), TIMES[name]
    p, n = problem.args.size, problem.y0.size
    solved = Collocation(problem, TOLERANCE)
    best = solved.solve(ts)
    everything = np.eye(p + n)
    sizes = sizes_of_inputs(problem)
    few = np.random.default_rng(0).normal(size=(p + n, 4)) * sizes[:, None]
    directions = everything if n <= 16 else few
    others: dict[str, Callable[[], tuple[Flow | None, np.ndarray]]] = {
        "tolerance": lambda: (Collocation(problem, 100 * TOLERANCE).solve(ts), everything),
        "differences": lambda: (differences_flow(solved, few, STEPS.get(name, 1e-5)), few),
        "cvodes": lambda: (cvodes_flow(problem, ts), everything),
    }
    if problem.mass is None:
        others["scipy"] = lambda: (scipy_flow(problem, ts, directions), directions)
    weights = {"path": weights_of(best, problem.scale)}
    weights["end"] = weights["path"][-1:]
    losses = {key: loss_of(best, w) for key, w in weights.items()}
    checks: dict[str, dict[str, float]] = {"end": {}, "path": {}, "solution": {}}
    for other, compute in others.items():
        start = time.perf_counter()
        flow, columns = compute()
        if flow is None:
            continue
        for key, w in weights.items():
            checks[key][other] = deviation(sizes, loss_of(flow, w).gradient, losses[key].gradient @ columns, columns)
        checks["solution"][other] = float(np.max(np.abs(flow.ys - best.ys) / (np.abs(best.ys) + problem.scale)))
        print(f"{name} {other}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    entry: dict[str, Any] = {"ts": ts, "ys": best.ys.astype(float).tolist(), "checks": checks}
    for key, loss in losses.items():
        worst = max(checks[key]["tolerance"], checks[key]["differences"], 1e-16)
        entry[key] = {
            "weights": weights[key].tolist(),
            "value": loss.value,
            "args": loss.gradient[:p].astype(float).tolist(),
            "y0": loss.gradient[p:].astype(float).tolist(),
            "digits": round(-np.log10(worst), 1),
        }
    return entry


def main() -> None:
    """Replaces the entries named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*TIMES, []])
    names = parser.parse_args().names or list(TIMES)
    path = stiff_problems.REFERENCES
    for name in names:
        made = make(name)
        stored = (json.loads(path.read_text()) if path.exists() else {}) | {name: made}
        ordered = {key: stored[key] for key in TIMES if key in stored}
        path.write_text(json.dumps(ordered, indent=1) + "\n")
        rounded = {key: {k: f"{v:.1e}" for k, v in checks.items()} for key, checks in stored[name]["checks"].items()}
        print(name, stored[name]["end"]["digits"], stored[name]["path"]["digits"], rounded, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("error", RuntimeWarning)
    main()
