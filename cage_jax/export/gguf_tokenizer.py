"""Conversion of byte-level BPE tokenizers between GGUF and transformers.

GGUF has lists of tokens, of their types and of merges, and only a name for the way a
text is split before the merges. transformers has `tokenizer.json`, which spells the
split out, and `tokenizer_config.json`, which gives the roles of some tokens.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from cage_jax.export.files import malformed
from cage_jax.export.tokenizer_files import parsed
from cage_jax.llama.config import LlamaConfig

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_PREFIX = "tokenizer.ggml."
# Keys by the names in transformers.
_ID_KEYS = {
    "bos_token": f"{_PREFIX}bos_token_id",
    "eos_token": f"{_PREFIX}eos_token_id",
    "unk_token": f"{_PREFIX}unknown_token_id",
    "pad_token": f"{_PREFIX}padding_token_id",
}
# Tokens that end a text: the usual one, and two more at which llama.cpp stops.
_END_KEYS = (_ID_KEYS["eos_token"], f"{_PREFIX}eot_token_id", f"{_PREFIX}eom_token_id")


class _Split(NamedTuple):
    """A way to split a text before the merges.

    Attributes:
      steps: the steps of `pre_tokenizer` in `tokenizer.json`.
      ignore_merges: whether a piece that is a token skips the merges.
      adds_bos: whether llama.cpp puts bos first by default.
    """

    steps: tuple[dict[str, Any], ...]
    ignore_merges: bool = False
    adds_bos: bool = False


def _byte_level(use_regex=True):
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


_LLAMA_3 = {
    "type": "Split",
    "pattern": {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    },
    "behavior": "Isolated",
    "invert": False,
}
# Splits by their names in llama.cpp.
_SPLITS = {
    "gpt-2": _Split((_byte_level(),)),
    "smollm": _Split(({"type": "Digits", "individual_digits": True}, _byte_level())),
    "llama-bpe": _Split((_LLAMA_3, _byte_level(False)), True, True),
}


# --- from transformers to GGUF --------------------------------------------------------


def metadata_of(tokenizer: Mapping[str, bytes], config: LlamaConfig) -> dict[str, Any]:
    """Converts a byte-level BPE tokenizer, or an empty mapping, to GGUF metadata.

    Args:
      tokenizer: files by name, including "tokenizer.json".
      config: the model's dimensions; its `bos` and `eos` are used if the tokenizer
        does not name these tokens.

    Raises:
      ValueError: if the files are not a tokenizer's, or GGUF cannot hold the tokenizer.
    """
    if not tokenizer:
        # llama.cpp loads "no_vocab" without a vocabulary and takes tokens by number.
        metadata: dict[str, Any] = {f"{_PREFIX}model": "no_vocab"}
        if config.bos is not None:
            metadata[_ID_KEYS["bos_token"]] = config.bos
        return metadata | _ends(config.eos)
    content = parsed(tokenizer, "tokenizer.json")
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in tokenizer:
            settings |= parsed(tokenizer, name)
    if "chat_template.jinja" in tokenizer:
        settings["chat_template"] = tokenizer["chat_template.jinja"].decode("utf-8")
    try:
        return _metadata(content, settings, config)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`tokenizer` must have a tokenizer.json of a byte-level BPE; got one with "
            f"{type(error).__name__}: {error}. Save the tokenizer again, with "
            f"save_pretrained."
        ) from error


def _metadata(content, settings, config):
    model = content["model"]
    if content.get("normalizer") is not None:
        _unsupported("no normalizer", content["normalizer"])
    if model["type"] != "BPE":
        _unsupported("a BPE", model["type"])
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            _unsupported(f"no {name}", model[name])
    ids = dict(model["vocab"])
    types = dict.fromkeys(ids, _NORMAL)
    for added in content.get("added_tokens") or ():
        text = added["content"]
        for flag in ("lstrip", "rstrip", "single_word"):
            if added.get(flag):
                _unsupported(f"{flag}=False for {text!r}", added[flag])
        ids[text] = added["id"]
        types[text] = _CONTROL if added.get("special") else _USER_DEFINED
    tokens = _by_id(ids, config.vocabulary)

    special = {}
    for name in _ID_KEYS:
        text = settings.get(name)
        if isinstance(text, dict):  # with flags
            text = text.get("content")
        if text is not None and text not in ids:
            _unsupported(f"{name} among its tokens", text)
        if text is not None:
            special[name] = ids[text]
    bos = special.setdefault("bos_token", config.bos)
    ends = dict.fromkeys([special.get("eos_token"), *config.eos])
    ends.pop(None, None)
    if not ends:
        # llama.cpp assumes token 11 if a file names none.
        _unsupported('an "eos_token" in tokenizer_config.json', "none")
    eos = next(iter(ends))
    first, last = _template(content.get("post_processor"), tokens, bos, eos)

    found = {
        f"{_PREFIX}model": "gpt2",
        f"{_PREFIX}pre": _split_name(content.get("pre_tokenizer"), model),
        f"{_PREFIX}tokens": [
            f"[PAD{number}]" if text is None else text
            for number, text in enumerate(tokens)
        ],
        f"{_PREFIX}token_type": [types.get(text, _UNUSED) for text in tokens],
        f"{_PREFIX}merges": [_merge(each) for each in model["merges"]],
        f"{_PREFIX}add_bos_token": bool(settings.get("add_bos_token", first)),
        f"{_PREFIX}add_eos_token": bool(settings.get("add_eos_token", last)),
        f"{_PREFIX}add_space_prefix": False,
    }
    if not found[f"{_PREFIX}merges"]:
        _unsupported("merges", "none, which llama.cpp does not load")
    found |= {_ID_KEYS[name]: i for name, i in special.items() if i is not None}
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        by_name = {each["name"]: each["template"] for each in template}
        template = by_name.get("default")
    if template:
        found["tokenizer.chat_template"] = template
    return found | _ends(ends)


def _by_id(ids, count):
    """Returns the texts of all tokens in order, None for missing tokens."""
    tokens: list[str | None] = [None] * count
    for text, number in ids.items():
        if not isinstance(number, int) or not 0 <= number < count:
            raise ValueError(
                f"`tokenizer` must have tokens below the {count} of `config`; got "
                f"{number!r} for {text!r}. Pass the tokenizer of this model."
            )
        if tokens[number] is not None:
            _unsupported("one token per number", f"{tokens[number]!r}, {text!r}")
        tokens[number] = text
    return tokens


def _split_name(pre_tokenizer, model):
    """Returns llama.cpp's name for the way a text is split."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    # Ignore trim_offsets, which does not affect tokens; older files lack use_regex.
    plain = [
        {"use_regex": True} | step | {"trim_offsets": True}
        if step and step.get("type") == "ByteLevel"
        else step
        for step in steps
    ]
    ignores = bool(model.get("ignore_merges"))
    for name, split in _SPLITS.items():
        if plain == list(split.steps) and ignores == split.ignore_merges:
            return name
    _unsupported(
        f"a pre_tokenizer of {list(_SPLITS)}", f"{steps}, ignore_merges={ignores}"
    )


