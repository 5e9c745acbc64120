"""Arrays over a growing archive are those of an archive read at once."""
from __future__ import annotations

from dataclasses import fields

import numpy as np
from helpers_archive import row

from poise_hpc.selection.columns import Columns, Reader, in_order

ENTRIES = tuple(row(f"c{i:04d}", None if i % 5 == 3 else 40.0 + i, tuple(f"c{p:04d}" for p in range(max(0, i - 2), i)), seeds=1 + i % 3)
                for i in range(12))


def same(a: Columns, b: Columns) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name), equal_nan=f.name in ("overall", "squares")) for f in fields(Columns))


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
