"""Records hashes of what every preset gives, to compare after a change.

    python tests/record_bits.py before.json          record
    python tests/record_bits.py before.json --check  compare with the record

Values, codes with scales, errors and gradients of all presets on six shapes and three
dtypes, and one step of each placement, silent and active, for six of them. Compare on
one machine: another processor may round a sum differently. It takes four minutes.
"""

import argparse
import hashlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

# The package of this checkout, not an installed one.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import cage_jax as cage
from cage_jax.quantizers.scales import AbsMax, FourOverSix, Learned

SHAPES = [
    (256, 128),
    (64, 256),
    (2, 128, 128),
    (3, 3, 128, 64),
    (128, 4, 64),
    (512, 32),
]
DTYPES = ["float32", "bfloat16", "float16"]
INPUTS = {"axis": -2}  # of stacks too, in which no program tells them
PRESETS = {
    **{
        f"quest {bits}": cage.quest(bits, hadamard=32, **INPUTS)
        for bits in (1, 2, 3, 4)
    },
    "quest 4, 64": cage.quest(4, hadamard=64, group_size=64, **INPUTS),
    "int4 group 32": cage.int4(group_size=32, **INPUTS),
    "int4 asymmetric": cage.int4(symmetric=False, group_size=32, **INPUTS),
    "int4 rotated": cage.int4(hadamard=32, group_size=32, **INPUTS),
    "int8 tensor": cage.int8(axis=None),
    "int8 tokens": cage.int8(axis=-1),
    "lsq": cage.lsq(),
    "lsq 2": cage.lsq(2),
    "ternary": cage.ternary(),
    "seq": cage.seq(**INPUTS),
    "nvfp4 learned": cage.nvfp4(scale=Learned(start=AbsMax()), **INPUTS),
    "nvfp4 four over six": cage.nvfp4(scale=FourOverSix(), **INPUTS),
    **{
        preset.__name__: preset(**INPUTS)
        for preset in (
            *(cage.int8, cage.int4, cage.int3, cage.int2, cage.binary),
            *(cage.ct_w4a16, cage.ct_w8a8, cage.fp8, cage.mxfp4, cage.mxfp6),
            *(cage.mxfp8, cage.nf4, cage.nvfp4, cage.q4_0, cage.q4_1, cage.q8_0),
        )
    },
}
STEPPED = ["int4 group 32", "int2", "quest 4", "mxfp4", "nvfp4", "int4 asymmetric"]


def digest(tree):
    """Hashes the shapes, dtypes and bytes of a tree of arrays."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(leaf)
        found.update(str((array.shape, array.dtype)).encode() + array.tobytes())
    return found.hexdigest()[:16]


def numbers(shape, dtype, seed):
    drawn = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(drawn, dtype)


def of_array(quantizer, x, cotangent):
    rules, params = cage.Rules([("w", quantizer)]), {"w": x}
    needs = quantizer.scale.needs_grid
    variables = cage.with_grids(params, rules) if needs else params

    @jax.jit
    def everything(variables, cotangent):
        def value(variables):
            found = cage.fake_quant(variables, rules)
            return found["params"]["w"] if needs else found["w"]

        values, back = jax.vjp(value, variables)
        codes = cage.quantize(variables, rules)
        error = cage.quantization_error(variables, rules)
        return values, codes, error, back(cotangent)

    values, codes, error, gradient = everything(variables, cotangent)
    parts = {"values": values, "codes": codes, "error": error, "gradient": gradient}
    return {name: digest(part) for name, part in parts.items()}


def of_steps(quantizer):
    rules = cage.Rules([("w", quantizer)])
    params, found = {"w": numbers((256, 128), "float32", 0), "b": jnp.ones(4)}, {}
    gradients = {"w": numbers((256, 128), "float32", 1), "b": jnp.ones(4)}
    for strength in (0.0, 2.0):
        schedule = optax.constant_schedule(strength)
        placements = {
            "coupled": optax.chain(
                cage.coupled(rules, strength=schedule), optax.sgd(0.1)
            ),
            "decoupled": cage.cage_adamw(0.1, rules, strength=schedule),
            "post_step": cage.post_step(
                optax.adamw(0.1), rules, strength=schedule, learning_rate=0.1
            ),
        }
        for name, tx in placements.items():
            found[f"{name} {strength}"] = digest(
                jax.jit(tx.update)(gradients, tx.init(params), params)
            )
    return found


def record():
    found = {}
    for name, quantizer in PRESETS.items():
        for shape in SHAPES:
            for dtype in DTYPES:
                key = f"{name} {shape} {dtype}"
                try:
                    x, cotangent = numbers(shape, dtype, 0), numbers(shape, dtype, 1)
                    parts = of_array(quantizer, x, cotangent)
                except ValueError as error:  # a shape that it does not divide
                    parts = {"error": str(error)[:60]}
                found |= {f"{key} {part}": value for part, value in parts.items()}
    for name in STEPPED:
        steps = of_steps(PRESETS[name])
        found |= {f"{name} {part}": value for part, value in steps.items()}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--check", action="store_true", help="compare with the file")
    given = parser.parse_args()
    found = record()
    if not given.check:
        given.file.write_text(json.dumps(found, indent=1) + "\n")
        print(len(found), "hashes recorded")
        return
    before = json.loads(given.file.read_text())
    keys = before.keys() | found.keys()
    differs = [key for key in keys if before.get(key) != found.get(key)]
    print(
        f"{len(found)} hashes, {len(differs)} differ", *sorted(differs)[:40], sep="\n"
    )
    raise SystemExit(bool(differs))


if __name__ == "__main__":
    main()
