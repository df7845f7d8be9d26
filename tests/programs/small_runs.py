"""Runs of the language model that are small, and what happens to them."""

import os
from pathlib import Path

import chex
import numpy as np
from batches import Batches
from experiment import Settings
from rich.console import Console

CONSOLE = Console(quiet=True)


def settings(out, **changes):
    values = {"arms": ("ste", "cage"), "tiny": True, "steps": 20, "strength": 300.0}
    return Settings(out=Path(out), **({"devices": 1} | values | changes))


def assert_same(found, expected):
    """The same arms to the bit."""
    assert list(found) == list(expected)
    for arm, result in expected.items():
        assert found[arm].loss == result.loss
        chex.assert_trees_all_equal(found[arm].params, result.params)
        np.testing.assert_array_equal(found[arm].history.losses, result.history.losses)


def disturb(monkeypatch, at, act):
    """Calls `act` when training reads the data of step `at`, counted over all arms."""
    original, reads = Batches.start, 0

    def start(self, step):
        nonlocal reads
        for windows in original(self, step):
            reads += 1
            if reads == at:
                act()
            yield windows

    monkeypatch.setattr(Batches, "start", start)


def send(number):
    return lambda: os.kill(os.getpid(), number)
