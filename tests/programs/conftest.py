"""What tests of programs share."""

import jax
import pytest


@pytest.fixture
def as_users_have_it(standard_promotion):
    """For programs, which are not the library: jax's own defaults."""
    with jax.numpy_rank_promotion("allow"):
        yield
