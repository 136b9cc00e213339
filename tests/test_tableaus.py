"""Order conditions of every tableau, checked over rooted trees, and the validation of tableaus."""

import functools
import math

import numpy as np
import pytest

from adjoint_jax.solvers import high_order, methods
from adjoint_jax.solvers.tableau import ButcherTableau

TABLEAUS = {method.__name__: method().tableau for method in (*methods.METHODS, *high_order.METHODS)}
EMBEDDED = {name: tableau for name, tableau in TABLEAUS.items() if tableau.b_error is not None}
each_tableau = pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=TABLEAUS)
each_embedded = pytest.mark.parametrize("tableau", EMBEDDED.values(), ids=EMBEDDED)

HOLDS = 1e-14  # relative to the sum of the absolute terms
FAILS = 1e-7


# A rooted tree is the sorted tuple of its children; () is a single node.


@functools.cache
def rooted_trees(nodes):
    """All rooted trees with this many nodes."""

    def forests(remaining, candidates):
        if remaining == 0:
            yield ()
        for i, tree in enumerate(candidates):
            if count(tree) <= remaining:
                for rest in forests(remaining - count(tree), candidates[i:]):
                    yield (tree, *rest)

    smaller = [tree for order in range(1, nodes) for tree in rooted_trees(order)]
    return tuple(forests(nodes - 1, smaller))


@functools.cache
def count(tree):
    return 1 + sum(map(count, tree))


@functools.cache
def density(tree):
    return count(tree) * math.prod(map(density, tree))


class Conditions:
    """Elementary weights of a tableau's stages (dense stages included) for all trees up to some order."""

    def __init__(self, tableau):
        rows = tableau.a + tableau.dense_a
        self.a = np.zeros((len(rows), len(rows)))
        for i, row in enumerate(rows):
            self.a[i, : len(row)] = row
        self.stages = tableau.stages

    def residual(self, weights, order):
        """Largest relative and largest absolute violation of the conditions of one order.

        `weights` is a vector, whose conditions are those of a step, or a matrix, whose column p holds the coefficients
        of s^(p + 1) and whose conditions hold for every s.
        """
        weights = np.asarray(weights)
        trees = rooted_trees(order)
        size = len(weights)
        phi = np.stack([elementary_weights(tree, self.a[:size, :size]) for tree in trees])
        scale = np.stack([elementary_weights(tree, np.abs(self.a[:size, :size])) for tree in trees])
        target = np.array([1.0 / density(tree) for tree in trees])
        if weights.ndim == 2:
            target = target[:, None] * (np.arange(1, max(weights.shape[1], order) + 1) == order)
            weights = np.pad(weights, ((0, 0), (0, target.shape[1] - weights.shape[1])))
        error = np.abs(phi @ weights - target)
        return (error / (np.abs(target) + scale @ np.abs(weights) + 1e-300)).max(), error.max()

    def assert_order(self, weights, order):
        """The conditions hold up to this order and fail for the next."""
        for lower in range(1, order + 1):
            relative, _ = self.residual(weights, lower)
            assert relative <= HOLDS, f"a condition of order {lower} is violated by {relative:.1e}"
        _, absolute = self.residual(weights, order + 1)
        assert absolute >= FAILS, f"all conditions of order {order + 1} hold, up to {absolute:.1e}"


def elementary_weights(tree, a):
    """One weight per stage: the product over the root's children of what the stage's row makes of theirs."""
    memo = {(): np.ones(len(a))}

    def of(subtree):
        if subtree not in memo:
            memo[subtree] = math.prod(a @ of(child) for child in subtree)
        return memo[subtree]

    return of(tree)


def test_numbers_of_rooted_trees():
    trees = [rooted_trees(order) for order in range(1, 10)]
    assert [len(set(some)) for some in trees] == [len(some) for some in trees] == [1, 1, 2, 4, 9, 20, 48, 115, 286]
    chain, bush = ((((),),),), ((), (), ())
    assert {chain, bush} <= set(rooted_trees(4))
    assert (density(chain), density(bush)) == (24, 4)


def test_tableaus_are_named_like_their_methods():
    assert [tableau.name for tableau in TABLEAUS.values()] == list(TABLEAUS)


@each_tableau
def test_order_of_the_step(tableau):
    Conditions(tableau).assert_order(tableau.b, tableau.order)


@each_embedded
def test_order_of_the_embedded_method(tableau):
    assert tableau.error_order == tableau.order - 1
    Conditions(tableau).assert_order(np.subtract(tableau.b, tableau.b_error), tableau.error_order)


@each_tableau
def test_order_of_the_dense_output(tableau):
    assert tableau.dense_order >= min(tableau.order, max(2, tableau.order - 1))
    Conditions(tableau).assert_order(tableau.dense, tableau.dense_order)


