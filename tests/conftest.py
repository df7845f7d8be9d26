"""Settings stricter than any user's: what passes here passes elsewhere."""

import contextlib
import gc
import os
import pathlib

# Kernels may be tested where there is a GPU, by JAX_PLATFORMS=cuda.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Most of the time goes to compiling small programs. All of them are kept, for the other
# workers, for the processes that tests start, and for the next run.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# XLA's own caches would make the folder's path a part of every key.
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng():
    """The same random numbers in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def key():
    """The same jax key in every run."""
    return jax.random.key(0)


@pytest.fixture
def standard_promotion():
    """For tests through optax.adam, which needs implicit dtype promotion itself."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def x64():
    """Float64 arrays in this test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_arrays_too(monkeypatch):
    """Kernels of arrays that are otherwise left to the compiler."""
    monkeypatch.setattr("cage_jax.pallas.candidates.SMALLEST", 0)


@pytest.fixture
def compilations():
    """A context in which so many programs are compiled, no more and no less."""

    @contextlib.contextmanager
    def expected(count):
        found = []

        def listen(event, *_, **__):
            if event == "/jax/core/compile/backend_compile_duration":
                found.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert len(found) == count

    return expected


@pytest.fixture(scope="session", autouse=True)
def nothing_is_tuned(tmp_path_factory):
    """What this machine was tuned for decides nothing here."""
    file = tmp_path_factory.mktemp("tuned") / "kernels.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cage_jax.pallas.tuned.path", lambda: file)
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """Compiled programs of one file do not stay in memory for the next ones."""
    yield
    jax.clear_caches()
    gc.collect()


# Minutes each: begun last, one of them would keep one worker while the other waits.
SLOW = (
    "test_notebooks.py",
    "test_processes.py",
    "test_train_lm.py",
    "test_models.py",
    "test_benchmarks.py",
)


def pytest_collection_modifyitems(items):
    """Puts the slow files first."""
    items.sort(key=lambda item: item.path.name not in SLOW)


def pytest_addoption(parser):
    """Options of these tests alone."""
    parser.addoption(
        "--all-chips",
        action="store_true",
        help="compile kernels for TPU v4 and v5p too, not for v5e and v6e alone",
    )
