"""The benchmarks of optimizer steps: formulas and records, never timings."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import measurement
import numpy as np
import optax
import optimizer_leaves
import optimizer_step
import pytest

import cage_jax as cage

pytestmark = pytest.mark.usefixtures("as_users_have_it")


def check_rows(rows):
    """Every line of a table is as long as its header."""
    assert all(len(cells) == len(rows.header) for cells in rows.cells)


def test_the_sizes_are_what_they_are_called():
    for size, millions in (("10M", 10), ("30M", 30), ("100M", 100)):
        shapes = optimizer_step.shapes(size)
        count = sum(math.prod(shape) for shape in shapes.values())
        assert 0.95 < count / 1e6 / millions < 1.05
        assert all(rows % 128 == 0 for rows, _ in shapes.values())


def tiny_tree(scale, seed):
    return optimizer_step.random_tree(optimizer_step.shapes("tiny"), scale, seed)


def test_both_phases_are_what_they_are_called():
    optimizers = optimizer_step.adamw_and_cage()
    tx, adamw = optimizers["cage_jax, int4"], optimizers["optax, AdamW"]
    params, gradients = tiny_tree(0.02, seed=0), tiny_tree(1e-3, seed=1)
    plain, _ = jax.jit(adamw.update)(gradients, adamw.init(params), params)

    update = jax.jit(tx.update)

    def updates_at(count):
        state = optax.tree_utils.tree_set(tx.init(params), cage_count=jnp.int32(count))
        return update(gradients, state, params)[0]

    name = "0/up/kernel"
    np.testing.assert_array_equal(updates_at(0)[name], plain[name])
    x = np.float64(params[name])
    groups = x.reshape(-1, 128, x.shape[-1])
    scale = np.abs(groups).max(1, keepdims=True) / 7
    error = (groups - np.round(groups / scale) * scale).reshape(x.shape)
    expected = np.float64(plain[name]) - 1e-3 * 10 * error
    for count in (optimizer_step.SILENT_STEPS, optimizer_step.PHASES["active"]):
        # Float32; ties between two levels do not occur in normal numbers.
        ours = updates_at(count)[name]
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-8)


def test_recommended_gradients_are_read_once_in_a_period_of_the_active_phase():
    tx = optimizer_step.adamw_and_cage()["cage_jax, int4, recommended"]
    program = optimizer_step.Program(tx, tiny_tree(1e-3, seed=1))
    for phase, reads in (("silent", 0), ("active", 2)):
        call = optimizer_step.steps_of({"cage_jax": program}, phase)["cage_jax"]
        for _ in range(2 * optimizer_step.PERIOD):
            call()
        read = optax.tree_utils.tree_get(program._state, "estimates")
        assert {count.item() for each in read for count in each} == {reads}, phase


def test_pytorch_makes_the_same_correction():
    torch = pytest.importorskip("torch")
    x = tiny_tree(0.02, seed=0)["0/up/kernel"]
    theirs = torch.from_numpy(np.array(x))
    hadamard = optimizer_step.torch_hadamard(128)
    for name, error in (
        ("int4", optimizer_step.torch_int4_error(theirs)),
        ("quest", optimizer_step.torch_quest_error(theirs, hadamard)),
    ):
        ours = cage.quantization_error(x, optimizer_step.QUANTIZERS[name])
        # The rotation sums 128 float32 numbers of 0.02 in another order.
        np.testing.assert_allclose(ours, error.numpy(), atol=1e-7, err_msg=name)


def test_the_record_of_steps(monkeypatch):
    pytest.importorskip("torch")
    # Programs of the other optimizers are alike.
    kept = ("optax, AdamW", "cage_jax, int4", "cage_jax, int4, recommended")
    every = optimizer_step.adamw_and_cage()
    group = {name: every[name] for name in kept}
    monkeypatch.setattr(optimizer_step, "groups", lambda: [group])
    figure = optimizer_step.measure("tiny", periods=1)
    rows = {row["step"]: row for row in figure["steps"]}
    both = [f"{name}, {phase}" for name in kept[1:] for phase in ("silent", "active")]
    rivals = ["torch, AdamW", "torch, AdamW fused"]
    rivals += ["torch, int4, active", "torch, quest, active"]
    assert list(rows) == ["optax, AdamW", *both, *rivals]
    for row in rows.values():
        assert row["to_base"] == pytest.approx(np.mean(row["in_period"]))
        assert len(row["in_period"]) == optimizer_step.PERIOD
    assert rows["optax, AdamW"]["to_base"] == 1
    # Of the active int4 step, and of silent ones to AdamW and to PyTorch's.
    found = optimizer_step.record_of([figure])
    assert len(found["targets"]) == 5
    for each in found["targets"]:
        assert each["met"] == (each["measured"] <= each["bound"])
    check_rows(optimizer_step.table(json.loads(json.dumps(found))))
    # Bounds of the size of 30M are of steps that there are.
    large = optimizer_step.targets_of(figure | {"size": "30M"})
    for step in both:
        bounded = [each for each in large if each["text"].startswith(f"30M, {step}: ")]
        memory = [each for each in bounded if "intermediate memory" in each["text"]]
        in_memory = [each["measured"] for each in memory]
        expected = [rows[step]["memory"]] * (step in optimizer_step.MEMORY_BOUNDS)
        assert in_memory == expected


def test_ratios_in_a_period_are_of_steps_at_the_same_place():
    times = {"a": [1.0, 8.0, 3.0, 8.0, 5.0, 2.0], "b": [1.0, 2.0] * 3}
    found = measurement.ratios_in_period(times, "a", "b", period=2)
    assert found == [3.0, 4.0]


def test_the_record_of_many_arrays():
    rows = optimizer_leaves.measure(1, compiles=1, periods=1)
    by_name = {row["step"]: row for row in rows}
    plain = by_name[optimizer_leaves.ADAMW]
    assert plain["silent"] == plain["active"] == plain["compile_to_adamw"] == 1
    ours = by_name[optimizer_leaves.RECOMMENDED]
    published = by_name[optimizer_leaves.PUBLISHED]
    assert ours["compile_to_published"] == ours["compile"] / published["compile"]
    few, many = optimizer_leaves.LEAVES[0], optimizer_leaves.LEAVES[-1]
    made = [row | {"leaves": leaves} for leaves in (few, many) for row in rows]
    found = optimizer_leaves.record_of(made)
    measured = [each["measured"] for each in found["targets"]]
    assert measured == [ours["compile_to_published"], ours["compile_to_adamw"]]
    check_rows(optimizer_leaves.table(json.loads(json.dumps(found))))
    for leaves in optimizer_leaves.LEAVES:
        assert len(optimizer_leaves.shapes_of(leaves)) == leaves


def test_the_program_says_what_is_wrong(monkeypatch, capsys):
    for arguments, text in (
        (["--sizes", "1T"], "`--sizes` must be among"),
        (["--periods", "0"], "`--periods` must be at least 3"),
    ):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        assert optimizer_step.main() == 2, text
        assert text in capsys.readouterr().out
