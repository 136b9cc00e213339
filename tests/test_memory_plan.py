"""What `memory_plan` says before anything is computed, against what is compiled and what is executed."""

import math

import jax
import jax.numpy as jnp
import pytest
from problems import jit

import adjoint_jax as aj
from adjoint_jax.adjoints.revolve import places, repetitions
from adjoint_jax.diagnostics import memory_plan
from adjoint_jax.diagnostics.counting import CountingAdjoint, Tally

SIZE, STEPS = 1024, 400
STATE = 4 * SIZE  # bytes
GRID = {"solver": aj.RK4(), "controller": aj.FixedSteps(STEPS)}
Y0, RATE = jax.ShapeDtypeStruct((SIZE,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)


def field(t, y, rate):
    return jnp.sin(rate * y) - 0.1 * jnp.roll(y, 1)


def plan(adjoint, **options):
    return memory_plan(field, 0.0, 1.0, Y0, RATE, adjoint=adjoint, **{**GRID, **options})


def kept(plan):
    return {one.what: (one.number, one.each) for one in plan.memory.kept}


def test_all_steps_of_a_given_grid():
    of_all = plan(aj.DiscreteAdjoint())
    assert kept(of_all) == {"states": (STEPS, STATE), "checkpoints": (1, STATE)}
    assert (of_all.steps, of_all.memory.segment, of_all.memory.segments) == (STEPS, STEPS, 1)
    assert of_all.memory.repetitions == (0.0, 0)
    assert of_all.bytes == (STEPS + 1) * STATE
    assert str(of_all) == (
        "DiscreteAdjoint, at most 400 steps: all of them are kept.\n"
        "  states       400 of 4 KiB  1.56 MiB\n"
        "  checkpoints    1 of 4 KiB  4 KiB\n"
        "  in all                     1.57 MiB\n"
        "No step is taken again."
    )


def test_segments_and_checkpoints():
    few = plan(aj.DiscreteAdjoint(checkpoints=3))
    assert kept(few)["states"] == (20, STATE)
    assert kept(few)["checkpoints"] == (3, STATE)
    assert (few.memory.segment, few.memory.segments) == (20, 20)
    assert "one segment of 20 is kept at a time, of at most 20." in str(few)
    assert "no step more than" in str(few)
    assert kept(plan(aj.DiscreteAdjoint(keep=aj.KeepStages(bytes=20 * STATE))))["stages"] == (4, 5 * STATE)


@pytest.mark.parametrize("adjoint", [aj.InterpolatingAdjoint(), aj.GaussAdjoint()])
def test_interpolants_of_a_segment(adjoint):
    continuous = kept(plan(adjoint))
    assert continuous["checkpoints"] == (20, STATE)
    assert continuous["interpolants"] == (20, 4 * STATE)


def test_adjoints_that_keep_no_steps():
    assert plan(aj.BacksolveAdjoint()).bytes == plan(aj.ForwardMode()).bytes == 0
    assert "nothing is kept" in str(plan(aj.BacksolveAdjoint()))
    assert kept(plan(aj.BacksolveAdjoint(checkpoints=5))) == {"checkpoints": (5, STATE)}
    undone = kept(plan(aj.ReversibleAdjoint(), solver=aj.Reversible(aj.RK4())))
    assert undone == {"states of steps undone": (1, 2 * STATE)}


def test_times_of_a_given_grid_are_kept_if_they_are_given():
    times = {"controller": aj.StepTo(jnp.linspace(0.0, 1.0, STEPS + 1))}
    assert kept(plan(aj.DiscreteAdjoint(), **times))["times"] == (STEPS + 1, 8)
    assert kept(plan(aj.ReversibleAdjoint(), solver=aj.Reversible(aj.RK4()), **times))["times"] == (STEPS + 1, 8)


def test_adaptive_steps_reserve_what_max_steps_may_need():
    adaptive = plan(aj.DiscreteAdjoint(), controller=aj.PIDController(), solver=aj.Tsit5(), max_steps=1024)
    assert (adaptive.steps, adaptive.memory.segment, adaptive.memory.segments) == (1024, 32, 32)
    assert adaptive.memory.repetitions.most == 1


def wide(t, y, weights):
    return jnp.tanh(y @ weights)


def test_linearisations_are_chosen_where_evaluations_are_bound_by_parameters():
    """One point and a layer of 256; not for 64 points, nor where steps, or states, are the larger part; with adaptive steps
    also not where parameters are few."""
    adaptive = {"controller": aj.PIDController(), "solver": aj.Tsit5()}

    def chosen(points=1, width=256, **options):
        y0, weights = (jax.ShapeDtypeStruct((n, width), jnp.float32) for n in (points, width))
        return memory_plan(wide, 0.0, 1.0, y0, weights, **{**GRID, **options}).memory.kept[0].what

    assert chosen() == chosen(width=512, **adaptive) == "linearisations"
    assert chosen(points=64) == chosen(points=64, width=512, **adaptive) == "states"
    assert chosen(**adaptive) == "states"
    assert chosen(controller=aj.FixedSteps(4000)) == "states"
    assert chosen(solver=aj.Reversible(aj.RK4())) == "states"
    assert chosen(adjoint=aj.DiscreteAdjoint(checkpoints=3)) == "states"
    assert chosen(adjoint=aj.DiscreteAdjoint(keep=aj.KeepStates())) == "states"
    assert plan(aj.DiscreteAdjoint()).memory.kept[0].what == "states"


def test_short_segments_have_a_checkpoint_each():
    """Linearisations of ten adaptive steps are kept at a time, of 4,096 at most: none is taken again more than once."""
    y0, weights = (jax.ShapeDtypeStruct((n, 512), jnp.float32) for n in (1, 512))
    memory = memory_plan(wide, 0.0, 1.0, y0, weights).memory
    kept, checkpoints = memory.kept[:2]
    assert kept.what == "linearisations"
    assert memory.segment < 20
    assert checkpoints.number == memory.segments > 200


def test_all_states_of_a_given_grid_are_kept_if_they_fit_in_what_is_allowed():
    """So that no step is taken again; by default in 128 MiB."""
    steps = 2**27 // STATE + 1
    allowed = aj.DiscreteAdjoint(keep=aj.KeepStates(bytes=steps * STATE))
    just_not = aj.DiscreteAdjoint(keep=aj.KeepStates(bytes=steps * STATE - 1))
    of_all = plan(allowed, controller=aj.FixedSteps(steps))
    assert of_all.memory.kept[0].number >= steps
    assert (of_all.memory.segments, of_all.memory.repetitions) == (1, (0.0, 0))
    for adjoint in (aj.DiscreteAdjoint(), just_not):
        of_segments = plan(adjoint, controller=aj.FixedSteps(steps))
        assert of_segments.bytes < 5 * math.isqrt(steps) * STATE
        assert of_segments.memory.repetitions.most == 1
    assert plan(aj.DiscreteAdjoint(), controller=aj.FixedSteps(steps - 1)).memory.segments == 1


PLANNED = {
    "all states": (aj.DiscreteAdjoint(), aj.RK4()),
    "few states": (aj.DiscreteAdjoint(keep=aj.KeepStates(bytes=STATE)), aj.RK4()),
    "stages": (aj.DiscreteAdjoint(keep=aj.KeepStages()), aj.RK4()),
    "linearisations": (aj.DiscreteAdjoint(keep=aj.KeepLinearisations()), aj.RK4()),
    "checkpoints": (aj.DiscreteAdjoint(checkpoints=8), aj.RK4()),
    "interpolating": (aj.InterpolatingAdjoint(), aj.RK4()),
    "reversible": (aj.ReversibleAdjoint(), aj.Reversible(aj.RK4())),
}
WORK = 40 * STATE  # of a step, its transpose or its vjps


@pytest.mark.parametrize("name", PLANNED)
def test_the_compiled_gradient_takes_what_is_planned(name):
    adjoint, solver = PLANNED[name]

    def loss(y0, rate):
        options = {**GRID, "adjoint": adjoint, "solver": solver, "throw": False}
        return jnp.sum(aj.solve(field, 0.0, 1.0, y0, rate, **options).ys)

    planned = plan(adjoint, solver=solver).bytes
    taken = jax.jit(jax.grad(loss, (0, 1))).lower(Y0, RATE).compile().memory_analysis().temp_size_in_bytes
    assert planned / 2 <= taken <= 2 * planned + WORK


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_steps_are_taken_again_as_often_as_planned(checkpoints):
    """Counted as they are executed: the evaluations that there are not if all steps are kept."""
    options = {"solver": aj.RK4(), "controller": aj.FixedSteps(64)}

    def evaluations(adjoint):
        tally = Tally()

        def loss(y0):
            counting = CountingAdjoint(adjoint, tally)
            return jnp.sum(aj.solve(field, 0.0, 1.0, y0, 0.8, adjoint=counting, **options).ys)

        jax.block_until_ready(jit(jax.grad(loss))(jnp.ones(3)))
        return tally.counts.evaluations

    adjoint = aj.DiscreteAdjoint(checkpoints=checkpoints)
    planned = memory_plan(field, 0.0, 1.0, jnp.ones(3), 0.8, adjoint=adjoint, **options).memory.repetitions
    again = (evaluations(adjoint) - evaluations(aj.DiscreteAdjoint())) / (4 * 64)
    assert again == pytest.approx(planned.mean)
    assert planned.most == {1: 7, 3: 2}[checkpoints]


@pytest.mark.parametrize(("checkpoints", "segments"), [(1, 8), (2, 100), (4, 64), (8, 64), (3, 5), (7, 8)])
def test_checkpoints_on_a_given_grid_stand_where_they_are_best(checkpoints, segments):
    """With r repetitions at most, k checkpoints serve (k + r)! / (k! r!) - 1 segments and the last one, and no more."""
    found, most = places(checkpoints, segments), repetitions(checkpoints, segments, known=True).most
    assert found[0] == 0
    assert len(found) <= checkpoints
    assert math.comb(checkpoints + most, most) - 1 >= segments - 1 > math.comb(checkpoints + most - 1, most - 1) - 1


def test_wrong_adjoints():
    with pytest.raises(TypeError, match="must be an adjoint such as"):
        plan("discrete")
