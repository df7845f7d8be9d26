"""Counts what kernels move on each chip of an automatic mesh, compiled for TPU.

Each case is compiled for four chips that divide an array, once with rules that know
nothing of that, so that XLA partitions its own form, and once with `Rules.placed`. A
unit is one copy of a chip's part. Nothing is run.
"""

import os
import sys
from typing import Any

# Before jax is loaded: no TPU is looked for, and other processes may compile too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import hlo
import jax
import measurement
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from measurement import Rows

import cage_jax as cage

TOPOLOGY, CHIPS = "v5e:2x2", 4
SHAPE = (4096, 32768)
CASES = {
    "quest(4), columns": (cage.quest(4, axis=-2), P(None, "data")),
    "int4(group_size=128), rows": (cage.int4(group_size=128, axis=-2), P("data")),
    "int4(group_size=32, axis=-1), rows": (
        cage.int4(group_size=32, axis=-1),
        P("data"),
    ),
}
# What any program moves, by what is computed.
LEAST = {"fake_quant": 2.0, "with its gradient": 4.0, "fused step": 7.0}
EXCESS = 1.05


def counted(quantizer: cage.Quantizer, spec: P, placed: bool) -> dict[str, float]:
    """Units that each chip moves, and bytes that it receives from others."""
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGY
    ).devices
    mesh = Mesh(np.array(devices), ("data",))
    sharding = NamedSharding(mesh, spec)
    x = {"x": jax.ShapeDtypeStruct(SHAPE, "float32", sharding=sharding)}
    rules = cage.Rules([(".*", quantizer)])
    if placed:
        rules = rules.placed(x)
    tx = cage.cage_adamw(1e-3, rules, strength=cage.silence_then_ramp(100))

    def abstract(leaf):
        place = sharding if leaf.shape == SHAPE else NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def forward(x):
        return cage.fake_quant(x, rules)

    def both(x, cotangent):
        value, back = jax.vjp(forward, x)
        return value, *back(cotangent)

    def step(x, state, gradient):
        return tx.fused_step(gradient, state, x)

    state = jax.tree.map(abstract, jax.eval_shape(tx.init, x))
    programs = (
        jax.jit(forward).lower(x),
        jax.jit(both).lower(x, x),
        jax.jit(step, donate_argnums=(0, 1)).lower(x, state, x),
    )
    found, received = {}, 0
    for name, program in zip(LEAST, programs):
        moves = hlo.moved(program.compile().as_text())
        found[name] = moves.memory / (x["x"].size * 4 / CHIPS)
        received += sum(moves.collectives.values())
    return found | {"received": received}


def measure(cases: dict[str, tuple[cage.Quantizer, P]]) -> dict[str, Any]:
    """The record of some cases."""
    figures = {
        name: {kind: counted(*case, kind == "placed") for kind in ("plain", "placed")}
        for name, case in cases.items()
    }
    return {
        "name": "kernels_on_shards",
        "benchmark": "kernels_on_shards",
        "title": f"Copies of a chip's part that four v5e move, each, of {SHAPE[0]} x "
        f"{SHAPE[1]} float32",
        "environment": measurement.environment("libtpu"),
        "settings": {"topology": TOPOLOGY, "shape": SHAPE},
        "figures": figures,
        "targets": [
            measurement.target(
                f"{what}, placed: the most, to the least possible",
                max(each["placed"][what] for each in figures.values()) / least,
                EXCESS,
            )
            for what, least in LEAST.items()
        ],
    }


def table(record: dict[str, Any]) -> Rows:
    """The table of a record."""
    cells = [
        [name, kind, *(f"{each[what]:.2f}" for what in LEAST)]
        for name, kinds in record["figures"].items()
        for kind, each in kinds.items()
    ]
    return Rows(["quantizer, sharded along", "rules", *LEAST], cells)


def main() -> int:
    """Runs the program; the exit status."""
    from rich.console import Console

    tiny = "--tiny" in sys.argv
    record = measure(dict(list(CASES.items())[: 1 if tiny else None]))
    measurement.finish(record, table(record), Console(), keep=not tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
