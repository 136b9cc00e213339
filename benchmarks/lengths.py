"""How long a run is: long enough to be believed, or just long enough to see that everything works."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Length:
    """Every program is called for `turn_seconds` in each of so many turns, or in fewer, if they would take more than
    `most_seconds` in all, but in at least `least_turns`. What is larger than the limits is left out, and so are all
    tolerances, sizes of states or numbers of parameters but the first so many. `xla_flags` are added to those of the
    environment."""

    name: str
    turns: int
    least_turns: int
    turn_seconds: float
    most_seconds: float
    largest_lanes: int
    largest_steps: int
    variants: int
    xla_flags: str

    def turns_of(self, seconds: float) -> int:
        """The number of turns of a program that takes so long."""
        return min(self.turns, max(self.least_turns, int(self.most_seconds / max(seconds, self.turn_seconds, 1e-9))))

    def of(self, tolerances: tuple[float, ...]) -> tuple[float, ...]:
        return tolerances[: self.variants]

    def sizes(self, *sizes: int) -> tuple[int, ...]:
        return sizes[: self.variants]

    def lanes(self, *lanes: int) -> tuple[int, ...]:
        return tuple(dict.fromkeys(min(count, self.largest_lanes) for count in lanes))

    def steps(self, *steps: int) -> tuple[int, ...]:
        return tuple(count for count in steps if count <= self.largest_steps)


UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""XLA's flags for programs whose speed does not matter: they are compiled in half the time."""
FULL = Length("full", 5, 1, 0.03, 3.0, 10_000, 10_000, 99, "")
SHORT = Length("short", 1, 1, 0.0, 0.0, 16, 100, 1, UNOPTIMISED)
LENGTHS = {length.name: length for length in (FULL, SHORT)}
