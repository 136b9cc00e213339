"""How long other libraries take for stiff problems and their gradients, and how right they are.

    pip install casadi diffsol-jax diffrax scipy
    python -m benchmarks.stiff_peers --output rows.json [--problems hires pollu] [--libraries diffrax] [--lanes no]

Every row has library, setting, problem, rtol, quantity, seconds (the median of repeated calls), fastest (the
least), cpu_seconds (the median of what the processors spent: steady on a busy machine), error and compile_seconds.
Quantities: `forward` is y(t1); `gradient` is the derivative of a weighted sum of y(t1) with respect to the parameters, by
reverse mode; `forward_mode` the same by forward sensitivities; with `lanes_` before it, of 1,024 random sets of parameters
in one call. All libraries get the same rtol and the same scalar atol, rtol times the problem's `scale`. That does not make
errors equal: compare seconds at equal error. The error of y is that of the worst component, relative to its size plus
`scale`; that of a gradient is relative to its largest entry, all entries multiplied by their parameters. References are
those of tests/references; for lanes, CVODES at rtol 1e-10 on a few of them.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import casadi
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import scipy.integrate

from tests.stiff_problems import PROBLEMS, StiffProblem, reference

NAMES = ("van_der_pol_100", "robertson_1e4", "hires", "pollu")
TOLERANCES = (1e-4, 1e-6, 1e-8)
LANES, CHECKED = 1024, 8
SECONDS, REPEATS = 1.0, 5
MAX_STEPS = 16384

jax.config.update("jax_enable_x64", True)


class Case(NamedTuple):
    """A problem at a tolerance, with the weights of its loss."""

    name: str
    problem: StiffProblem
    weights: np.ndarray
    rtol: float

    @property
    def atol(self) -> float:
        return self.rtol * self.problem.scale


class Timed(NamedTuple):
    """A call of args that is ready to be timed, and the seconds it took to make it so."""

    call: Callable[[np.ndarray], Any]
    compile_seconds: float


class Offer(NamedTuple):
    """What a library computes in one of its settings."""

    library: str
    setting: str
    quantity: str
    make: Callable[[Case], Timed]


# SciPy


def scipy_forward(method: str, case: Case) -> Timed:
    """The right-hand side on Python's floats, Jacobians by SciPy's differences."""
    problem = case.problem

    def call(args: np.ndarray) -> np.ndarray:
        rates = args.tolist()
        solution = scipy.integrate.solve_ivp(
            lambda t, y: problem.rows(t, y.tolist(), rates),
            (problem.t0, problem.t1),
            problem.y0,
            method=method,
            rtol=case.rtol,
            atol=case.atol,
        )
        return solution.y[:, -1]

    return Timed(call, 0.0)


# CVODES


def casadi_integrator(case: Case) -> casadi.Function:
    """CasADi's CVODES with its default settings: BDF, Newton, a dense direct solver, exact Jacobians."""
    problem = case.problem
    y, args = casadi.SX.sym("y", problem.y0.size), casadi.SX.sym("args", problem.args.size)
    system = {"x": y, "p": args, "ode": casadi.vertcat(*problem.rows(0.0, y, args))}
    options = {"reltol": case.rtol, "abstol": case.atol, "max_num_steps": 10**6}
    return casadi.integrator("flow", "cvodes", system, problem.t0, [problem.t1], options)


def casadi_forward(case: Case) -> Timed:
    start = time.perf_counter()
    integrator = casadi_integrator(case)
    call = lambda args: np.array(integrator(x0=case.problem.y0, p=args)["xf"]).ravel()  # noqa: E731
    return Timed(call, time.perf_counter() - start)


def casadi_gradient(case: Case) -> Timed:
    """The solution and CVODES's adjoint in one function, from one forward solve."""
    start = time.perf_counter()
    args = casadi.MX.sym("args", case.problem.args.size)
    end = casadi_integrator(case)(x0=case.problem.y0, p=args)["xf"]
    gradient = casadi.Function("gradient", [args], [casadi.gradient(casadi.dot(case.weights, end), args)])
    return Timed(lambda args: np.array(gradient(args)).ravel(), time.perf_counter() - start)


def casadi_forward_mode(case: Case) -> Timed:
    """CVODES's forward sensitivities."""
    start = time.perf_counter()
    n = case.problem.args.size
    args = casadi.MX.sym("args", n)
    integrator = casadi_integrator(case)
    end = integrator(x0=case.problem.y0, p=args)["xf"]
    tangents = integrator.forward(n)(x0=case.problem.y0, p=args, out_xf=end, fwd_p=casadi.DM.eye(n))["fwd_xf"]
    gradient = casadi.Function("gradient", [args], [casadi.mtimes(casadi.DM(case.weights).T, tangents)])
    return Timed(lambda args: np.array(gradient(args)).ravel(), time.perf_counter() - start)


