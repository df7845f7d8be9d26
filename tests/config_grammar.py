"""Configs of transformers, field by field, and whether the logits are the same.

    python tests/config_grammar.py

Each config.json has one field of a whole one set to another value, or two fields that
are read together. What `cage_jax` reads must have the logits that transformers computes
from the same file and the same weights; anything else must be refused. The fields are
those of transformers' own classes, of all of its models.
"""

import collections
import dataclasses
import functools
import itertools
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cage_jax import llama
from cage_jax.llama import config_fields
from cage_jax.llama.config import LlamaConfig
from cage_jax.llama.tensors import PARAMETERS, expected_tensors, tree_of

KINDS = ("llama", "mistral", "qwen2", "qwen3")
MISSING = "(missing)"
# Longer than the context, and than all windows among the values.
TOKENS = np.random.default_rng(0).integers(0, 48, (2, 24))
# What any field may be set to.
VALUES = (
    *(MISSING, None, True, False, 0, 1, 2, 3, 4, -1, 8),
    *(0.0, 0.5, 1.0, 8.0, -1.0, float("nan"), float("inf"), "", "gelu", "default"),
    *([], [1], [2, 1], [-1], {}, {"0": "a"}, {"0": [1]}),
)
LARGE = (10**9, 10**400, -(10**9))  # for numbers that are read
# What fields may be set to that mean something else for some of them.
OTHERS = {
    "hidden_act": ("silu", "swish", "relu", "gelu_pytorch_tanh", "sigmoid", "SiLU"),
    "layer_types": (
        ["full_attention"] * 2,
        ["full_attention"] * 3,
        ["sliding_attention", "full_attention"],
        ["sliding_attention"] * 2,
        ["chunked_attention"] * 2,
    ),
    "architectures": (["LlamaForCausalLM"], ["LlamaModel"], ["Qwen2ForCausalLM"]),
    "hidden_size": (16, 64, 48),
    "head_dim": (6, 16, 7),
    "vocab_size": (48, 49, 64),
    "rope_theta": (10_000, 1e6, 1e31, "1e4"),
    "rms_norm_eps": (1e-5, 1e-12, 1e-50, 0.1, 1.5),
    "dtype": ("float32", "bfloat16", "float"),
    "attn_implementation": ("eager", "sdpa"),
    "tie_word_embeddings": ("false",),
    "eos_token_id": (47, 48, [47], [1, 48]),
    "bos_token_id": (47, 48),
}
_ROPE_TYPES = [{"rope_type": kind} for kind in ("default", "linear", "dynamic", "yarn")]
ROPES: tuple[Any, ...] = (
    *(MISSING, None, {}, [], "default", {"rope_theta": 500.0}),
    *_ROPE_TYPES,
    *(kind | {"factor": factor} for kind in _ROPE_TYPES for factor in (1, 1.0, 4.0)),
    *({"type": kind, "factor": factor} for kind in ("linear", 3) for factor in (1, 2)),
    {"factor": 8.0},
    {"rope_type": "default", "factor": 4.0, "rope_theta": 500.0},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "default", "rope_theta": 10_000.0},
    {"rope_type": "default", "rope_theta": None},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 1.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 1.0, "rope_theta": 500.0},
    {"rope_type": "default", "type": "linear", "factor": 2.0},
    {"rope_type": "default", "mrope_section": [1, 1, 2]},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
    {
        "rope_type": "llama3",
        "factor": 2,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
    },
    {"full_attention": {"rope_type": "default", "rope_theta": 500.0}},
)


class Outcome(NamedTuple):
    """What became of a config: "equal", "refused", or "DIFFERENT".

    What is read here and refused by transformers has no other logits, and is neither.
    """

    verdict: str
    what: str = ""


def whole(kind: str) -> dict[str, Any]:
    """A config.json of a tiny model, of which all fields have plain values."""
    made = CONFIG_MAPPING[kind](
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        head_dim=8,
    )
    content = json.loads(made.to_json_string(use_diff=False))
    if kind == "mistral":
        content["sliding_window"] = None
    return content


