"""Compiles fine-tuning steps of Llama 3 8B for TPU pods that are not here.

AdamW in bfloat16, fully sharded, is compared with the step that quantizes all layers at
int4 and pulls with the recommended CAGE, and with one that also learns from a teacher:
memory of a chip, what it moves, what chips send each other. Nothing is run.
"""

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

# Before jax is loaded: no TPU is looked for, and other processes may compile too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import hlo
import jax
import jax.numpy as jnp
import measurement
import numpy as np
import optax
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from measurement import Rows

import cage_jax as cage
from cage_jax import llama
from cage_jax.llama.config import LlamaConfig

CONFIG = LlamaConfig(
    vocabulary=128256,
    width=4096,
    hidden=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    rope_theta=500_000.0,
)
TINY = LlamaConfig(vocabulary=256, width=256, hidden=512, layers=3, heads=2)
# Gigabytes of memory of a chip.
MEMORY = {"v5e": 16, "v6e": 32}
TOPOLOGIES = ("v5e:8x8", "v6e:4x4")
DISTILLED = "CAGE, distilled"
KINDS = ("AdamW", "CAGE", DISTILLED)
TOKENS = 2048  # of the one window of each chip
RATE, STEPS = 2e-5, 1000
BOUND = 1.05  # of what CAGE moves, to AdamW


def forward(params: Any, tokens: jax.Array, config: LlamaConfig) -> jax.Array:
    """Computes logits in bfloat16; of each layer only the input is kept."""
    function = llama.blocks(config, dtype=jnp.bfloat16)[0].function
    batch = P("data")

    def layer(x, weights):
        return lax.with_sharding_constraint(function(weights, x), batch), None

    x = llama.embed(params, tokens, dtype=jnp.bfloat16)
    x = lax.with_sharding_constraint(x, batch)
    # What is gathered, layer by layer, is bfloat16.
    layers = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params["layers"])
    x, _ = lax.scan(jax.checkpoint(layer), x, layers)
    x = x * lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True))
    x = (x * params["norm"]["scale"]).astype(jnp.bfloat16)
    return x @ params["head"]["kernel"].astype(jnp.bfloat16)


def placed(tree: Any, mesh: Mesh, dtype: Any = None) -> Any:
    """Returns abstract arrays, each matrix split by columns, the last axis."""
    devices = mesh.size

    def place(leaf):
        spec = P()
        if leaf.ndim > 1 and leaf.shape[-1] % devices == 0 and leaf.shape[-2] > 1:
            spec = P(*[None] * (leaf.ndim - 1), "data")
        sharding = NamedSharding(mesh, spec)
        kind = dtype or leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding)

    return jax.tree.map(place, tree)


def compiled(config: LlamaConfig, topology: str, kind: str, tokens: int) -> Any:
    """The program of a step, of one window of so many tokens on each chip."""
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices
    mesh = Mesh(np.array(devices), ("data",))
    params = placed(jax.eval_shape(lambda: llama.initial_params(config, seed=0)), mesh)
    quantizer = cage.int4(axis=-2, group_size=128)
    rules = cage.Rules([(r"layers/.*kernel", quantizer), (r".*", None)]).placed(params)
    if kind == "AdamW":
        tx = optax.adamw(RATE)
    else:
        rate = optax.constant_schedule(RATE)
        with_pull = cage.recommended(rate, STEPS)
        tx = cage.cage_adamw(rate, rules, **with_pull)

    def loss(params, batch, teacher):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        if kind == DISTILLED:
            logits = lax.stop_gradient(forward(teacher, inputs, config))
            student = cage.distill(lambda p, x: forward(p, x, config), rules)
            return student(params, inputs, teacher=logits)
        if kind != "AdamW":
            params = cage.fake_quant(params, rules)
        logits = forward(params, inputs, config).astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return each.mean()

    def step(params, state, batch, teacher):
        value, gradients = jax.value_and_grad(loss)(params, batch, teacher)
        if kind != "AdamW":
            return *tx.fused_step(gradients, state, params), value
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state = placed(jax.eval_shape(tx.init, params), mesh)
    batch = jax.ShapeDtypeStruct(
        (mesh.size, tokens + 1), jnp.int32, sharding=NamedSharding(mesh, P("data"))
    )
    teacher = placed(params, mesh, jnp.bfloat16) if kind == DISTILLED else None
    out = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    with jax.set_mesh(mesh):
        run = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*out, None))
        return run.lower(params, state, batch, teacher).compile()


def counted(
    config: LlamaConfig, topology: str, kind: str, tokens: int
) -> dict[str, Any]:
    """What the program of a step needs and moves, on each chip."""
    start = time.perf_counter()
    program = compiled(config, topology, kind, tokens)
    memory, text = program.memory_analysis(), program.as_text()
    moves = hlo.moved(text)
    return {
        "memory": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "state": memory.argument_size_in_bytes,
        "traffic": moves.memory,
        "collectives": dict(moves.collectives),
        "counts": dict(moves.counts),
        "kernels": len(re.findall(r"%cage_\w+?(?:\.\d+)? = ", text)),
        "seconds to compile": time.perf_counter() - start,
    }


def measure(
    config: LlamaConfig, places: tuple[str, ...], tokens: int, out: Path | None
) -> dict[str, Any]:
    """The record; what is counted already is taken from the folder `out`."""
    figures = {}
    for topology in places:
        for kind in KINDS:
            name = f"{topology}, {kind}"
            path = out and out / f"{re.sub(r'[^a-zA-Z0-9]+', '-', name)}.json"
            if path is None or not path.exists():
                print(name, flush=True)
                figures[name] = counted(config, topology, kind, tokens)
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(figures[name]))
            else:
                figures[name] = json.loads(path.read_text())
    return {
        "name": "llama3_aot",
        "benchmark": "llama3_aot",
        "title": "A fine-tuning step of Llama 3 8B on each chip, compiled and not run",
        "environment": measurement.environment("libtpu", "flax"),
        "settings": {"config": dataclasses.asdict(config), "tokens": tokens},
        "figures": figures,
        "targets": [
            target for topology in places for target in _targets(figures, topology)
        ],
    }


def _targets(figures, topology):
    base, pulled = (figures[f"{topology}, {kind}"] for kind in KINDS[:2])
    bound = MEMORY[topology.partition(":")[0]]
    return [
        measurement.target(
            f"{topology}, CAGE: gigabytes a chip", pulled["memory"] / 1e9, bound, ".1f"
        ),
        measurement.target(
            f"{topology}, CAGE: bytes moved, to AdamW",
            pulled["traffic"] / base["traffic"],
            BOUND,
            ".3f",
        ),
    ]


def table(record: dict[str, Any]) -> Rows:
    """The table of a record."""
    cells = [
        [
            name,
            f"{each['memory'] / 1e9:.2f}",
            f"{each['state'] / 1e9:.2f}",
            f"{each['traffic'] / 1e9:.1f}",
            f"{sum(each['collectives'].values()) / 1e9:.2f}",
            f"{each['kernels']}",
        ]
        for name, each in record["figures"].items()
    ]
    header = ["step", "memory, GB", "of it state", "moved to and from it, GB"]
    return Rows([*header, "received from others, GB", "kernels"], cells)


def main() -> int:
    """Runs the program; the exit status."""
    from rich.console import Console

    tiny = "--tiny" in sys.argv
    asked = (TINY, ("v5e:2x2",), 128, None)
    if not tiny:
        asked = (CONFIG, TOPOLOGIES, TOKENS, Path("runs/llama3_aot"))
    record = measure(*asked)
    measurement.finish(record, table(record), Console(), keep=not tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
