"""Values that have derivatives in forward mode alone.

Loops with a data-dependent length have no reverse mode, and JAX's error says so without a remedy. Whether something will
be differentiated in reverse is known only when JAX transposes it, so that the error must come from a primitive's transpose
rule; public JAX has no such identity, `equinox.internal` has. This is the only file that uses it.
"""

from typing import TypeVar

from equinox.internal import nondifferentiable_backward

Values = TypeVar("Values")


def forward_only(values: Values, remedy: str) -> Values:
    """The values; differentiating them in reverse mode raises `RuntimeError` with the remedy, when it is traced."""
    return nondifferentiable_backward(values, msg=remedy)


def gradient_once(cotangents: Values) -> Values:
    """The result of a reverse pass, which cannot be reversed again."""
    return forward_only(
        cotangents,
        "The gradient of a solve cannot be differentiated in reverse mode again. Use forward mode over reverse mode: "
        "jax.jvp(jax.grad(loss), (x,), (v,)) for Hessian-vector products, jax.jacfwd(jax.grad(loss)) for jax.hessian.",
    )
