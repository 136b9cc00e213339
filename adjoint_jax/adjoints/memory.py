"""What an adjoint keeps of the way forward, in numbers that are known at trace time."""

from typing import NamedTuple

import jax

from adjoint_jax import tree
from adjoint_jax.adjoints.revolve import Repetitions
from adjoint_jax.ends import AbstractEnds, GivenEnds, RecordedEnds
from adjoint_jax.tree import Shapes


class Kept(NamedTuple):
    """So many things of one kind, of so many bytes each."""

    what: str
    number: int
    each: int

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return self.number * self.each

    @staticmethod
    def rows(what: str, buffer: Shapes) -> "Kept":
        """The rows of a buffer."""
        number = next((leaf.shape[0] for leaf in jax.tree.leaves(buffer)), 0)
        return Kept(what, number, tree.size_in_bytes(buffer) // max(number, 1))

    @staticmethod
    def times(ends: AbstractEnds) -> "tuple[Kept, ...]":
        """The ends of steps, if they are in memory."""
        return (Kept.rows("times", ends),) if isinstance(ends, GivenEnds | RecordedEnds) else ()


class Memory(NamedTuple):
    """What is kept for the way back.

    - `kept`: one kind of things after the other; the first is what is kept of each step of one segment, if anything is.
    - `segment`: how many steps that is. `segments`: how many segments there may be.
    - `repetitions`: how often forward steps are taken again on the way back.
    """

    kept: tuple[Kept, ...]
    segment: int
    segments: int
    repetitions: Repetitions

    @property
    def bytes(self) -> int:
        """Of all that is kept."""
        return sum(one.bytes for one in self.kept)

    @staticmethod
    def of(*kept: Kept) -> "Memory":
        """What has no segments, and no step of which is taken again."""
        return Memory(kept, 0, 0, Repetitions(0.0, 0))
