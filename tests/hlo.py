"""What a compiled program consists of, read from its HLO text."""

import math
import re
from typing import NamedTuple

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|branch_computations|true_computation|false_computation)=\{?([^,}]*(?:, %[^,}]*)*)"
)
FREE = {"parameter", "tuple", "get-tuple-element", "constant", "bitcast", "while", "conditional", "after-all"}
"""What costs nothing itself."""
COLLECTIVES = {"all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"}


class Instruction(NamedTuple):
    """Its operation, the text of its shape, and the computations that it calls."""

    operation: str
    shape: str
    called: tuple[str, ...]

    @property
    def size(self) -> int:
        """The number of entries of its results."""
        shapes = [text.split(",") if text else [] for text in re.findall(r"\w+\[([\d,]*)\]", self.shape)]
        return sum(math.prod(map(int, shape)) for shape in shapes)


class Program:
    """The computations of a compiled program."""

    def __init__(self, compiled):
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in compiled.as_text().splitlines():
            if match := COMPUTATION.match(line):
                current = self.computations.setdefault(match[1], [])
            elif match := INSTRUCTION.match(line):
                called = [name.strip(" %") for group in CALLED.findall(line) for name in group.split(",")]
                current.append(Instruction(match[2].removesuffix("-start"), match[1], tuple(called)))

    def loops(self) -> dict[str, list[Instruction]]:
        """The bodies of all loops, each with its condition, without loops within them."""
        loops = {}
        for instructions in self.computations.values():
            for instruction in instructions:
                if instruction.operation == "while":
                    body = next(name for name in instruction.called if name in self.computations and name)
                    loops[body] = [i for name in instruction.called for i in self._straight(name)]
        return loops

    def _straight(self, name):
        """All instructions of a computation and of what it calls, but for fusions, which count as one, and loops."""
        for instruction in self.computations[name]:
            yield instruction
            if instruction.operation in ("call", "conditional"):
                for called in instruction.called:
                    yield from self._straight(called)

    def kernels(self) -> dict[str, int]:
        """How many instructions of every loop's body do something."""
        return {name: sum(i.operation not in FREE | {"call"} for i in body) for name, body in self.loops().items()}

    def all(self) -> list[Instruction]:
        """The instructions of all computations."""
        return [i for instructions in self.computations.values() for i in instructions]

    def largest_loop(self) -> list[Instruction]:
        """The body of the loop with most kernels: the steps'."""
        kernels = self.kernels()
        return self.loops()[max(kernels, key=kernels.__getitem__)]


def collectives(instructions: list[Instruction]) -> list[tuple[str, int]]:
    """What of them is communication between devices: operation and number of entries."""
    return [(i.operation, i.size) for i in instructions if i.operation in COLLECTIVES]
