"""What a compiled program consists of, read from its HLO text."""

import math
import re
from typing import NamedTuple

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|branch_computations|true_computation|false_computation)=\{?([^,}]*(?:, %[^,}]*)*)"
)
FREE = {"parameter", "tuple", "get-tuple-element", "constant", "bitcast", "while", "conditional", "after-all"}
"""What costs nothing itself."""
COLLECTIVES = {"all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"}


class Instruction(NamedTuple):
    """Its name, its operation, the text of its shape, the computations that it calls, and what follows its operation."""

    name: str
    operation: str
    shape: str
    called: tuple[str, ...]
    rest: str

    @property
    def size(self) -> int:
        """The number of entries of its results."""
        shapes = [text.split(",") if text else [] for text in re.findall(r"\w+\[([\d,]*)\]", self.shape)]
        return sum(math.prod(map(int, shape)) for shape in shapes)

    @property
    def largest_array(self) -> int:
        """Bytes of the largest of its results."""
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", self.shape)
        return max((BYTES[kind] * math.prod(map(int, filter(None, shape.split(",")))) for kind, shape in arrays), default=0)

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition("), ")[0])


class Program:
    """The computations of a compiled program."""

    def __init__(self, compiled):
        self.operations: float = compiled.cost_analysis()["flops"]
        """As XLA counts them: entry by entry, once each in loops."""
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in compiled.as_text().splitlines():
            if match := COMPUTATION.match(line):
                current = self.computations.setdefault(match[1], [])
            elif match := INSTRUCTION.match(line):
                called = [name.strip(" %") for group in CALLED.findall(line) for name in group.split(",")]
                name, shape, operation, rest = match.groups()
                current.append(Instruction(name, operation.removesuffix("-start"), shape, tuple(called), rest))

    def loops(self) -> dict[str, list[Instruction]]:
        """The bodies of all loops, each with its condition, by whose name it goes, without loops within them."""
        loops = {}
        for instructions in self.computations.values():
            for instruction in instructions:
                if instruction.operation == "while":
                    loops[instruction.called[0]] = [i for name in instruction.called for i in self._straight(name)]
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

    def largest_arrays(self) -> dict[str, int]:
        """Bytes of the largest array that is read or written in every loop's body, loops within it included."""
        loops = {i.called[0]: i for i in self.all() if i.operation == "while"}
        return {name: max(map(self._largest_array, loop.called)) for name, loop in loops.items()}

    def _largest_array(self, computation: str) -> int:
        known = {i.name: i for i in self.computations[computation]}
        used = [known[o] for i in known.values() if i.operation not in FREE - {"while"} for o in i.operands]
        carried = [known[o] for i in used if i.operation == "tuple" for o in i.operands]
        return max((i.largest_array for i in [*used, *carried] if not i.shape.startswith("(")), default=0)

    def different_kernels(self) -> int:
        """How many fusions are not the same as another: XLA:CPU compiles every one by itself."""
        names = {name for i in self.all() if i.operation == "fusion" for name in i.called}
        return len({self._spelled(name) for name in names})

    def _spelled(self, computation: str) -> str:
        """A computation, with the names of its instructions replaced by their places."""
        instructions = self.computations[computation]
        places = {i.name: str(place) for place, i in enumerate(instructions)}

        def spelled(i: Instruction) -> str:
            rest = re.sub(r"(metadata=|backend_config=).*|[, ]", "", i.rest)
            return f"{i.operation} {i.shape} " + re.sub(r"%([\w.-]+)", lambda name: places.get(name[1], name[1]), rest)

        return "\n".join(map(spelled, instructions))

    def reached(self, computation: str) -> set[str]:
        """A computation with all that it calls."""
        called = {name for instruction in self.computations[computation] for name in instruction.called}
        return {computation}.union(*map(self.reached, called))

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
