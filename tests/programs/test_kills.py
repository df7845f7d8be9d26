"""The benchmark that kills trainings: a small part of it, and how it compares."""

import kills
import numpy as np
from measurement import target_lines


def test_what_differs_in_a_bit(monkeypatch):
    one = {"a": np.float32([0.0, 1.0]), "b": np.int32([1]), "c": np.float32([np.nan])}
    other = {"a": np.float32([-0.0, 1.0]), "b": np.int64([1]), "d": np.int32([0])}
    monkeypatch.setattr(kills, "arrays", lambda out, steps: out)
    assert kills.different(one, dict(one), 9) == []
    assert kills.different(one, other, 9) == ["a", "b", "c", "d"]


def test_a_run_that_is_killed_twice_ends_as_one_that_is_not(monkeypatch):
    monkeypatch.setitem(kills.STEPS_A_KILL, 1, 100)
    monkeypatch.setattr(kills, "LONGEST", 0.2)
    record = kills.measure({1: 2}, 0)
    (figures,) = record["figures"]
    assert figures["arrays"] > 40 and figures["different"] == []
    first, second = figures["kills"]
    assert 0 < first["step"] <= second["step"] < figures["steps"] == 200
    assert target_lines(record)[0].endswith("measured 0, met.")
    assert [row[0] for row in kills.table(record).cells][1:3] == [
        "kills",
        "while a checkpoint was written",
    ]