# JAX


def compiled(function: Callable[..., jax.Array], *examples: Any) -> Timed:
    """Traced, lowered and compiled ahead of time."""
    start = time.perf_counter()
    executable = jax.jit(function).lower(*map(jnp.asarray, examples)).compile()
    return Timed(lambda *args: jax.block_until_ready(executable(*args)), time.perf_counter() - start)


def diffrax_solve(name: str, solver: diffrax.AbstractSolver, adjoint: diffrax.AbstractAdjoint) -> Callable[..., Any]:
    """y(t1) as a function of args and tolerances."""
    problem = PROBLEMS[name]()

    def solve(args: jax.Array, rtol: jax.Array, atol: jax.Array) -> jax.Array:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(problem.field),
            solver,
            problem.t0,
            problem.t1,
            None,
            jnp.asarray(problem.y0),
            args,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            adjoint=adjoint,
            max_steps=MAX_STEPS,
            throw=False,
        )
        return solution.ys[0]

    return solve


def example(case: Case, lanes: bool) -> np.ndarray:
    """The published parameters; in lanes, each multiplied by a random factor between 0.8 and 1.25."""
    if not lanes:
        return case.problem.args
    factors = np.exp(np.random.default_rng(0).uniform(np.log(0.8), np.log(1.25), size=(LANES, case.problem.args.size)))
    return case.problem.args * factors


@functools.cache
def diffrax_compiled(setting: str, quantity: str, lanes: bool, name: str) -> Timed:
    """For all tolerances."""
    solver, weights = DIFFRAX[setting](), reference(name).end.weights[0]
    if quantity == "forward_mode":
        jacobian = jax.jacfwd(diffrax_solve(name, solver, diffrax.ForwardMode()))
        call = lambda *inputs: weights @ jacobian(*inputs)  # noqa: E731
    else:
        solve = diffrax_solve(name, solver, diffrax.RecursiveCheckpointAdjoint())
        call = solve if quantity == "forward" else jax.grad(lambda *inputs: weights @ solve(*inputs))
    call = jax.vmap(call, (0, None, None)) if lanes else call
    return compiled(call, example(Case(name, PROBLEMS[name](), weights, 0.0), lanes), 1e-6, 1e-6)


def diffrax_call(setting: str, quantity: str, lanes: bool, case: Case) -> Timed:
    timed = diffrax_compiled(setting, quantity, lanes, case.name)
    tolerances = jnp.asarray(case.rtol), jnp.asarray(case.atol)
    return timed._replace(call=lambda args: timed.call(args, *tolerances))


def diffsol_call(method: str, quantity: str, case: Case) -> Timed:
    """diffsol through its JAX bindings; its derivative is always that of forward sensitivities."""
    from diffsol_jax import ODEProblem

    problem = case.problem
    if quantity == "forward_mode" and problem.y0.size * (problem.args.size + 1) > 200:
        raise ValueError("the bindings write out one system of all sensitivities, which takes too long to compile")
    wrapped = ODEProblem(lambda t, y, p: tuple(problem.rows(t, y, p)), jnp.asarray(problem.y0), jnp.asarray(problem.args))

    def solve(args: jax.Array) -> jax.Array:
        ts = jnp.array([problem.t0, problem.t1])
        return wrapped.solve(args, ts, ode_solver=method, h0=1e-6, rtol=case.rtol, atol=case.atol)[1][-1]

    return compiled(solve if quantity == "forward" else jax.grad(lambda args: case.weights @ solve(args)), problem.args)


def newton(kind: type[diffrax.AbstractSolver]) -> Callable[[], diffrax.AbstractSolver]:
    """A full Newton iteration to the controller's tolerances, in place of the chord iteration that is the default."""
    return lambda: kind(root_finder=diffrax.with_stepsize_controller_tols(optimistix.Newton)())


DIFFRAX: dict[str, Callable[[], diffrax.AbstractSolver]] = {
    "Kvaerno5": diffrax.Kvaerno5,
    "Kvaerno5, Newton": newton(diffrax.Kvaerno5),
    "Kvaerno3, Newton": newton(diffrax.Kvaerno3),
}


