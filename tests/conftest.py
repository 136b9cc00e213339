"""What all tests share: float64 by default, and run-time checks of every annotation of the package."""

import sys

import jax
import jaxtyping

jax.config.update("jax_enable_x64", True)

assert "adjoint_jax" not in sys.modules, "The import hook must come before the first import of the package."
jaxtyping.install_import_hook("adjoint_jax", "beartype.beartype")
