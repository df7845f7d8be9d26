"""The fields of a `config.json` of transformers, all that a Llama may have.

Each is read, or must have a value with which transformers computes what
`cage_jax.llama` computes, or changes no logits. Any other field may change them in a
way that is not known here, so it is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cage_jax.llama.rope import RopeScaling

READ = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "rope_theta": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "context": "max_position_embeddings",
    "window": "sliding_window",
    "bos": "bos_token_id",
    "eos": "eos_token_id",
}
"""Fields that are read, by their names in `LlamaConfig`."""

_NEEDED = ("vocabulary", "width", "hidden", "layers", "heads")

# What transformers takes for a field that is missing, where `LlamaConfig` does not.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}
# What a model has by its kind alone.
_FEATURES = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}

# Values that a field may have, since it computes something else with all others.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "architectures": (
        None,
        *([f"{kind.capitalize()}ForCausalLM"] for kind in _DEFAULTS),
        ["LLaMAForCausalLM"],  # the name of its first version
    ),
    "auto_map": (None, {}),  # of code that comes with the model
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False, None),
    "attention_chunk_size": (None,),
    "is_causal": (True,),
    "num_kv_shared_layers": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "pruned_heads": ({}, None),
    "compression_config": (None,),  # an old name of quantization_config
}
# What is read of a scaled rotation, by its type.
_ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": tuple(field.name for field in dataclasses.fields(RopeScaling)),
}

# Fields that change no logits. `quantization_config` is read with the weights.
_WITHOUT_EFFECT = """
    _attn_implementation _attn_implementation_autoset _commit_hash
    _flash_attn_2_enabled _name_or_path add_cross_attention attention_dropout
    attn_implementation bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    dtype early_stopping encoder_no_repeat_ngram_size experts_implementation
    exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id length_penalty max_length
    max_sequence_length max_window_layers min_length model_max_length name_or_path
    neftune_noise_alpha no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores
    pad_token_id prefix pretraining_tp problem_type quantization_config
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache use_return_dict
"""
_OTHER_PLACES = (
    *("model_type", "rope_parameters", "rope_scaling"),
    *("layer_types", "use_sliding_window"),
)
_REMEDY = "Load this model with its own library, or train one without it."


def dimensions_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `LlamaConfig` that a `config.json` gives.

    Their ranges are not checked.

    Raises:
      ValueError: if the model is not a Llama, or computes what `LlamaConfig` lacks.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise ValueError(
            f"`config` must describe a Llama, of model_type {' or '.join(_DEFAULTS)}; "
            f"got model_type={_short(kind)}. Load the parameters of other models with "
            f"their own library."
        )
    config = _DEFAULTS[kind] | dict(config)
    used = config.get("use_sliding_window")
    is_qwen = kind in _FEATURES
    _check("use_sliding_window", used, (False, None, *((True,) if is_qwen else ())))
    if is_qwen and not used:
        config["sliding_window"] = None
    if kind == "llama":
        _check("sliding_window", config.get("sliding_window"), (None,))
    for name in _NEEDED:
        if READ[name] not in config:
            raise ValueError(
                f"`config` must have {READ[name]!r}; got {sorted(config)}. Use the "
                f"config.json of the model."
            )
    known = {*READ.values(), *_SUPPORTED, *_WITHOUT_EFFECT.split(), *_OTHER_PLACES}
    for name, value in config.items():
        if name in _SUPPORTED:
            _check(name, value, _SUPPORTED[name])
        elif name not in known:
            raise ValueError(
                f"`config` must have fields that are known to compute a Llama; got "
                f"{name[:80]}={_short(value)}. Remove the field from config.json if it "
                f"changes no logits, else load the model with its own library."
            )
    found = {name: config[field] for name, field in READ.items() if field in config}
    base, scaling = _rope(config)
    return (
        found
        | _FEATURES.get(kind, {})
        | {
            "rope_theta": base,
            "rope_scaling": scaling,
            "eos": _tokens(config.get("eos_token_id")),
        }
    )


def check_layers(config: Mapping[str, Any], layers: int, window: int | None) -> None:
    """Raises ValueError if a layer's attention is not that of all others."""
    kinds = config.get("layer_types")
    kind = "full_attention" if window is None else "sliding_attention"
    _check("layer_types", kinds, ([kind] * layers, None))
    if window is not None and kinds is None and config["model_type"] in _FEATURES:
        _check("max_window_layers", config.get("max_window_layers", 28), (0,))


def in_terms_of(error: Exception, names: Mapping[str, str]) -> str:
    """Returns the text of an error, with arguments by their names in a file."""
    message = str(error)
    for argument, name in names.items():
        message = message.replace(f"`{argument}`", f"`{name}`")
    return message


def _rope(config):
    """Returns the base of rotations and their scaling; raises for two of one."""
    places = {name: config.get(name) for name in ("rope_scaling", "rope_parameters")}
    bases = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    scalings = {}
    for place, rope in places.items():
        if not isinstance(rope, Mapping | None):
            raise ValueError(
                f"`config` must have an object in {place}; got {_short(rope)}. Use the "
                f"config.json of the model."
            )
        if rope:
            scalings[place] = _scaling(place, rope, config)
        if rope and "rope_theta" in rope:
            bases[f"{place}.rope_theta"] = rope["rope_theta"]
    # The first of these places is the one that transformers reads.
    rope = places["rope_scaling"] or places["rope_parameters"] or {}
    base = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if any(other != base for other in bases.values()):
        got = ", ".join(f"{place}={_short(other)}" for place, other in bases.items())
        raise ValueError(
            f"`config` must have one rope_theta, for which readers look in different "
            f"places; got {got}, of which transformers takes {_short(base)}. Write the "
            f"one of the training into all of them."
        )
    if len(set(scalings.values())) > 1:
        got = ", ".join(f"{place}={_short(one)}" for place, one in scalings.items())
        raise ValueError(
            f"`config` must have one scaling of rotations, for which readers look in "
            f"different places; got {got}. Write the one of the training into both."
        )
    return base, next(iter(scalings.values()), None)


def _scaling(place, rope, config):
    """Returns the scaling that an object of the file says, or None."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    _check(f"{place}.rope_type", kind, tuple(_ROPE_TYPES))
    supported = dict.fromkeys(("rope_type", "type"), (kind,)) | {
        "partial_rotary_factor": (1, None),
        "factor": (1, None),
    }
    for name, value in rope.items():
        if name not in ("rope_theta", *_ROPE_TYPES[kind]):
            _check(f"{place}.{name}", value, supported.get(name, ()))
    fields = {name: rope[name] for name in _ROPE_TYPES[kind] if name in rope}
    if kind == "llama3":
        context = config.get(READ["context"], 2048)
        return RopeScaling(**{"original_max_position_embeddings": context} | fields)
    unscaled = fields.get("factor") in (1, None)
    return None if unscaled else RopeScaling(**fields)


def _tokens(value):
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _check(name, value, supported):
    """Raises for a value that is none of those; 1 is 1.0, and no True."""
    is_bool = isinstance(value, bool)
    if any(is_bool == isinstance(one, bool) and one == value for one in supported):
        return
    rule = f"{name}={_short(supported[0])}" if supported else f"no {name[:80]}"
    raise ValueError(
        f"`config` must have {rule}; got {_short(value)}, with which a model computes "
        f"something else. {_REMEDY}"
    )


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
