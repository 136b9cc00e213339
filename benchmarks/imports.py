"""What importing a package costs."""

import subprocess
import sys

PROGRAM = """
import time
import jax, jax.numpy, equinox
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def seconds(module: str) -> float:
    """Seconds to import the module beyond jax and equinox, in a fresh process."""
    command = [sys.executable, "-c", PROGRAM.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ImportError(done.stderr.strip().splitlines()[-1])
    return float(done.stdout)