@each_tableau
def test_dense_stages_are_of_use(tableau):
    """Every dense stage has weight in the dense output, directly or through a later stage."""
    for i in range(tableau.stages, tableau.stages + len(tableau.dense_c)):
        later = [row[i] for row in tableau.dense_a if len(row) > i]
        assert any(tableau.dense[i]) or any(later)


@each_tableau
def test_dense_output_starts_with_the_first_slope(tableau):
    assert [row[0] for row in tableau.dense] == [1.0] + [0.0] * (len(tableau.dense) - 1)


@pytest.mark.parametrize("name", ["Bosh3", "Dopri5", "Tsit5", "Vern7", "Dopri8"])
def test_dense_output_ends_with_the_slope_at_the_end(name):
    """So successive steps join smoothly: the last stage, or the first dense stage, is the field at the step's end."""
    tableau = TABLEAUS[name]
    dense = np.array(tableau.dense)
    slope = dense @ np.arange(1, dense.shape[1] + 1)
    end = tableau.stages - 1 if tableau.first_same_as_last else tableau.stages
    rows = tableau.a + tableau.dense_a
    assert rows[end] == tableau.b[:end]
    np.testing.assert_allclose(slope, np.eye(len(dense))[end], rtol=0, atol=1e-15 * len(dense) * np.abs(dense).max())


def test_first_same_as_last():
    recognised = {name for name, tableau in TABLEAUS.items() if tableau.first_same_as_last}
    assert recognised == {"Bosh3", "Dopri5", "Tsit5"}


@pytest.mark.parametrize(
    ("name", "stage", "weight"),
    [
        ("Midpoint", 0, 1.0),
        ("Heun", 0, 1.0),
        ("Ralston", 0, 1.0),
        ("Bosh3", 3, 1 / 8),
        ("Dopri5", 0, 5179 / 57600),
        ("Dopri5", 6, 1 / 40),
        ("Tsit5", 6, 1 / 66),
        ("Vern7", 7, 0.0),
        ("Vern7", 9, 0.02029518466335628),
        ("Dopri8", 11, 2 / 45),
        ("Dopri8", 12, 0.0),
    ],
)
def test_embedded_weights_have_the_published_values(name, stage, weight):
    """Fixes the sign of `b_error`, to which order conditions are blind."""
    tableau = TABLEAUS[name]
    assert tableau.b[stage] - tableau.b_error[stage] == pytest.approx(weight, rel=1e-15, abs=1e-17)


MIDPOINT = {
    "name": "test",
    "order": 2,
    "a": ((), (0.5,)),
    "b": (0.0, 1.0),
    "c": (0.0, 0.5),
    "dense": ((1.0, -1.0), (0.0, 1.0)),
    "dense_order": 2,
    "b_error": (-1.0, 1.0),
    "error_order": 1,
}
DENSE_STAGE = {"dense_a": ((0.0, 1.0),), "dense_c": (1.0,), "dense": ((1.0, -1.0), (0.0, 1.0), (0.0, 0.0))}


@pytest.mark.parametrize("changes", [{}, DENSE_STAGE, {"b_error": None, "error_order": None}])
def test_valid_tableaus_are_accepted(changes):
    assert ButcherTableau(**(MIDPOINT | changes)).stages == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c": (0.0,)}, "one entry per stage"),
        ({"a": ((),)}, "one entry per stage"),
        ({"dense_c": (1.0,)}, "equal lengths"),
        ({"dense_a": ((0.0, 1.0),)}, "equal lengths"),
        ({"a": ((0.0,), (0.5,))}, "must have i entries"),
        ({"a": ((), (0.25, 0.25))}, "must have i entries"),
        (DENSE_STAGE | {"dense_a": ((1.0,),)}, "must have i entries"),
        ({"dense": ((1.0,),)}, "dense must have 2 rows"),
        (DENSE_STAGE | {"dense": MIDPOINT["dense"]}, "dense must have 3 rows"),
        ({"dense": ((1.0, -1.0), (1.0,))}, "rows of dense must have equal lengths"),
        ({"b_error": None}, "go together"),
        ({"error_order": None}, "go together"),
        ({"b_error": (-1.0, 1.0, 0.0)}, "b_error must have one entry per stage"),
        ({"c": (0.0, 0.51)}, "its c is 0.51"),
        (DENSE_STAGE | {"dense_c": (0.9,)}, "its c is 0.9"),
        ({"b": (0.1, 1.0)}, "b sums to"),
        ({"b_error": (-1.0, 1.1)}, "b_error must sum to 0"),
        ({"dense": ((1.0, -1.0), (0.0, 0.9))}, "dense weights end in"),
        (DENSE_STAGE | {"dense": (*MIDPOINT["dense"], (0.0, 0.1))}, "dense weights end in"),
    ],
)
def test_invalid_tableaus_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^ButcherTableau 'test': .*{message}"):
        ButcherTableau(**(MIDPOINT | changes))
