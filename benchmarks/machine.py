"""What figures depend on besides the code, and how much memory this process has."""

import ctypes
import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax

PACKAGES = (
    "adjoint_jax",
    "jax",
    "jaxlib",
    "equinox",
    "numpy",
    "scipy",
    "diffrax",
    "gradsolve",
    "torch",
    "torchdiffeq",
    "torchode",
    "casadi",
)


def facts(device: str) -> dict[str, Any]:
    """The processor, the device that JAX computes on, versions, date and commit."""
    return {
        "device": device,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "commit": commit(),
        **{name: version(name) for name in PACKAGES},
    }


def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the working tree, with a plus sign if files of the package differ from it."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent.parent
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "adjoint_jax") else "")


def on_device() -> dict[str, int] | None:
    """What JAX knows of its device's memory: nothing on a CPU."""
    return jax.local_devices()[0].memory_stats()


def release_free_memory() -> None:
    """Hand what was freed back to the system, so that growth can be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Memory(NamedTuple):
    """Bytes in use, and the most that were in use so far: on an accelerator JAX's, otherwise the size of the process."""

    now: int
    peak: int


def restarted_peak() -> Memory | None:
    """The memory in use, after the process's peak was set back to it (Linux); an accelerator's peak stays what it is."""
    device = on_device()
    if device is not None:
        return Memory(device["bytes_in_use"], device["peak_bytes_in_use"])
    release_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    now = _status("VmRSS")
    return None if now is None else Memory(now, now)


def grown_by(before: Memory | None) -> int | None:
    """By how many bytes what was in use has grown at most, since `restarted_peak`; None on an accelerator whose peak was
    higher before."""
    device = on_device()
    peak = _status("VmHWM") if device is None else device["peak_bytes_in_use"]
    if before is None or peak is None or (device is not None and peak <= before.peak):
        return None
    return max(0, peak - before.now)


def largest_ever() -> int:
    """The largest size of the process in bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(entry: str) -> int | None:
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    line = next(line for line in path.read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024
