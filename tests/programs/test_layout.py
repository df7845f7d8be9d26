"""The example's model on a mesh: where its arrays lie, and what devices exchange."""

import dataclasses

import hlo
import jax
import jax.numpy as jnp
import layout
import lm
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from sizes import SIZES

import cage_jax as cage

pytestmark = pytest.mark.usefixtures("standard_promotion")

SIZE = dataclasses.replace(
    SIZES["tiny"], layers=3, width=256, head_size=64, hidden_multiple=256
)
BATCH, LENGTH, STEPS = 16, 33, 10
# Devices along "model"; a block of 128 rows is on one of them.
MESHES = {"fsdp": 1, "tensor": 2}


def model_of(kv_bits=None):
    return lm.LanguageModel(
        SIZE, w_bits=4, a_bits=4, kv_bits=kv_bits, microbatch=8, seed=0
    )


def optimizer_of(model, name):
    rate = optax.constant_schedule(1e-3)
    if name == "AdamW":
        return lm.optimizer_of(optax.adamw, rate)
    return model.optimizer(rate, cage.silence_then_constant(STEPS, 5.0, silence=0.2))


def windows_on(mesh):
    place = layout.batch_sharding(mesh)
    return jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.uint8, sharding=place)


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def test_where_arrays_lie():
    mesh = layout.mesh_of(jax.devices(), 2)
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    model = model_of()
    params = jax.eval_shape(model.initial_params)
    state = jax.eval_shape(optimizer_of(model, "CAGE").init, params)
    found = by_path(layout.shardings((params, state), mesh))
    expected = {
        "layers/query/kernel": P(None, None, ("model", "data")),
        "layers/down/kernel": P(None, "model", "data"),
        "head/kernel": P(None, ("model", "data")),
        "embedding/embedding": P(None, ("model", "data")),
        "layers/mlp_norm/scale": P(None, None),
    }
    for name, spec in expected.items():
        same = [each.spec for path, each in found.items() if name in path]
        # The parameter and Adam's two moments.
        assert same == [spec] * 3, name
    counts = [each.spec for path, each in found.items() if "count" in path]
    assert counts and set(counts) == {P()}


def test_what_does_not_divide_is_whole():
    mesh = layout.mesh_of(jax.devices(), 4)
    array = jax.ShapeDtypeStruct((12, 6), jnp.float32)
    found = layout.shardings({"down": {"kernel": array}}, mesh)
    assert found["down"]["kernel"].spec == P(None, None)
    with pytest.raises(ValueError, match=r"`--model-devices` must divide .* 3 of 8"):
        layout.mesh_of(jax.devices(), 3)


@pytest.mark.parametrize("model_devices", MESHES.values(), ids=MESHES)
def test_a_mesh_trains_as_one_device(model_devices):
    model = model_of()
    tx = optimizer_of(model, "CAGE")
    generator = np.random.default_rng(0)
    batches = generator.integers(0, 256, (5, BATCH, LENGTH)).astype(np.uint8)

    def losses(run, state, place):
        for windows in batches:
            state, loss = run(state, place(windows))
            yield float(loss)

    alone = jax.jit(model.step(tx))
    expected = list(losses(alone, model.first_state(tx), jnp.asarray))

    mesh = layout.mesh_of(jax.devices(), model_devices)
    with jax.set_mesh(mesh):
        run, state = model.step_on(mesh, tx)
        places = jax.tree.map(lambda x: x.sharding, state)
        state = jax.device_put(model.first_state(tx), places)
        found = list(
            losses(run, state, lambda x: jax.device_put(x, layout.batch_sharding(mesh)))
        )
    # Sums over devices are rounded in another order, and a code may flip.
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)


@pytest.mark.parametrize("model_devices", MESHES.values(), ids=MESHES)
def test_cage_adds_no_collective(model_devices):
    mesh = layout.mesh_of(jax.devices(), model_devices)
    model, found, gathers = model_of(kv_bits=8), {}, {}
    for name in ("AdamW", "CAGE"):
        with jax.set_mesh(mesh):
            run, state = model.step_on(mesh, optimizer_of(model, name))
            text = run.lower(state, windows_on(mesh)).compile().as_text()
        found[name], gathers[name] = hlo.moved(text), hlo.largest_gather(text)
    assert found["AdamW"].counts
    if model_devices == 1:
        # A column, its scale and its rotation are on one device.
        assert found["CAGE"].collectives == found["AdamW"].collectives
        assert found["CAGE"].counts == found["AdamW"].counts
    else:
        # The scales of rows that are split over "model": a number a column each.
        added = found["CAGE"].collectives - found["AdamW"].collectives
        assert set(added) <= {"all-reduce"}
        columns = 2 * SIZE.layers * SIZE.width * 4
        assert sum(added.values()) <= columns
    assert gathers["CAGE"] <= gathers["AdamW"]
