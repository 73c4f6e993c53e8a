"""Axes: what equations between dims say about their entries, checked against the entries themselves."""

from __future__ import annotations

import random

import pytest
import torch

from fxfreeze.axes import Axes, Axis


def listed(axes: Axes, axis: Axis) -> list[list[list[int]]]:
    return [entries.tolist() for entries in axes.entries(axis).values()]


def test_a_leaf_is_its_own_index() -> None:
    axes, one = Axes(), Axis(3)
    assert listed(axes, one) == [[[0], [1], [2]]] and list(axes.leaves(one)) == [one]


def test_a_product_of_heads_and_what_is_in_them() -> None:
    axes, heads, inner = Axes(), Axis(2), Axis(3)
    whole = axes.product([heads, inner])
    assert whole.size == 6 and list(axes.leaves(whole)) == [heads, inner]
    assert listed(axes, whole) == [[[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]]]


def test_a_sum_has_its_parts_one_behind_the_other() -> None:
    axes, first, second = Axes(), Axis(2), Axis(3)
    whole = axes.sum([first, Axis(0), second, first])
    assert whole.size == 7
    assert listed(axes, whole) == [[[0, 5], [1, 6]], [[2], [3], [4]]]


def test_what_is_one_or_empty_has_no_form() -> None:
    axes, one = Axes(), Axis(4)
    assert axes.product([Axis(1), one, Axis(1)]) is one and axes.sum([one, Axis(0)]) is one
    assert axes.product([]).size == 1


def test_a_factor_of_a_sum_is_a_factor_of_its_parts() -> None:
    """Channels of a concat that are flattened: (2 + 1) · 4."""
    axes = Axes()
    first, second = Axis(8), Axis(4)
    outer, inner = axes.factor(axes.sum([first, second]), [3, 4]) or []
    assert listed(axes, first) == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]]]
    (rest,) = axes.leaves(second)
    assert list(axes.leaves(inner)) == [rest] and [leaf.size for leaf in axes.leaves(outer)] == [2, 1]


def test_parts_of_a_product_are_parts_of_its_slowest_factor() -> None:
    """Queries, keys and values in one layer, in each of them heads."""
    axes, three, heads, inner = Axes(), Axis(3), Axis(2), Axis(4)
    whole = axes.product([three, heads, inner])
    parts = axes.split(whole, [8, 8, 8]) or []
    assert [list(axes.leaves(part)) for part in parts] == [[heads, inner]] * 3
    assert axes.split(whole, [4, 20]) is None  # half of the heads of the first part


def test_boundaries_of_two_sums_are_all_kept() -> None:
    axes = Axes()
    a, b, c, d = Axis(4), Axis(6), Axis(7), Axis(3)
    assert axes.unify(axes.sum([a, b]), axes.sum([c, d]))
    assert [leaf.size for leaf in axes.leaves(a)] == [4]
    assert [leaf.size for leaf in axes.leaves(b)] == [3, 3]
    assert [leaf.size for leaf in axes.leaves(c)] == [4, 3]
    assert list(axes.leaves(d)) == list(axes.leaves(b))[1:]


def test_factors_of_two_products_are_all_kept() -> None:
    axes = Axes()
    whole = axes.product([Axis(2), Axis(12)])
    made = axes.factor(whole, [8, 3]) or []
    assert [leaf.size for leaf in axes.leaves(whole)] == [2, 4, 3]
    assert [leaf.size for leaf in axes.leaves(made[0])] == [2, 4]


def test_forms_that_do_not_fit() -> None:
    axes = Axes()
    assert axes.factor(axes.product([Axis(4), Axis(6)]), [6, 4]) is None
    assert axes.factor(axes.sum([Axis(3), Axis(5)]), [4, 2]) is None
    assert not axes.unify(Axis(3), Axis(4)) and not axes.unify(Axis("s0"), Axis("s1"))


def test_a_symbolic_size_is_what_it_is_called() -> None:
    axes, heads, batch = Axes(), Axis(4), Axis("s0")
    flat = axes.product([batch, heads], "4*s0")
    other, inner = Axis("s0"), Axis(4)
    assert axes.unify(flat, axes.product([other, inner], "4*s0"))
    assert axes.leaves(inner) == axes.leaves(heads) and axes.leaves(other) == axes.leaves(batch)
    assert axes.count(flat) == 4 and axes.count(batch) == 1
    merged = Axis("4*s0")
    assert axes.unify(merged, flat) and list(axes.leaves(merged)) == list(axes.leaves(flat))
    assert listed(axes, axes.product([flat, Axis(2)], "8*s0")) == [
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 2, 4, 6], [1, 3, 5, 7]],
    ]


@pytest.mark.parametrize("seed", range(40))
def test_entries_of_random_terms_stay_what_they_are(seed: int) -> None:
    """An equation says nothing about where entries are: the leaves of an axis still take it apart, and each unit of a
    leaf has as many entries as any other."""
    draw, axes = random.Random(seed), Axes()

    def term(size: int) -> Axis:
        ways = [step for step in range(2, size) if size % step == 0]
        kind = draw.choice(["leaf", "sum", "product"])
        if kind == "product" and ways:
            step = draw.choice(ways)
            return axes.product([term(size // step), term(step)])
        if kind == "sum" and size > 1:
            first = draw.randrange(1, size)
            return axes.sum([term(first), term(size - first)])
        return Axis(size)

    whole = term(24)
    for _ in range(4):
        axes.unify(whole, term(24))
    found = axes.entries(whole)
    assert all(len(entries) == leaf.size for leaf, entries in found.items())
    assert all(
        sorted(entries.flatten().tolist()) == sorted(set(entries.flatten().tolist())) for entries in found.values()
    )
    # Units of a sum's parts hold an entry once; each factor of a product holds it once more.
    covered = torch.cat([entries.flatten() for entries in found.values()])
    assert set(covered.tolist()) == set(range(24))
