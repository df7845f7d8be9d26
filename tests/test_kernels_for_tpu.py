"""Kernels compiled for a TPU that need not be here: some of each kind.

All of them are in programs/test_every_kernel_for_tpu.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the extra `tpu` is missing"
)
SCRIPT = """
import dataclasses, json
import cage_jax as cage
import hlo, jax, kernels, kernels_on_shards, low_bit

QUEST, GROUPS = cage.quest(4), cage.int4(group_size=32, axis=-1)
ZEROS = cage.int4(group_size=32, symmetric=False, axis=-2)
cases = [
    kernels.Case(QUEST, "forward and backward"),
    kernels.Case(GROUPS, "step"),
]
kernel = []
for case in cases:
    found = kernels.counted(case, "v5e", "pallas")
    assert found["kernels"] == case.kernels, case
    kernel.append([found["units"] / case.least, found["in place"] - case.in_place])
for shape, quantizer, dtype in (
    ((64, 1536, 576), cage.quest(4, axis=-2), "float32"),
    ((64, 576, 576), cage.int4(axis=-1), "float32"),
    ((32, 960, 2560), GROUPS, "bfloat16"),
    ((32, 960, 2560), ZEROS, "float32"),
):
    x = kernels.array(shape, dtype, "v5e")
    program = kernels.lowered(kernels.Case(quantizer, "step"), x, "pallas").compile()
    units = hlo.moved(program.as_text()).memory / x.size / x.dtype.itemsize
    kernel.append([units / 7, 0])
x = {"x": kernels.array((8192, 16384), "float32", "v5e")}
tx = cage.cage_adamw(1e-3, cage.Rules([(".*", cage.quest(4))]), total_steps=1000)
state = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=x["x"].sharding),
    jax.eval_shape(tx.init, x),
)
step = lambda params, state, gradient: tx.fused_step(gradient, state, params)
program = jax.jit(step, donate_argnums=(0, 1)).lower(x, state, x).compile()
# Besides, every tenth step reads the gradient, for its means.
kernel.append([hlo.moved(program.as_text()).memory / x["x"].size / 4 / (7 + 1), 0])
product = low_bit.counted(low_bit.CASES[3], "v5e", "codes")["units"]
# Scales of float16, which XLA converts first: in the memory of the chip.
float16 = low_bit.Case(cage.q4_1(axis=-2))
product = max(product, low_bit.counted(float16, "v6e", "kernel")["units"])
x = kernels.array((65536, 4096), "float32", "v5e")
groups = jax.jit(lambda x: cage.fake_quant(x, GROUPS, implementation="xla"))
moved = hlo.moved(groups.lower(x).compile().as_text()).memory
columns = kernels_on_shards.CASES["quest(4), columns"]
shards = kernels_on_shards.counted(*columns, True)
print(json.dumps([kernel, product, moved / x.size / 4, shards]))
"""


def on(chips, script):
    """What a script prints last, as JSON."""
    # A process of its own: libtpu says much, and stays.
    paths = [ROOT / "benchmarks", ROOT / "tests", ROOT / "tests" / "programs"]
    done = subprocess.run(
        [sys.executable, "-c", script, *chips],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_libtpu
def test_each_kind_moves_the_least_and_no_copy():
    found, product, groups, shards = on([], SCRIPT)
    for units, in_place in found:
        assert 1 <= units < 1.05
        assert in_place == pytest.approx(0, abs=1e-4)
    assert 1 <= product < 1.05
    # Groups in the order of its memory: read twice, written once, and a number for each
    # group.
    assert groups <= 3.2
    # On each chip of an automatic mesh as on one device.
    assert shards.pop("received") == 0
    for units, least in zip(shards.values(), (2, 4, 7), strict=True):
        assert least <= units < 1.05 * least