def fields(kind: str) -> list[str]:
    """All fields of the class, of generation, of old versions and of our own tables."""
    names = {field.name for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    names |= set(transformers.GenerationConfig._get_default_generation_params())
    names |= {*config_fields.READ.values(), *config_fields._SUPPORTED}
    names |= {*config_fields._WITHOUT_EFFECT.split(), *OTHERS}
    return sorted(names - {"rope_parameters", "rope_scaling"})


@functools.cache
def fields_of_others() -> list[str]:
    """Fields that any other model of transformers has."""
    found = set()
    for kind in CONFIG_MAPPING:
        names = {field.name for field in dataclasses.fields(CONFIG_MAPPING[kind])}
        found |= names
    return sorted(found)


def configs(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields configs with what is changed in them."""

    plain = whole(kind)

    def changed(**changes):
        content = plain | changes
        return (
            ", ".join(f"{name}={value!r}"[:100] for name, value in changes.items()),
            {name: value for name, value in content.items() if value is not MISSING},
        )

    yield changed()
    for name in fields(kind):
        large = LARGE if name in config_fields.READ.values() else ()
        for value in (*VALUES, *large, *OTHERS.get(name, ())):
            yield changed(**{name: value})
    for name in sorted({*fields_of_others()} - {*fields(kind), "rope_parameters"}):
        for value in (None, True, 2, 0.5, ["sliding_attention"] * 2):
            yield changed(**{name: value})
    for new, old, base in itertools.product(ROPES, ROPES, (MISSING, 500.0, 10_000)):
        yield changed(rope_parameters=new, rope_scaling=old, rope_theta=base)
    for window, layers in itertools.product((None, 4), OTHERS["layer_types"]):
        yield changed(sliding_window=window, layer_types=layers)
        yield changed(
            sliding_window=window, max_window_layers=1, use_sliding_window=True
        )
    # Smaller heads than the width has room for, and widths that they do not divide.
    for width, size in itertools.product((32, 30, 64), (MISSING, None, 4, 8, 16)):
        yield changed(hidden_size=width, head_dim=size)


class Weights:
    """The weights of a model by the shapes of its config, the same for all readers."""

    def __init__(self):
        self._known = {}

    def of(self, config: LlamaConfig) -> tuple[Any, dict[str, torch.Tensor]]:
        """Returns the parameters, and the state that PyTorch loads."""
        key = (*config.shapes().values(), config.tied)
        if key not in self._known:
            rng = np.random.default_rng(1)
            found, state = {}, {}
            for names, layer, shape in expected_tensors(config):
                array = 0.3 * rng.standard_normal(shape, np.float32)
                if not names.is_kernel and "norm" in names.path:
                    array += 1  # norms are not all alike, and the rotations matter
                found[names.path, layer] = jnp.asarray(array)
                name = names.huggingface.format(layer)
                array = array.T.copy() if names.is_kernel else array
                state[name] = torch.from_numpy(array)
            if config.tied:
                table = state[PARAMETERS["embedding/embedding"].huggingface]
                state[PARAMETERS["head/kernel"].huggingface] = table
            self._known[key] = tree_of(found, config), state
        return self._known[key]


class Comparison:
    """Compares what both make of a config."""

    def __init__(self):
        self._weights = Weights()
        self._logits: dict[Any, Any] = {}

    def outcome(self, content: dict[str, Any]) -> Outcome:
        """Reads a config.json with both, and compares the logits."""
        try:
            content = json.loads(json.dumps(content))
            config = LlamaConfig.from_huggingface(content)
        except (TypeError, ValueError) as error:
            if len(str(error)) < 30 or type(error) not in (TypeError, ValueError):
                return Outcome("WRONG ERROR", f"{type(error).__name__}: {error}")
            return Outcome("refused", str(error))
        except Exception as error:
            return Outcome("WRONG ERROR", f"{type(error).__name__}: {error}")
        # Of two features in a norm rounding alone moves the logits by 2e-4.
        if config.size > 10**6 or config.width < 4:
            return Outcome("not compared")
        params, state = self._weights.of(config)
        try:
            expected = self._of_transformers(content, state)
        except Exception as error:
            return Outcome("refused by transformers", f"{type(error).__name__}")
        found = self._of_ours(params, config)
        error = abs(found - expected).max() / abs(expected).max()
        # Sums of 8 to 64 terms in another order.
        return Outcome("equal") if error < 1e-4 else Outcome("DIFFERENT", f"{error:g}")

    def _of_transformers(self, content, state):
        made = CONFIG_MAPPING[content["model_type"]](**content)
        with torch.no_grad():
            model = transformers.AutoModelForCausalLM.from_config(made).eval().float()
            model.load_state_dict(state, strict=True)
            tokens = torch.from_numpy(TOKENS % made.vocab_size)
            return model(tokens).logits.numpy()

    def _of_ours(self, params, config):
        # Tokens that begin and end texts change no logits, and so no program.
        plain = dataclasses.replace(config, bos=None, eos=(), context=16)
        if plain not in self._logits:
            tokens = jnp.asarray(TOKENS % config.vocabulary)
            with jax.disable_jit():  # compiling takes longer than that
                self._logits[plain] = np.asarray(llama.logits(params, tokens, plain))
        return self._logits[plain]


def run(kind: str, begin: int = 0, step: int = 1) -> dict[str, Outcome]:
    """Compares the configs of a kind, or every n-th, by what is changed in them."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # which is faster for arrays as small as these
    comparison = Comparison()
    chosen = itertools.islice(configs(kind), begin, None, step)
    logging.disable(logging.ERROR)
    try:
        return {what: comparison.outcome(content) for what, content in chosen}
    finally:
        logging.disable(logging.NOTSET)


def wrong(found: dict[str, Outcome]) -> list[str]:
    """Lists what must not be."""
    return [
        f"{what}: {one.verdict}: {one.what}"
        for what, one in found.items()
        if one.verdict in ("DIFFERENT", "WRONG ERROR")
    ]


def main() -> int:
    """Runs the program; 1 where logits differ."""
    lines = []
    for kind in KINDS:
        found = run(kind)
        counts = collections.Counter(one.verdict for one in found.values())
        print(f"{kind}: {len(found)} configs, {dict(counts)}", flush=True)
        lines += wrong(found)
    print("\n".join(lines))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
