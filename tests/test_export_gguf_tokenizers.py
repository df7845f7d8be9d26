"""Tokenizers in GGUF files: there and back, and those that cannot be written."""

import dataclasses
import json

import pytest
from small_llama import CONFIG, on_host, params_of
from small_tokenizer import SAMPLES, parsed, split_tokenizer

from cage_jax.export.gguf import gguf, read

pytest.importorskip("gguf", reason="needs the extra oracles")
pytest.importorskip("tokenizers", reason="needs the extra demo")

import gguf as ggml


def written(path, **options):
    """Writes the floats of the tiny model, with a tokenizer."""
    gguf(on_host(params_of()), options.pop("config", CONFIG), path, **options)


@pytest.mark.parametrize("kind", ["smollm", "gpt-2", "llama-bpe"])
def test_a_tokenizer_there_and_back(kind, tmp_path):
    for template in (False, True):
        files = split_tokenizer(kind, template)
        path = tmp_path / "model.gguf"
        written(path, tokenizer=files, overwrite=True)
        fields = ggml.GGUFReader(path).fields
        get = lambda name, fields=fields: fields[f"tokenizer.{name}"].contents()  # noqa: E731
        assert get("ggml.model") == "gpt2"
        assert get("ggml.pre") == kind
        assert get("ggml.add_bos_token") is template
        assert get("ggml.bos_token_id") == 1
        assert get("ggml.eos_token_id") == 0
        assert "tokenizer.ggml.padding_token_id" not in fields
        types = get("ggml.token_type")
        control, user_defined, unused = 3, 4, 5
        assert types[:3] == [control, control, 1]
        assert types[-2:] == [user_defined, unused]
        assert get("ggml.tokens")[-2:] == ["naïve cafés", "[PAD319]"]

        model = read(path)
        assert model.config == CONFIG
        theirs, ours = parsed(files), parsed(model.tokenizer)
        assert ours.get_vocab() == theirs.get_vocab()
        for text in SAMPLES:
            expected = theirs.encode(text).ids
            assert ours.encode(text).ids == expected
            assert ours.decode(expected) == theirs.decode(expected)
        # Once more: what was read is written as it was.
        again = tmp_path / "again.gguf"
        written(again, tokenizer=model.tokenizer, overwrite=True)
        assert again.stat().st_size == path.stat().st_size
        assert read(again).tokenizer == model.tokenizer


def changed(**changes):
    """Trains a tokenizer, and changes its JSON; two underscores lead inside."""
    files = split_tokenizer()
    content = json.loads(files["tokenizer.json"])
    for path, value in changes.items():
        *inner, last = path.split("__")
        node = content
        for name in inner:
            node = node[name]
        node[last] = value
    return files | {"tokenizer.json": json.dumps(content).encode()}


def test_tokenizers_that_gguf_cannot_hold(tmp_path):
    for files, text in [
        ({"vocab.json": b"{}"}, r"'tokenizer.json'; got \['vocab.json'\]"),
        ({"tokenizer.json": b"{"}, "JSON in 'tokenizer.json'"),
        ({"tokenizer.json": b"[" * 10**5}, "JSON in 'tokenizer.json'"),
        ({"tokenizer.json": b"{}"}, "of a byte-level BPE; got one with KeyErr"),
        (changed(model__type="Unigram"), "a BPE for GGUF; got Unigram"),
        (changed(normalizer={"type": "NFC"}), "no normalizer"),
        (changed(pre_tokenizer=None), r"a pre_tokenizer of \['gpt-2', 'smoll"),
        (changed(model__ignore_merges=True), "ignore_merges=True"),
        (changed(model__merges=[]), "merges.*does not load"),
        (changed(model__vocab={"a": 400}), r"below the 320 of `config`"),
        (
            split_tokenizer() | {"tokenizer_config.json": b'{"eos_token":9}'},
            "eos_token among its tokens",
        ),
        (
            changed(post_processor={"type": "RobertaProcessing"}),
            "a post_processor that adds bos or eos",
        ),
    ]:
        with pytest.raises(ValueError, match=f"^`tokenizer` must have .*{text}"):
            written(tmp_path / "model.gguf", tokenizer=files)
            pytest.fail(text)
        assert list(tmp_path.iterdir()) == [], text


def test_a_tokenizer_without_an_end(tmp_path):
    # llama.cpp would end texts at token 11.
    config, path = dataclasses.replace(CONFIG, eos=()), tmp_path / "model.gguf"
    files = {"tokenizer.json": split_tokenizer()["tokenizer.json"]}
    with pytest.raises(ValueError, match=r'"eos_token" in tokenizer_config.json'):
        written(path, config=config, tokenizer=files)
    written(path, tokenizer=files)
    with pytest.raises(TypeError, match="`tokenizer` must have bytes; got str"):
        written(tmp_path / "b.gguf", tokenizer={"tokenizer.json": "{}"})