def _template(post_processor, tokens, bos, eos):
    """Returns whether a text begins with bos, and whether it ends with eos."""
    steps = (post_processor or {}).get("processors", [post_processor])
    for step in steps:
        if step is None or step["type"] == "ByteLevel":
            continue
        if step["type"] != "TemplateProcessing":
            _unsupported("a post_processor that adds bos or eos", step["type"])
        parts = [part.get("SpecialToken", {}).get("id") for part in step["single"]]
        place = parts.index(None)  # of the text
        before, after = parts[:place], parts[place + 1 :]
        first = None if bos is None else tokens[bos]
        if before not in ([], [first]) or after not in ([], [tokens[eos]]):
            _unsupported("a post_processor that adds bos or eos", parts)
        return bool(before), bool(after)
    return False, False


def _merge(merge):
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2 or any(" " in part for part in parts):
        _unsupported("merges of two parts without spaces", merge)
    return " ".join(parts)


def _ends(ids):
    if len(ids) > len(_END_KEYS):
        raise ValueError(
            f"`config` must have at most {len(_END_KEYS)} tokens that end a text, for "
            f"which GGUF has keys; got eos={tuple(ids)}. Leave some out."
        )
    return dict(zip(_END_KEYS, ids))


def _unsupported(rule, got) -> NoReturn:
    raise ValueError(
        f"`tokenizer` must have {rule} for GGUF; got {got}. Use tokenizer=None, and "
        f"pass tokens to llama.cpp by number."
    )


# --- from GGUF to transformers --------------------------------------------------------


