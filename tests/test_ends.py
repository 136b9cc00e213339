"""Ends of steps: those that a formula gives are those that an array holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adjoint_jax.controllers.grids import FixedSteps, StepTo
from adjoint_jax.ends import EndsFrom, EndsReached, EvenEnds, GivenEnds, RecordedEnds, Stride


def all_of(ends, count):
    return np.array([ends.at(jnp.int32(i)) for i in range(count)])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (3.0, -0.1), (1e6, 1e6 + 1), (2.0, 2.0)])
def test_even_ends(t0, t1, dtype):
    """Within two rounding errors of the exact ones; the two ends exactly; and the last one again behind it."""
    t0, t1, steps = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype), 7
    found = all_of(FixedSteps(steps).grid(t0, t1), steps + 3)
    exact = float(t0) + (float(t1) - float(t0)) * np.arange(steps + 1) / steps
    assert found.dtype == dtype
    assert found[0] == t0
    assert np.all(found[steps:] == t1)
    assert np.all(np.abs(found[: steps + 1] - exact) <= 2 * np.finfo(dtype).eps * np.abs(exact).max())
    assert np.all(np.diff(found) * np.sign(t1 - t0) >= 0)


def test_given_ends_run_from_the_ends_of_the_integration():
    t0, t1 = jnp.array(0.5), jnp.array(2.5)
    assert np.array_equal(all_of(StepTo([0.0, 1.0, 2.0]).grid(t0, t1), 4), [0.5, 1.0, 2.5, 2.5])


def test_recorded_steps_have_a_length_but_in_lanes():
    """What is recorded of a single solve are accepted steps, and nothing must be chosen by whether they are. Lanes wait for
    one another, and so do steps of a given grid for whoever repeats a time."""

    def has_length(ends, start, end):
        return EndsFrom(ends, jnp.int32(0)).has_length(Stride(start, end))

    recorded, given = RecordedEnds(jnp.linspace(0.0, 1.0, 5)), GivenEnds(jnp.array([0.0, 0.5, 0.5]))
    starts, ends = jnp.array([0.0, 0.5]), jnp.array([0.5, 0.5])
    for steps, alone in ((recorded, True), (given, False)):
        assert bool(has_length(steps, starts[1], ends[1])) is alone
        assert jax.vmap(functools.partial(has_length, steps))(starts, ends).tolist() == [True, False]


@pytest.mark.parametrize("ends", [EvenEnds(jnp.array(0.0), jnp.array(1.0), 4), RecordedEnds(jnp.linspace(0.0, 1.0, 5))])
def test_ends_from_a_step_on_and_up_to_another(ends):
    reached = EndsReached(ends, jnp.int32(2), jnp.array(0.6))
    assert np.array_equal(all_of(reached, 5), [0.0, 0.25, 0.5, 0.6, 0.6])
    later = EndsFrom(reached, jnp.int32(1))
    assert np.array_equal(all_of(later, 3), [0.25, 0.5, 0.6])
    assert np.array_equal(later.block(jnp.int32(1), 2), [0.5, 0.6])


def test_only_ends_that_are_not_known_are_recorded():
    index, times = jnp.int32(1), jnp.array([0.1, 0.2])
    assert np.array_equal(RecordedEnds(jnp.zeros(4)).recorded(index, times).times, [0.0, 0.1, 0.2, 0.0])
    grid = EvenEnds(jnp.array(0.0), jnp.array(1.0), 4)
    assert grid.recorded(index, times) is grid


def test_even_ends_have_derivatives_with_respect_to_both_ends():
    def third(t0, t1):
        return FixedSteps(4).grid(t0, t1).at(jnp.int32(3))

    assert jax.grad(third, (0, 1))(0.0, 1.0) == (0.25, 0.75)
