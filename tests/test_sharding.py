"""Batches that are distributed over devices: what these tell each other is read from compiled programs.

They run in a process of their own, which has four devices; `main` is what it does.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

DEVICES, LANES = 4, 520
"""More lanes on every device than are computed together."""


def main():
    """Compile and run everything, and print what there is of communication, and how far results are from one device's."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from hlo import Program, collectives
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import adjoint_jax as aj

    jax.config.update("jax_enable_x64", True)
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    over_batch, everywhere = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    weights = jnp.sin(jnp.arange(9.0)).reshape(3, 3)
    y0 = jnp.cos(jnp.arange(3.0 * LANES)).reshape(LANES, 3)

    def field(t, y, weights):
        return jnp.tanh(y @ weights) - 0.1 * y

    def end(y0, weights, **options):
        return aj.solve(field, 0.0, 2.0, y0, weights, throw=False, **options).ys

    def adaptive(y0, weights):
        return end(y0, weights, controller=aj.PIDController(1e-5, 1e-5), saveat=aj.SaveAt(jnp.linspace(0.0, 2.0, 5)))

    def fixed(y0, weights):
        return end(y0, weights, controller=aj.FixedSteps(20), solver=aj.RK4())

    def lanes(y0, weights):
        return jax.vmap(adaptive, (0, None))(y0, weights)

    def gradient(solve):
        return jax.grad(lambda y0, weights: jnp.sum(solve(y0, weights) ** 2))

    def apart(y0, weights, *, function=lanes, check_vma=False):
        specs = {"mesh": mesh, "in_specs": (PartitionSpec("batch"), PartitionSpec()), "out_specs": PartitionSpec("batch")}
        return jax.shard_map(function, **specs, check_vma=check_vma)(y0, weights)

    def gradients_apart(y0, weights):
        return apart(y0, weights, function=gradient(lanes))

    report = {}
    for name, function, without_devices in (
        ("adaptive", adaptive, adaptive),
        ("fixed", fixed, fixed),
        ("lanes", lanes, lanes),
        ("lanes apart", apart, lanes),
        ("gradient, adaptive", gradient(adaptive), gradient(adaptive)),
        ("gradient, fixed", gradient(fixed), gradient(fixed)),
        ("gradient, lanes", gradient(lanes), gradient(lanes)),
        ("gradient, lanes apart", gradient(apart), gradient(lanes)),
        ("gradients apart", gradients_apart, gradient(lanes)),
    ):
        compiled = jax.jit(function).lower(jax.device_put(y0, over_batch), jax.device_put(weights, everywhere)).compile()
        program = Program(compiled)
        got = compiled(jax.device_put(y0, over_batch), jax.device_put(weights, everywhere))
        one_device = jax.jit(without_devices)(y0, weights)
        report[name] = {
            "error": float(np.max(np.abs(np.asarray(got) - np.asarray(one_device)))),
            "everywhere": collectives(program.all()),
            "step": collectives(program.largest_loop()),
            "kernels": compiled.as_text().count('xla_cpu_small_call="true"'),
        }
    try:
        apart(y0, weights, check_vma=True)
        refusal = None
    except ValueError as error:
        refusal = str(error)
    print(json.dumps([report, refusal]))


@pytest.fixture(scope="module")
def told():
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def report(told):
    return told[0]


def test_distributed_results_are_those_of_one_device(report):
    assert max(program["error"] for program in report.values()) < 1e-6


def test_no_state_is_gathered(report):
    for program in report.values():
        assert all(operation == "all-reduce" or size == 1 for operation, size in program["everywhere"])


def test_a_step_is_one_reduction(report):
    """Of the error's norm where all have one step size; of whether any lane goes on, and any has accepted its step, where
    each has its own."""
    assert report["adaptive"]["step"] == [["all-reduce", 1]]
    assert report["lanes"]["step"] == [["all-reduce", 2]]


def test_steps_of_given_grids_and_of_lanes_kept_apart_need_none(report):
    """`jax.shard_map` lets every device go on for as long as its own lanes do."""
    assert report["fixed"]["step"] == []
    assert report["lanes apart"]["everywhere"] == []


def test_lanes_kept_apart_are_computed_as_on_one_cpu(report):
    """As single kernels, in their derivatives, too, whether these are taken on every device or of all together."""
    for name, kernels in (("lanes apart", 1), ("gradient, lanes apart", 2), ("gradients apart", 2)):
        assert report[name]["kernels"] >= kernels


def test_following_what_differs_between_devices_is_refused(told):
    assert "check_vma=False" in told[1]


if __name__ == "__main__":
    main()
