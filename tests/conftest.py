"""What all tests share: float64 by default, and run-time checks of every annotation of the package.

Most of the suite's time is compilation, so XLA's more expensive optimisations are left out. The examples and benchmarks run
with all of them.
"""

import importlib.metadata
import os
import pathlib
import sys

FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FAST_COMPILATION += " --xla_cpu_parallel_codegen_split_count=1"  # xdist's workers are all the parallelism there is
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"  # XLA aborts at flags that it does not know (any more)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}"

import jax  # noqa: E402
import jaxtyping  # noqa: E402

jax.config.update("jax_enable_x64", True)

assert "adjoint_jax" not in sys.modules, "The import hook must come before the first import of the package."
# tree.py is left out: its functions take any arrays, and are so many calls that checking them is a tenth of all time.
PACKAGE = pathlib.Path(__file__).parent.parent / "adjoint_jax"
PATHS = [path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")]
CHECKED = [".".join(path.parts) for path in PATHS if path.name not in ("__init__", "tree")]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")
