"""Run the benchmarks, each case in a fresh process: `python -m benchmarks [CASE …] [--output FILE]`."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.measure import CASES


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    packages = ("adjoint_jax", "jax", "jaxlib", "equinox", "diffrax", "numpy")
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: times with quartiles, ratio to the fastest peer, error, seconds until the first call."""
    lines = ["| case | | library | ms (quartiles) | ours / it | relative error | trace + lower + compile, s |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    ours = {(row["case"], row["kind"]): row for row in rows if row["library"] == "adjoint_jax Discrete"}
    for row in rows:
        reference = ours[row["case"], row["kind"]]["milliseconds"]
        build = row["trace"] + row["lower"] + row["compile"]
        low, _, high = row["quartiles"]
        lines.append(
            f"| {row['case']} | {row['kind']} | {row['library']} | {row['milliseconds']:.3g} ({low:.3g}-{high:.3g}) "
            f"| {reference / row['milliseconds']:.2f} | {row['error']:.1e} | {build:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all, if none is named")
    parser.add_argument("--output", type=Path, default=None, help="where to write the rows as JSON")
    arguments = parser.parse_args()
    rows = []
    for case in tqdm(arguments.cases or list(CASES), desc="cases"):
        command = [sys.executable, "-m", "benchmarks.measure", case]
        rows += json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
