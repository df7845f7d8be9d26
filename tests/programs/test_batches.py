"""The windows that a run reads."""

import itertools

import jax
import layout
import numpy as np
import pytest
from batches import Batches, Windows

TOKENS = np.arange(1000, dtype=np.uint16)


def batches(devices=1, model=1, **changes):
    mesh = layout.mesh_of(jax.devices()[:devices], model)
    arguments = {
        "source": Windows(TOKENS, 10),
        "batch": 8,
        "seed": 3,
        "sharding": layout.batch_sharding(mesh),
    }
    return Batches(**(arguments | changes))


def test_windows_predict_every_token_once():
    windows = list(Windows(TOKENS, 10))
    assert len(windows) == len(Windows(TOKENS, 10)) == 99
    targets = np.concatenate([window[1:] for window in windows])
    np.testing.assert_array_equal(targets, np.arange(1, 991))
    assert all(np.array_equal(np.diff(window), np.ones(10)) for window in windows)
    # One more token completes one more window.
    assert len(Windows(np.arange(1001), 10)) == 100


def test_every_window_comes_once_an_epoch_in_another_order():
    made = batches(batch=9)
    epochs = [
        [
            int(row[0])
            for step in range(start, start + 11)
            for row in np.asarray(made[step])
        ]
        for start in (0, 11)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 990, 10))
    assert epochs[0] != epochs[1] != sorted(epochs[1])


def test_a_batch_is_a_function_of_seed_and_step():
    np.testing.assert_array_equal(batches()[5], batches()[5])
    assert not np.array_equal(batches()[5], batches()[6])
    assert not np.array_equal(batches()[5], batches(seed=4)[5])
    # Far into a run too, at once.
    assert batches()[10**9].shape == (8, 11)


def test_reading_ahead_is_reading():
    made = batches()
    read = list(itertools.islice(made.start(7), 20))
    for step, windows in enumerate(read, start=7):
        np.testing.assert_array_equal(windows, made[step])


def test_any_mesh_reads_the_same():
    for devices, model in ((8, 1), (8, 2), (4, 1), (2, 2)):
        made = batches(devices, model)
        for step in (0, 40):
            windows = made[step]
            np.testing.assert_array_equal(windows, batches()[step])
            assert windows.sharding == made._sharding
            rows = {shard.data.shape for shard in windows.addressable_shards}
            assert rows == {(8 * model // devices, 11)}


def test_examples_may_be_trees():
    class Pairs:
        def __len__(self):
            return 100

        def __getitem__(self, numbers):
            return {"x": np.stack([numbers, -numbers], 1), "y": numbers.astype(np.int8)}

    made = batches(8, source=Pairs())
    for batch in (made[2], next(made.start(2))):
        assert batch["x"].shape == (8, 2) and batch["y"].dtype == np.int8
        np.testing.assert_array_equal(
            batch["x"], np.stack([batch["y"], -batch["y"]], 1)
        )
        assert all(array.sharding == made._sharding for array in batch.values())


class Process:
    """A sharding as one process of a pod sees it: some devices are not its own."""

    def __init__(self, sharding, own):
        self._sharding, self._own = sharding, own

    def addressable_devices_indices_map(self, shape):
        every = self._sharding.devices_indices_map(shape)
        return {device: every[device] for device in self._own}

    def shard_shape(self, shape):
        return self._sharding.shard_shape(shape)


def test_a_process_reads_only_its_own_windows():
    """Also where its devices are no neighbours on the mesh."""
    devices = jax.devices()[:4]
    sharding = layout.batch_sharding(layout.mesh_of(devices))
    whole, read = np.asarray(batches()[5]), []

    class Counting(Windows):
        def __getitem__(self, numbers):
            read.extend(numbers)
            return super().__getitem__(numbers)

    for own in ((0, 1), (2, 3), (0, 3)):
        process = Process(sharding, [devices[i] for i in own])
        made = Batches(Counting(TOKENS, 10), batch=8, seed=3, sharding=process)
        read.clear()
        parts = made._steps[5]
        assert len(read) == 4  # of 8
        assert sorted(parts) == sorted(own)
        for i, part in parts.items():
            np.testing.assert_array_equal(part, whole[2 * i : 2 * i + 2])


def test_a_batch_the_mesh_does_not_divide_is_refused():
    mesh = layout.mesh_of(jax.devices(), 2)
    layout.check_batch(16, 8, mesh)
    with pytest.raises(
        ValueError,
        match=r"`--microbatch` must be a multiple of the 4 devices along \"data\"; got "
        r"6\. Use 8, fewer --devices, or more --model-devices\.",
    ):
        layout.check_batch(16, 6, mesh)