def offers(lanes: bool) -> Iterator[Offer]:
    """All that is timed, of single solves or of lanes."""
    if not lanes:
        for method in ("Radau", "BDF", "LSODA"):
            yield Offer("scipy", method, "forward", functools.partial(scipy_forward, method))
        yield Offer("casadi", "CVODES", "forward", casadi_forward)
        yield Offer("casadi", "CVODES", "gradient", casadi_gradient)
        yield Offer("casadi", "CVODES", "forward_mode", casadi_forward_mode)
        for method in ("bdf", "tr_bdf2", "esdirk34"):
            for quantity in ("forward", "forward_mode"):
                yield Offer("diffsol-jax", method, quantity, functools.partial(diffsol_call, method, quantity))
    for setting in DIFFRAX:
        for quantity in ("forward", "gradient", "forward_mode"):
            prefix = "lanes_" if lanes else ""
            yield Offer("diffrax", setting, prefix + quantity, functools.partial(diffrax_call, setting, quantity, lanes))


# Measurements


def seconds_of(timed: Timed, args: np.ndarray) -> dict[str, float]:
    """Of at least `REPEATS` calls and `SECONDS`, or of one call where that is long, after a first one."""
    begin = time.perf_counter()
    timed.call(args)
    first = time.perf_counter() - begin
    wall: list[float] = []
    processor: list[float] = []
    while len(wall) < (1 if first > 10 * SECONDS else REPEATS) or (sum(wall) < SECONDS and len(wall) < 1000):
        begin, used = time.perf_counter(), time.process_time()
        timed.call(args)
        wall.append(time.perf_counter() - begin)
        processor.append(time.process_time() - used)
    return {"seconds": statistics.median(wall), "fastest": min(wall), "cpu_seconds": statistics.median(processor)}


def error_of(case: Case, quantity: str, got: np.ndarray, ys: np.ndarray, gradient: np.ndarray, args: np.ndarray) -> float:
    """See the module's docstring."""
    if quantity.endswith("forward"):
        return float(np.max(np.abs(got - ys) / (np.abs(ys) + case.problem.scale)))
    return float(np.max(np.abs((got - gradient) * args)) / np.max(np.abs(gradient * args)))


@functools.cache
def lanes_reference(name: str) -> tuple[np.ndarray, np.ndarray]:
    """y(t1) and gradients of the first lanes by CVODES."""
    case = Case(name, PROBLEMS[name](), reference(name).end.weights[0], 1e-10)
    sets = example(case, True)[:CHECKED]
    forward, gradient = casadi_forward(case), casadi_forward_mode(case)
    return np.array([forward.call(args) for args in sets]), np.array([gradient.call(args) for args in sets])


def measure(case: Case, offer: Offer) -> dict[str, Any]:
    """One row."""
    lanes = offer.quantity.startswith("lanes_")
    row = {"library": offer.library, "setting": offer.setting, "problem": case.name, "rtol": case.rtol}
    row["quantity"] = offer.quantity
    try:
        args = example(case, lanes)
        timed = offer.make(case)
        got = np.asarray(timed.call(jnp.asarray(args) if offer.library in ("diffrax", "diffsol-jax") else args))
        if lanes:
            expected = lanes_reference(case.name)
            errors = [
                error_of(case, offer.quantity, got[i], expected[0][i], expected[1][i], args[i]) for i in range(CHECKED)
            ]
            error = float(np.max(errors))
            row["failed_lanes"] = int(np.sum(~np.all(np.isfinite(got), axis=-1)))
        else:
            stored = reference(case.name)
            error = error_of(case, offer.quantity, got, stored.ys[-1], stored.end.args, args)
        timing = seconds_of(timed, jnp.asarray(args) if offer.library in ("diffrax", "diffsol-jax") else args)
        return row | timing | {"error": error, "compile_seconds": timed.compile_seconds}
    except Exception as problem:  # a peer that cannot solve a problem is a result
        return row | {"failure": traceback.format_exception_only(problem)[-1].strip()[:300]}


def main() -> None:
    """Prints rows as they come and writes them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--problems", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--libraries", nargs="+", default=("scipy", "casadi", "diffsol-jax", "diffrax"))
    parser.add_argument("--tolerances", nargs="+", type=float, default=TOLERANCES)
    parser.add_argument("--lanes", choices=("no", "only", "too"), default="too")
    chosen = parser.parse_args()
    rows = []
    for lanes in (False, True):
        if chosen.lanes == ("only" if not lanes else "no"):
            continue
        for name in chosen.problems:
            for rtol in chosen.tolerances:
                case = Case(name, PROBLEMS[name](), reference(name).end.weights[0], rtol)
                for offer in offers(lanes):
                    if offer.library in chosen.libraries:
                        rows.append(measure(case, offer))
                        print(json.dumps(rows[-1]), flush=True)
                        chosen.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
