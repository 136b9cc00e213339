"""`check_gradients` and `gradient_report`: reverse-mode gradients against finite differences, leaf by leaf."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, Int, PyTree

from adjoint_jax import tree
from adjoint_jax.diagnostics.finite_differences import RUNGS, Derivative, Values, differentiate, ladder
from adjoint_jax.diagnostics.gradient_report import Comparison, GradientReport, Verdict
from adjoint_jax.diagnostics.losses import differentiable, real_scalar
from adjoint_jax.tree import Arrays, Scalar

Loss = Callable[[PyTree[Any]], Any]


def check_gradients(loss: Loss, inputs: PyTree[Any], *, allow_undecided: bool = False, **options: Any) -> None:
    """Raise `GradientError`, an `AssertionError` with a table of all leaves, unless the gradient of `loss` is right.

    For test suites: `check_gradients(loss, inputs)` is a test by itself. Arguments, `options` and other errors are those of
    `gradient_report`, which returns the table instead.

    - `allow_undecided`: let a leaf pass where finite differences cannot tell whether its gradient is right. By default that
      is a failure: a test that decides nothing should not look like one that passed. Better than to allow it is to make
      the loss smoother (a tighter tolerance, or a fixed grid) or to ask for less (a larger `rtol`).
    """
    gradient_report(loss, inputs, **options).raise_if_wrong(allow_undecided=allow_undecided)


def gradient_report(
    loss: Loss,
    inputs: PyTree[Any],
    *,
    in_axes: PyTree[int | None] = None,
    directions: int = 2,
    rtol: float | None = None,
    atol: float | None = None,
    largest_step: float | None = None,
    batch_size: int | None = 64,
    seed: int = 0,
) -> GradientReport:
    """Compare the reverse-mode gradient of `loss` with finite differences along random directions.

    - `loss(inputs)`: a real floating-point scalar. It is traced and compiled once.
    - `inputs`: any pytree. Its real and complex floating-point arrays, of any shapes and dtypes, are differentiated; the
      rest is passed on as it is, Python floats too.
    - `in_axes`: as in `jax.vmap`, for inputs with an axis of lanes: `loss` is applied lane by lane, and every lane is
      judged for itself. By default there are no lanes.
    - `directions`: how many random directions for every leaf alone, and again for all leaves together.
    - `rtol`, `atol`: the error of a derivative that is allowed, relative to the derivative's size and absolute. By default
      rtol is the cube root of the machine epsilon (6e-6 in float64, 5e-3 in float32; of the coarsest dtype among the
      leaves) and atol is rtol² times the size of the loss.
    - `largest_step`: the coarsest of twelve steps in geometric progression, relative to each leaf's root mean square (to 1
      if that is 0). By default 0.018 in float64, 0.17 in float32. A smaller one keeps steps inside the domain of the loss.
    - `batch_size`: how many evaluations `jax.vmap` does at once, which bounds memory; there are 24 for each direction. None
      evaluates one after the other, without `vmap`. All lanes are evaluated together in either case. Besides these,
      2 * `directions` copies of the inputs are kept.
    - `seed`: of the random directions.

    A derivative is judged WRONG if it differs from the numerical one by more than the tolerance and by more than the error
    that finite differences confess; RIGHT if the difference and that error are within the tolerance; else UNDECIDED.
    Numerical derivatives are extrapolated central differences (Ridders 1982; see `finite_differences.py`). A step to where
    the loss is NaN or infinite is left out (with `throw=False`, solves that fail are NaN). Kinks are undecided.

    What to expect of an ODE's loss: adaptive steps are constants of the derivative but change with the inputs, so that
    finite differences differ from the gradient by some ten or hundred times the tolerance of the solve, and it is WRONG
    if that is larger than `rtol`: choose tolerances far below it, or a fixed grid.
    Derivatives with respect to t0, t1 and save times are those of the flow: on a coarse fixed grid they differ from finite
    differences by the method's error, and are rightly reported as WRONG if that is larger than `rtol`.

    Raises `TypeError` if `loss` is no function or returns anything but a real floating-point scalar, `ValueError` if inputs
    hold no array to differentiate, the loss at the inputs is not finite, or an option makes no sense.
    """
    _check_options(loss, directions, batch_size, {"rtol": rtol, "atol": atol, "largest_step": largest_step})
    arrays, static = eqx.partition(inputs, eqx.is_array)
    arrays = tree.map(jnp.asarray, arrays)
    paths, epsilon = _coarsest(arrays)
    steps = ladder(epsilon, largest_step)
    plan = _plan(len(paths), directions, steps, batch_size)
    measured = _measure(loss, arrays, static, in_axes, plan, jax.random.key(seed))
    _check_finite(measured.value, in_axes is not None)
    judgement = _judge(measured, steps, epsilon, math.cbrt(epsilon) if rtol is None else rtol, atol)
    return _report(paths, in_axes is not None, judgement)


# What is measured


class Direction(NamedTuple):
    """The `draw`-th random vector, restricted to the leaf of this index; to all if it is the number of leaves."""

    draw: Int[Array | np.ndarray, "*points"]
    leaf: Int[Array | np.ndarray, "*points"]


class Plan(NamedTuple):
    """Where the loss is evaluated: from x along every direction by every step, ahead and behind.

    `of_point` and `by_step` say it point by point, in the order (directions, 2, rungs), whole batches of points."""

    draws: int
    directions: Direction
    of_point: Direction
    by_step: Float[Array | np.ndarray, " points"]
    batch_size: int | None


class Measurement(NamedTuple):
    """For every lane: the loss, what its gradient says of each direction, and the losses along it.

    `slopes` are the directional derivatives by the gradient, `scales` their sizes for random signs."""

    value: Float[Array, " lanes"]
    slopes: Float[Array, "lanes directions"]
    scales: Float[Array, "lanes directions"]
    losses: Float[Array, "lanes directions 2 rungs"]


def _plan(leaves: int, directions: int, steps: Float[np.ndarray, " rungs"], batch_size: int | None) -> Plan:
    """`directions` draws for the leaves, each leaf of its own, and as many for all of them together.

    The last batch is filled up with points that occur before: a smaller one would be compiled a second time.
    """
    single = np.indices((directions, leaves)).reshape(2, -1)
    joint = np.stack([np.arange(directions, 2 * directions), np.full(directions, leaves)])
    draw, leaf = np.concatenate([single, joint], axis=1)
    of_point, of_step = (part.ravel() for part in np.indices((leaf.size, 2 * steps.size)))
    batch = 1 if batch_size is None else min(batch_size, of_point.size)
    filled = np.arange(-(-of_point.size // batch) * batch) % of_point.size
    of_point, of_step = of_point[filled], of_step[filled]
    return Plan(
        draws=2 * directions,
        directions=Direction(draw, leaf),
        of_point=Direction(draw[of_point], leaf[of_point]),
        by_step=np.append(steps, -steps)[of_step],
        batch_size=None if batch_size is None else batch,
    )


@eqx.filter_jit
def _measure(loss: Loss, arrays: Arrays, static: Any, in_axes: Any, plan: Plan, key: Any) -> Measurement:
    """The whole measurement in one program, lane by lane; without lanes, for a single one."""

    def measure(arrays: Arrays) -> Measurement:
        return _measure_lane(loss, eqx.combine(arrays, static), plan, key)

    return jax.vmap(measure, in_axes=(in_axes,), axis_size=1 if in_axes is None else None)(arrays)


def _measure_lane(loss: Loss, inputs: PyTree[Any], plan: Plan, key: Any) -> Measurement:
    diff, rest = eqx.partition(inputs, eqx.is_inexact_array)
    x, structure = jax.tree.flatten(diff)
    vectors = _random_vectors(x, plan.draws, key)

    def evaluate(x: list[Array]) -> Scalar:
        return real_scalar(loss(eqx.combine(jax.tree.unflatten(structure, x), rest)))

    def along(direction: Direction) -> list[Array]:
        alone = [(direction.leaf == i) | (direction.leaf == len(x)) for i in range(len(x))]
        return [jnp.where(moves, rows[direction.draw], 0) for moves, rows in zip(alone, vectors, strict=True)]

    value, gradient = jax.value_and_grad(evaluate)(x)

    def slope(direction: Direction) -> tuple[Scalar, Scalar]:
        v = along(direction)
        squares = [jnp.sum(jnp.where(part == 0, 0, jnp.abs(g * part)) ** 2) for g, part in zip(gradient, v, strict=True)]
        # In this order the gradient of a leaf that does not move may be NaN.
        return tree.pairing(v, gradient), jnp.sqrt(sum(squares))

    def moved(point: tuple[Direction, Scalar]) -> Scalar:
        direction, step = point
        return evaluate(tree.add(x, tree.scale(step, along(direction))))

    slopes, scales = jax.lax.map(slope, plan.directions)
    losses = jax.lax.map(moved, (plan.of_point, plan.by_step), batch_size=plan.batch_size)
    shape = (slopes.size, 2, RUNGS)
    return Measurement(value, slopes, scales, losses[: math.prod(shape)].reshape(shape))


def _random_vectors(x: list[Array], draws: int, key: Any) -> list[Inexact[Array, "draws ..."]]:
    """Vectors of the size of each leaf, with random signs (phases, if complex) and magnitudes.

    No entry is much smaller than others, so that all leaves are moved by the steps they are meant to be moved by; equal
    magnitudes would not notice two entries of a gradient that have changed places.
    """

    def vectors(leaf: Array, numbers: Float[Array, "2 draws size"]) -> Array:
        size = jnp.sqrt(jnp.mean(jnp.abs(leaf) ** 2))
        angle, magnitude = numbers.reshape(2, draws, *leaf.shape)
        phase = jnp.exp(2j * jnp.pi * angle) if jnp.iscomplexobj(leaf) else jnp.where(angle < 0.5, -1, 1)
        return (jnp.where(size > 0, size, 1) * (0.5 + 0.5 * magnitude) * phase).astype(leaf.dtype)

    ends = np.cumsum([leaf.size for leaf in x])
    uniform = jax.random.uniform(key, (2, draws, int(ends[-1])))
    return [vectors(leaf, numbers) for leaf, numbers in zip(x, jnp.split(uniform, ends[:-1], axis=-1), strict=True)]


# What is made of it


class Judgement(NamedTuple):
    """The measurement and the numerical derivatives, with errors and verdicts, for all lanes and directions."""

    slopes: Float[np.ndarray, "lanes directions"]
    numerical: Derivative
    relative_errors: Float[np.ndarray, "lanes directions"]
    verdicts: Int[np.ndarray, "lanes directions"]


def _judge(
    measured: Measurement, steps: Float[np.ndarray, " rungs"], epsilon: float, rtol: float, atol: float | None
) -> Judgement:
    value, slopes, scales, losses = (np.asarray(part, np.float64) for part in measured)
    centre = np.broadcast_to(value[:, None], slopes.shape)
    numerical = differentiate(Values(losses[:, :, 0], losses[:, :, 1], centre), steps, epsilon)
    sizes = np.fmax(scales, np.abs(numerical.value))
    tolerance = rtol * sizes + (rtol**2 * np.abs(centre) if atol is None else atol)
    with np.errstate(invalid="ignore"):
        difference = np.abs(slopes - numerical.value)
        relative = np.divide(difference, sizes, out=np.zeros_like(difference), where=sizes != 0)
    is_wrong = ~np.isfinite(slopes) | ((difference > tolerance) & (difference > numerical.uncertainty))
    is_right = np.isfinite(tolerance) & (difference <= tolerance) & (numerical.uncertainty <= tolerance)
    verdicts = np.select([is_wrong, is_right], [Verdict.WRONG, Verdict.RIGHT], Verdict.UNDECIDED)
    return Judgement(slopes, numerical, np.nan_to_num(relative, nan=np.inf, posinf=np.inf), verdicts)


def _report(paths: list[str], has_lanes: bool, judgement: Judgement) -> GradientReport:
    lanes, directions = judgement.slopes.shape
    draws = directions // (len(paths) + 1)
    of_leaf = [range(leaf, len(paths) * draws, len(paths)) for leaf in range(len(paths))]
    of_all = range(len(paths) * draws, directions)

    def worst(path: str, candidates: range) -> Iterator[Comparison]:
        for lane in range(lanes):
            found = (_comparison(path, lane if has_lanes else None, judgement, (lane, i)) for i in candidates)
            yield max(found, key=lambda one: one.severity)

    leaves = [one for path, candidates in zip(paths, of_leaf, strict=True) for one in worst(path, candidates)]
    return GradientReport(tuple(leaves), tuple(worst("all leaves", of_all)))


def _comparison(path: str, lane: int | None, judgement: Judgement, at: tuple[int, int]) -> Comparison:
    return Comparison(
        path=path,
        lane=lane,
        gradient=float(judgement.slopes[at]),
        numerical=float(judgement.numerical.value[at]),
        uncertainty=float(judgement.numerical.uncertainty[at]),
        relative_error=float(judgement.relative_errors[at]),
        verdict=Verdict(judgement.verdicts[at]),
    )


# What is given


def _coarsest(arrays: Arrays) -> tuple[list[str], float]:
    """Where the differentiable leaves are, and the machine epsilon of the coarsest of them."""
    leaves = differentiable(arrays)
    return list(leaves), max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves.values())


def _check_options(loss: Any, directions: Any, batch_size: Any, numbers: dict[str, float | None]) -> None:
    if not callable(loss):
        raise TypeError(f"loss must be callable as loss(inputs), got {loss!r}.")
    for name, count in (("directions", directions), ("batch_size", 1 if batch_size is None else batch_size)):
        if count < 1:
            raise ValueError(f"{name} must be a positive integer, got {count}.")
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ValueError(f"{name} must be positive, got {number}.")


def _check_finite(value: Float[Array, " lanes"], has_lanes: bool) -> None:
    lost = np.flatnonzero(~np.isfinite(np.asarray(value)))
    if lost.size:
        where = f" in lanes {lost.tolist()}" if has_lanes else ""
        raise ValueError(f"The loss at the inputs is not finite{where}: there is nothing to compare.")
