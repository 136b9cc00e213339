"""What importing a package costs."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import time
import jax, jax.numpy, equinox
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def seconds(module: str, times: int, bytecode: Path) -> list[float]:
    """Seconds to import the module beyond jax and equinox, in fresh processes that find it compiled to bytecode, which is
    kept in the folder."""
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(bytecode)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return [_once(module, environment) for _ in range(1 + times)][1:]


def _once(module: str, environment: dict[str, str]) -> float:
    command = [sys.executable, "-c", PROGRAM.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise ImportError(done.stderr.strip().splitlines()[-1])
    return float(done.stdout)