def files_of(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Makes the files of a tokenizer from the metadata of a GGUF file.

    Returns:
      "tokenizer.json" and "tokenizer_config.json"; an empty dict if the tokenizer is
      not a byte-level BPE, or if its way of splitting texts is unknown.

    Raises:
      MalformedFileError: if the lists are inconsistent.
    """
    split = _SPLITS.get(_of_type(metadata, "pre", str, ""))
    if _of_type(metadata, "model", str, "") != "gpt2" or split is None:
        return {}
    tokens = _texts(metadata, "tokens")
    types = metadata.get(f"{_PREFIX}token_type", np.full(len(tokens), _NORMAL))
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        _malformed("a type for each token", repr(types)[:80])
    ids: dict[str, int] = {}
    added = []
    for number, (text, kind) in enumerate(zip(tokens, types.tolist())):
        if kind == _UNUSED:
            continue
        if text in ids:
            _malformed("each token once", f"{text[:80]!r} twice")
        ids[text] = number
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            flags = dict.fromkeys(
                ("single_word", "lstrip", "rstrip", "normalized"), False
            )
            special = kind != _USER_DEFINED
            added.append({"id": number, "content": text, **flags, "special": special})
    merges = [merge.split(" ", 2) for merge in _texts(metadata, "merges")]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= ids.keys():
            _malformed("merges of two tokens to one", repr(merge)[:80])

    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in _ID_KEYS.items():
        if key in metadata:
            settings[name] = tokens[token_id(metadata, key, len(tokens))]
            if settings[name] not in ids:
                _malformed(f"a used token as {key}", metadata[key])
    adds = {}
    for name, default in (("bos_token", split.adds_bos), ("eos_token", False)):
        adds[name] = _of_type(metadata, f"add_{name}", bool, default)
        settings[f"add_{name}"] = adds[name]
        if adds[name] and name not in settings:
            _malformed(f"{name}_id, because add_{name} is true", "none")
    if "tokenizer.chat_template" in metadata:
        template = metadata["tokenizer.chat_template"]
        if not isinstance(template, str):
            _malformed("a text as chat template", type(template).__name__)
        settings["chat_template"] = template
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": split.steps[0]
        if len(split.steps) == 1
        else {"type": "Sequence", "pretokenizers": list(split.steps)},
        "post_processor": _post_processor(settings, adds, ids),
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split.ignore_merges,
            "vocab": ids,
            "merges": merges,
        },
    }
    files = {"tokenizer.json": content, "tokenizer_config.json": settings}
    return {
        name: json.dumps(each, ensure_ascii=False).encode("utf-8")
        for name, each in files.items()
    }


def token_id(metadata: Mapping[str, Any], key: str, count: int) -> int:
    """Reads a token; raises MalformedFileError if it is not an int in [0, count)."""
    number = metadata[key]
    if type(number) is not int or not 0 <= number < count:
        _malformed(f"a token below {count} as {key}", repr(number))
    return number


def special_ids(
    metadata: Mapping[str, Any], count: int
) -> tuple[int | None, tuple[int, ...]]:
    """Returns the token that begins a text, or None, and the tokens that end it.

    Raises:
      MalformedFileError: if one of them is not an int in [0, count).
    """
    key = _ID_KEYS["bos_token"]
    bos = token_id(metadata, key, count) if key in metadata else None
    ends = [token_id(metadata, key, count) for key in _END_KEYS if key in metadata]
    return bos, tuple(dict.fromkeys(ends))


def _post_processor(settings, adds, ids):
    byte_level = _byte_level()
    before = [settings["bos_token"]] if adds["bos_token"] else []
    after = [settings["eos_token"]] if adds["eos_token"] else []
    if not before and not after:
        return byte_level

    def sequence(name, place):
        return [
            *({"SpecialToken": {"id": text, "type_id": place}} for text in before),
            {"Sequence": {"id": name, "type_id": place}},
            *({"SpecialToken": {"id": text, "type_id": place}} for text in after),
        ]

    template = {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [ids[text]], "tokens": [text]}
            for text in {*before, *after}
        },
    }
    return {"type": "Sequence", "processors": [byte_level, template]}


def _texts(metadata, name):
    texts = metadata.get(f"{_PREFIX}{name}")
    if not isinstance(texts, list):
        _malformed(f"a list of texts as {_PREFIX}{name}", type(texts).__name__)
    return texts


def _of_type(metadata, name, kind, default):
    value = metadata.get(f"{_PREFIX}{name}", default)
    if not isinstance(value, kind):
        _malformed(f"a {kind.__name__} as {_PREFIX}{name}", repr(value)[:80])
    return value


def _malformed(rule, got) -> NoReturn:
    raise malformed(f"the file's tokenizer must have {rule}", got)
