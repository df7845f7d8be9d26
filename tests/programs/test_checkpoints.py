"""Folders of runs and their checkpoints, on any mesh, whatever happens."""

import json
import os
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import layout
import lm
import numpy as np
import optax
import own_process
import pytest
from checkpoints import Failed, RunFolder, newest, newest_in_words
from sizes import SIZES

import cage_jax as cage

REFUSED = "needs a whole checkpoint of this model and optimizer"


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def small(length=5000):
    return {"x": jnp.arange(float(length)), "y": {"z": jnp.ones((64, 64))}}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path, {}, resume=False) as folder:
        yield folder


def save(folder, *states):
    with folder.checkpoints("trunk") as checkpoints:
        for step, state in enumerate(states):
            checkpoints.save(step, state)


def restore(folder, like, step=0):
    with folder.checkpoints("trunk") as checkpoints:
        return checkpoints.restore(step, abstract(like))


def test_the_newest_is_kept_alone(folder, tmp_path):
    states = [{"x": jnp.full(9, float(i))} for i in range(4)]
    save(folder, *states)
    assert folder.latest_step("trunk") == 3 and folder.latest_step("ste") is None
    assert newest(tmp_path) == ("trunk", 3)
    assert newest_in_words(tmp_path) == "the newest checkpoint is step 3 of trunk"
    chex.assert_trees_all_equal(restore(folder, states[3], 3), states[3])
    assert newest(tmp_path / "nothing") is None
    assert newest_in_words(tmp_path / "nothing") == "there is no checkpoint yet"
    (kept,) = (tmp_path / "checkpoints/trunk").iterdir()
    assert kept.name == "3"


def test_what_is_saved_may_be_donated_at_once(folder):
    """A checkpoint under way is of its step, not of the next ones in its place."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(2_000_000)
    with folder.checkpoints("trunk") as checkpoints:
        for step in range(3):
            checkpoints.save(step, {"x": x})
            for _ in range(50):
                x = add(x)
    chex.assert_trees_all_equal(
        restore(folder, {"x": x}, 2)["x"], jnp.full(x.shape, 100.0)
    )


def model_and_optimizer(optimizer="cage"):
    size = SIZES["tiny"]
    model = lm.LanguageModel(
        size, w_bits=4, a_bits=4, kv_bits=None, microbatch=8, seed=0
    )
    rate = optax.constant_schedule(1e-3)
    if optimizer == "adamw":
        return model, lm.optimizer_of(optax.adamw, rate)
    if optimizer == "sgd":
        return model, optax.sgd(rate)
    return model, model.optimizer(rate, cage.silence_then_constant(10, 5.0))


def trained(mesh, steps=1):
    """The state of the example's model after some steps on a mesh."""
    model, tx = model_and_optimizer()
    with jax.set_mesh(mesh):
        run, like = model.step_on(mesh, tx)
        places = layout.shardings_of(like)
        state = jax.jit(lambda: model.first_state(tx), out_shardings=places)()
        windows = np.random.default_rng(0).integers(0, 256, (8, 33)).astype(np.uint8)
        windows = jax.device_put(windows, layout.batch_sharding(mesh))
        for _ in range(steps):
            state, _ = run(state, windows)
    return run, state, windows


def test_restored_on_other_meshes_and_the_same(folder, standard_promotion):
    mesh = layout.mesh_of(jax.devices(), 2)
    run, state, windows = trained(mesh)
    save(folder, state)
    values = jax.tree.map(np.asarray, state)
    for devices, model in [(8, 2), (8, 1), (4, 1), (4, 4), (1, 1)]:
        other = layout.mesh_of(jax.devices()[:devices], model)
        like = layout.placed(jax.eval_shape(lambda: state), other)
        with folder.checkpoints("trunk") as checkpoints:
            found = checkpoints.restore(0, like)
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, found), values)
        assert layout.shardings_of(found) == layout.shardings_of(like)
    # On the same mesh the next steps are the same to the bit.
    with jax.set_mesh(mesh):
        restored = restore(folder, state)
        for _ in range(3):
            state, loss = run(state, windows)
            restored, again = run(restored, windows)
            assert float(loss) == float(again)
    chex.assert_trees_all_equal(restored, state)


def test_a_truncated_checkpoint_is_named_and_kept(tmp_path):
    with RunFolder(tmp_path, {}, resume=False) as folder:
        save(folder, small())
    files = [p for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:40])
    before = contents(tmp_path)
    own_process.run(restore_what_is_truncated, tmp_path)
    assert before == contents(tmp_path)


def restore_what_is_truncated(path):
    with (
        RunFolder(path, {}, resume=True) as folder,
        pytest.raises(ValueError, match=REFUSED),
    ):
        restore(folder, small())


def test_a_checkpoint_of_another_model_is_refused(folder, tmp_path):
    save(folder, small())
    before = contents(tmp_path)
    for other, difference in (
        (
            small() | {"x": jnp.ones(4)},
            r"x is float32\[5000\] there and float32\[4\] h",
        ),
        (
            small() | {"x": jnp.arange(5000)},
            r"float32\[5000\] there and int32\[5000\] h",
        ),
        ({"x": jnp.ones(5000)}, r"y/z is float32\[64, 64\] there and nothing here"),
        (small() | {"w": jnp.ones(3)}, r"w is nothing there and float32\[3\] here"),
    ):
        with pytest.raises(
            ValueError, match=f"{REFUSED}; .*{difference}.*Nothing was over"
        ):
            restore(folder, other)
        assert before == contents(tmp_path)


