"""What a row is made of: cases, each run in fresh processes, contestants, and the ratios that are wanted."""

import enum
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.problems import Problem
from benchmarks.programs import Program, Quantity


class Role(enum.Enum):
    """How a contestant counts in comparisons."""

    OURS = "ours"
    PEER = "peer"
    BARE = "bare"
    """Written by hand for the problem: the floor, compared with where a row says so."""


class Contestant(NamedTuple):
    """A library with settings. `entry` names its function (problem, quantity) -> Program, imported where it is used."""

    name: str
    distribution: str
    role: Role
    entry: str

    def load(self) -> Callable[[Problem, Quantity], Program]:
        return pkgutil.resolve_name(f"benchmarks.libraries.{self.entry}")


class Case(NamedTuple):
    """One problem and quantity, solved by contestants at each of some tolerances (None for fixed steps), the first of which
    is the one at which a case that is not a race is measured.

    `size` is what is varied within its row, where something is: the number of steps, of lanes, of states, of parameters.
    """

    name: str
    problem: Callable[[], Problem]
    quantity: Quantity
    contestants: tuple[Contestant, ...]
    tolerances: tuple[float | None, ...] = (None,)
    size: float | None = None


class Mode(enum.Enum):
    """How a case is measured."""

    RACE = "race"
    """All contestants in one process: compiled first, then called in turns."""
    ALONE = "alone"
    """A process for each contestant: seconds to build, and time and peak memory of one call."""
    COUNTED = "counted"
    """Ours alone: what a gradient does with the vector field."""
    IMPORT = "import"
    """A process for each import; entries of contestants are modules."""


class Measured(NamedTuple):
    """A case, and how it is measured."""

    case: Case
    mode: Mode


class Quality(enum.Enum):
    """What a wanted ratio compares."""

    TIME = "time"
    """Of a call, at equal error."""
    BUILD = "build"
    """To trace, lower and compile."""
    MEMORY = "memory"
    """What the compiler plans for a call, beyond the inputs."""
    IMPORT = "import"
    """Seconds to import, compared with nothing: the ratio is the limit."""


EVERY_PEER = ("every peer",)
"""In a want: all contestants that are peers."""


class Want(NamedTuple):
    """`quality` of `ours` is wanted to be at most `ratio` times that of the best of `against`, in the same case or in
    another one."""

    case: str
    ours: str
    against: tuple[str, ...]
    ratio: float
    tolerance: float | None = None
    quality: Quality = Quality.TIME
    than_in: str | None = None


class Row(NamedTuple):
    """A question, answered by some cases. `axis` says what their sizes are."""

    title: str
    cases: tuple[Measured, ...]
    wants: tuple[Want, ...] = ()
    axis: str | None = None
