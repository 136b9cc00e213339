"""The table of `which_adjoint.md` over all problems of the contract tests: the error of every reverse adjoint's gradient.

python docs/which_adjoint_matrix.py      # prints the table
"""

import functools
import logging
import sys
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm
from which_adjoint import ADJOINTS, markdown, options

from adjoint_jax.diagnostics import compare_adjoints

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from problems import PROBLEMS
from test_contract import RANDOM, contract_problem, loss, true_loss

REVERSE = {
    name: {"adjoint": adjoint, "solver": options(adjoint)["solver"]}
    for name, adjoint in ADJOINTS.items()
    if name not in ("Discrete(checkpoints=4)", "ForwardMode")
}
"""Those whose gradients differ."""


def rows(name: str) -> list[str]:
    """The error of each adjoint, or how it fails: of the gradient of the loss that weighs all rows and the cost, with
    respect to y0, all parameters, t0, t1 and every save time, against the derivative of the true solution."""
    case = contract_problem(name)

    def of_method(inputs: Any, method: Any) -> Any:
        return loss(case, method["solver"], method["adjoint"], inputs, RANDOM, 1e-6)

    reference = functools.partial(true_loss, case)
    settings = {"reference": lambda inputs: reference(inputs, RANDOM), "repeats": 1, "count": False}
    found = compare_adjoints(of_method, case.inputs, REVERSE, **settings)
    return [_cell(row) for row in found.rows]


def _cell(row: Any) -> str:
    if row.measured is None:
        return (row.failure or "").partition(" at t")[0].partition(":")[0]
    return f"{row.measured.error:.0e}"


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    logging.getLogger("jax").setLevel(logging.CRITICAL)
    table = [(name.replace("_", " "), *rows(name)) for name in tqdm(PROBLEMS)]
    print(markdown(("", *(f"`{name}`" for name in REVERSE)), table))


if __name__ == "__main__":
    main()