def test_a_checkpoint_of_another_optimizer_is_refused(folder, standard_promotion):
    def state(name):
        model, tx = model_and_optimizer(name)
        return jax.jit(lambda: model.first_state(tx))()

    save(folder, state("cage"))
    chex.assert_trees_all_equal(restore(folder, state("cage")), state("cage"))
    with pytest.raises(ValueError, match=r"mu/.* is float32.* there and nothing here"):
        restore(folder, state("sgd"))


def test_other_settings_are_refused(tmp_path):
    rules = str(cage.Rules([(".*kernel", cage.int4())]))
    with RunFolder(tmp_path, {"rules": rules, "seed": 0}, resume=False) as folder:
        save(folder, {"x": jnp.ones(3)})
    before = contents(tmp_path)
    other = str(cage.Rules([(".*kernel", cage.int3())]))
    with pytest.raises(
        ValueError, match=r"rules was \".*int4.*\", is \".*int3.*\"\. Use"
    ):
        RunFolder(tmp_path, {"rules": other, "seed": 0}, resume=True)
    with pytest.raises(ValueError, match=r"must not hold a run already"):
        RunFolder(tmp_path, {"rules": rules, "seed": 0}, resume=False)
    assert before == contents(tmp_path)
    with RunFolder(tmp_path, {"rules": rules, "seed": 0}, resume=True) as folder:
        assert folder.resumed


def test_a_run_without_a_checkpoint_is_begun_anew(tmp_path):
    with RunFolder(tmp_path, {"seed": 0}, resume=False):
        pass
    for resume in (False, True):
        with RunFolder(tmp_path, {"seed": 1}, resume=resume) as folder:
            assert not folder.resumed
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 1}


def test_what_cannot_be_read_or_made_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`--out` must be a folder .* '/proc/none'"):
        RunFolder(Path("/proc/none"), {}, resume=False)
    with RunFolder(tmp_path / "new", {}, resume=False) as folder:
        save(folder, {"x": jnp.ones(3)})
    (tmp_path / "new" / "settings.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"settings\.json is no JSON"):
        RunFolder(tmp_path / "new", {}, resume=True)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from checkpoints import RunFolder
        folder = RunFolder(Path(sys.argv[1]), {}, resume=True)
        print("taken", flush=True)
        sys.stdin.read()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path), "XLA_FLAGS": ""},
    )
    try:
        assert other.stdout.readline() == "taken\n"
        before = contents(tmp_path)
        with pytest.raises(ValueError, match="must be used by one run at a time"):
            RunFolder(tmp_path, {}, resume=True)
        assert before == contents(tmp_path)
    finally:
        other.communicate()
    # It ended, however it ended.
    with RunFolder(tmp_path, {}, resume=True) as folder:
        save(folder, {"x": jnp.ones(3)})
    with RunFolder(tmp_path, {}, resume=True) as folder:
        assert folder.resumed


def test_killed_at_any_moment(tmp_path):
    """While it does nothing but write checkpoints, the newest is whole."""
    code = """
        import sys
        from pathlib import Path
        import jax.numpy as jnp
        from checkpoints import RunFolder
        folder = RunFolder(Path(sys.argv[1]), {}, resume=True)
        with folder.checkpoints("trunk") as checkpoints:
            step = (checkpoints.latest_step() or 0) + 1
            while True:
                checkpoints.save(step, {"x": jnp.full(300_000, float(step))})
                print(step, flush=True)
                step += 1
    """
    like = {"x": jnp.zeros(300_000)}
    moments, steps, under_way = np.random.default_rng(0).uniform(0, 0.3, 6), [0], 0
    for moment in moments:
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": ":".join(sys.path), "XLA_FLAGS": ""},
        ) as run:
            for _ in range(3):
                run.stdout.readline()
            time.sleep(moment)
            run.kill()
            run.stdout.read()
        under_way += any(tmp_path.glob("checkpoints/trunk/*tmp*"))
        with RunFolder(tmp_path, {}, resume=True) as folder:
            step = folder.latest_step("trunk")
            found = restore(folder, like, step)
        chex.assert_trees_all_equal(found["x"], jnp.full(300_000, float(step)))
        assert step > steps[-1]
        steps.append(step)
    assert under_way


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """A limit on the size of a file stands for a disk without room."""
    own_process.run(write_more_than_fits_into, tmp_path)


def write_more_than_fits_into(path):
    """Every tenth of a checkpoint is the last that there is room for."""
    good, large = small(100), small(400_000)
    large["x"] = large["x"] * 1.7 - jnp.sin(large["x"])  # does not compress
    for moment in range(10):
        room = large["x"].nbytes * moment // 20  # Orbax may write it in two parts
        with RunFolder(path / str(moment), {}, resume=False) as folder:
            save(folder, good)
            write_more_than_fits(folder, large, room)
            assert folder.latest_step("trunk") == 0
            chex.assert_trees_all_equal(restore(folder, good), good)
    # With room again they go on, as another process would: threads of Orbax that failed
    # write for a moment.
    for moment in range(10):
        with RunFolder(path / str(moment), {}, resume=True) as folder:
            with folder.checkpoints("trunk") as checkpoints:
                checkpoints.save(1, large)
            chex.assert_trees_all_equal(restore(folder, large, 1), large)


def write_more_than_fits(folder, large, room):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with (
            pytest.raises(Failed, match=r"The checkpoint of step 0 is whole and kept"),
            folder.checkpoints("trunk") as checkpoints,
        ):
            checkpoints.save(1, large)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
