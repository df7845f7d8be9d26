"""Tests of programs hold as little memory as they can."""

import gc

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """What one file has compiled is not kept for the next ones."""
    yield
    jax.clear_caches()
    gc.collect()
