"""Arrays over a growing archive are those of an archive read at once."""
from __future__ import annotations

from dataclasses import fields

import numpy as np
from helpers_archive import row, screened

from poise_hpc.selection.columns import Columns, Named, Reader, in_order
from poise_hpc.selection.descendants import Genealogy, Pairs

ENTRIES = tuple(row(f"c{i:04d}", None if i % 5 == 3 else 40.0 + i, tuple(f"c{p:04d}" for p in range(max(0, i - 2), i)), seeds=1 + i % 3)
                for i in range(12)) + (screened("c0012", -3.0, ("c0000",)),)


def same(a: Columns, b: Columns) -> bool:
    def equal(x, y) -> bool:
        if isinstance(x, Named):
            return x.names == y.names and equal(x.values, y.values)
        return np.array_equal(x, y, equal_nan=x.dtype == float)

    return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Columns))


def test_by_hand():
    read = Columns.of((row("c0002", 40.0, ("c0000", "c0001"), sd=2.0, seeds=2), row("c0007", None, ("c0002",))))
    assert read.number.tolist() == [2, 7] and read.scored.tolist() == [True, False] and read.seeds.tolist() == [2, 0]
    np.testing.assert_allclose(read.squares, [4.0, 0.0])  # two seeds with sample sd 2: sum of squares 2^2 (2 - 1)
    assert read.child.tolist() == [0, 0, 1] and read.parent.tolist() == [0, 1, 2]


def test_growth_shrinkage_and_exchange():
    reader = Reader()
    for entries in (ENTRIES[:3], ENTRIES[:4], ENTRIES[:4], ENTRIES, ENTRIES[:5], (*ENTRIES[:2], ENTRIES[7]), list(ENTRIES), ENTRIES[::-1], ()):
        assert same(reader(entries), Columns.of(entries))


def test_a_list_that_grew_in_place_is_read_again():
    reader, entries = Reader(), list(ENTRIES[:3])
    reader(entries)
    entries.append(ENTRIES[3])
    assert same(reader(entries), Columns.of(ENTRIES[:4]))


def test_in_order():
    for entries in (ENTRIES, ENTRIES[::-1]):
        ordered, read = in_order(entries)
        assert tuple(ordered) == ENTRIES and same(read, Columns.of(ENTRIES))


def test_names_that_only_new_entries_have_do_not_move_the_others():
    old, new = Named.of([{"b": 1.0}, {"d": 2.0}], float), Named.of([{"c": 3.0}], float)
    both = old + new
    assert both.names == ("b", "c", "d")
    np.testing.assert_array_equal(both.values, [[1, np.nan, np.nan], [np.nan, np.nan, 2], [np.nan, 3, np.nan]])


def test_a_genealogy_that_grew_is_that_of_the_whole_archive():
    grown = Genealogy()
    for entries in (ENTRIES[:3], ENTRIES[:4], ENTRIES, ENTRIES[:5], (ENTRIES[0], *ENTRIES[2:5]), ENTRIES[:5], (), ENTRIES):
        pairs, fresh = grown(Columns.of(entries)), Genealogy()(Columns.of(entries))
        assert all(np.array_equal(getattr(pairs, f.name), getattr(fresh, f.name)) for f in fields(Pairs))
        assert (np.diff(pairs.up * 100 + pairs.down) > 0).all()  # each once, in order
