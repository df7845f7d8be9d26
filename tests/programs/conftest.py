"""What tests of programs share."""

import gc

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """What one file has compiled is not kept for the next ones."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def as_users_have_it(standard_promotion):
    """For programs, which are not the library: jax's own defaults."""
    with jax.numpy_rank_promotion("allow"):
        yield
