"""One tiny Llama for all tests of files: its dimensions, its parameters, its codes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import along_inputs, random_codes

from cage_jax.core.quantized_array import QuantizedArray
from cage_jax.export import safetensors_files
from cage_jax.llama.config import LlamaConfig

# Kernels of three shapes alone, so that few programs are compiled.
CONFIG = LlamaConfig(
    vocabulary=320,
    width=64,
    hidden=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=32,
    rope_theta=50_000.0,
    norm_epsilon=1e-5,
    context=128,
    bos=1,
    eos=(0,),
)
# The same shapes, of other heads and without a head of its own.
TIED = dataclasses.replace(CONFIG, tied=True, heads=2, kv_heads=1, head_size=64)


@functools.cache
def params_of(config=CONFIG, seed=0):
    """Draws float32 parameters, as a nested dict of jax arrays.

    Norms are not one, which would hide that two were swapped.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for path, shape in config.shapes().items():
        if path.endswith("scale"):
            found[path] = rng.uniform(0.5, 1.5, shape)
        else:
            found[path] = 0.1 * rng.standard_normal(shape)
    return nested({path: jnp.asarray(x, jnp.float32) for path, x in found.items()})


def nested(by_path):
    """Makes a nested dict of arrays by path."""
    tree = {}
    for path, leaf in by_path.items():
        *inner, last = path.split("/")
        node = tree
        for name in inner:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def with_leaf(tree, path, leaf):
    """Copies a tree, with another leaf at a path."""
    first, *rest = path.split("/", 1)
    return tree | {first: with_leaf(tree[first], rest[0], leaf) if rest else leaf}


def with_codes(tree, path, quantizer, seed=0):
    """Copies a tree, with random codes at a path, which no program has computed."""
    node = tree
    for name in path.split("/"):
        node = node[name]
    rng = np.random.default_rng(seed)
    codes = random_codes(rng, along_inputs(quantizer), node.shape)
    return with_leaf(tree, path, codes)


def with_kernels(quantizer, config=CONFIG):
    """Makes parameters with random codes of all kernels, the head's too."""
    found = params_of(config)
    for path in config.shapes():
        if path.endswith("/kernel"):
            found = with_codes(found, path, quantizer)
    return found


def on_host(tree):
    """Makes a tree of NumPy arrays, which are cut and turned without programs."""
    return jax.tree.map(np.asarray, tree)


def leaves_by_path(tree):
    """Gives floats and codes by path."""
    found, _ = jax.tree.flatten_with_path(
        tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray)
    )
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in found}


def write_anew(path, content):
    """Writes bytes to a new file of that name; from the old one jax may still copy."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def arrays_of(folder):
    """Reads the tensors of a folder's only file: copies, since it may be replaced."""
    found, _ = safetensors_files.read(folder / "model.safetensors")
    return {name: array.copy() for name, array in found.items()}
