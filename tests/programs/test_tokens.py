"""Tokens: bytes and BPE, their sources, and the cache."""

import fcntl
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import text
import tokens

EXAMPLES = Path(tokens.__file__).parent
SEPARATOR = b"\0"


def load(cache, *files, sequence=16, **options):
    return tokens.load_tokens(text=files, cache=cache, sequence=sequence, **options)


def entry_of(cache):
    (path,) = cache.glob("*/tokens.json")
    return path.parent


def words(number=4000, seed=0):
    """Text in which pairs come again, of several scripts and kinds of space."""
    letters = ["ka", "né", "shi", "ö", "日本", "🙂", "x1"]
    spaces = ["\n", "\r\n", "  ", "\t", " "]
    chosen = np.random.default_rng(seed).choice(letters + spaces, number)
    return ("".join(chosen) + "\nthe end" * (number // 50)).encode()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_bytes(words())
    return path


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks and batches of a text that is small."""
    monkeypatch.setattr(text, "_BLOCK", 100)
    monkeypatch.setattr(tokens, "_BATCH", 1000)


@pytest.fixture
def tokenizers():
    return pytest.importorskip("tokenizers", reason="BPE needs tokenizers")


# --- bytes ----------------------------------------------------------------------------


def test_bytes_of_files_lose_nothing(cache, tmp_path, small_blocks):
    # No lines, nothing but lines, and what is not UTF-8.
    contents = [b"a" * 5001, b"\n" * 999 + b"b", bytes(range(1, 256)) * 20]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    found = load(cache, *paths)
    cuts = [int(len(content) * 0.95) for content in contents]
    train = b"".join(content[:cut] for content, cut in zip(contents, cuts))
    held_out = b"".join(content[cut:] for content, cut in zip(contents, cuts))
    assert found.train.tobytes() == train
    assert found.held_out.tobytes() == held_out
    assert found.train.dtype == found.held_out.dtype == np.uint8
    assert (found.vocabulary, found.bytes_per_token) == (256, 1.0)


def test_standard_library(cache):
    found = load(cache)
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "site-packages", "dist-packages", "idlelib"}
    parts = [], []
    names = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    for name in names:
        if not left_out & set(name.parts):
            digest = hashlib.sha256(name.as_posix().encode()).hexdigest()
            parts[int(digest[:2], 16) % 20 == 0].append((root / name).read_bytes())
    for part, expected in zip((found.train, found.held_out), parts):
        # Of text this long pytest must not tell the difference.
        assert np.array_equal(part, np.frombuffer(b"".join(expected), np.uint8))
    told = json.loads((entry_of(cache) / "tokens.json").read_text())
    assert told["source"].startswith("the standard library of Python 3.")


def test_arrays_are_mapped_and_cannot_be_written(cache, prose):
    found = load(cache, prose)
    assert isinstance(found.train, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found.train[0] = 1
    np.testing.assert_array_equal(np.load(entry_of(cache) / "train.npy"), found.train)


def test_blocks_end_where_lines_do(monkeypatch):
    monkeypatch.setattr(text, "_BLOCK", 100)
    lines = [b"%d" % number + b"." * 30 + b"\n" for number in range(100)]
    content = b"".join(lines)
    blocks = list(text.blocks(io.BytesIO(content), 2500))
    assert b"".join(blocks) == content[:2500]
    assert all(block.endswith(b"\n") for block in blocks[:-1])
    assert 100 <= max(map(len, blocks)) <= 200
    assert max(map(len, text.blocks(io.BytesIO(b"." * 500), 500))) <= 200


# --- BPE ------------------------------------------------------------------------------


def test_bpe_gives_back_the_text(cache, prose, tokenizers):
    found = load(cache, prose, vocabulary=400)
    content = prose.read_bytes()
    cut = int(len(content) * 0.95)
    tokenizer = tokenizers.Tokenizer.from_file(str(entry_of(cache) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == found.vocabulary == 400
    assert found.train.dtype == found.held_out.dtype == np.uint16
    for part, original in (
        (found.train, content[:cut]),
        (found.held_out, content[cut:]),
    ):
        np.testing.assert_array_equal(tokenizer.encode(original.decode()).ids, part)
        decoded = tokenizer.decode(part.tolist(), skip_special_tokens=False)
        assert decoded.encode() == original
    assert found.bytes_per_token == (len(content) - cut) / len(found.held_out) > 1.5


def test_bpe_loses_no_bytes(cache, tmp_path, tokenizers, rng, small_blocks):
    """Latin-1, characters that are cut, and noise; the end of text only where told."""
    noise = rng.integers(1, 256, 20_000, np.uint8).tobytes()
    content = words() + "Ünïcödé ".encode("latin-1") * 200 + noise + words()[:-1]
    path = tmp_path / "noise"
    path.write_bytes(content)
    found = load(cache, path, vocabulary=300)
    told = json.loads((entry_of(cache) / "tokenizer.json").read_text())
    spelled = {token: name for name, token in told["model"]["vocab"].items()}
    # GPT-2's bytes_to_unicode, from its rule: what prints stands for itself.
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    bytes_of = {chr(byte): byte for byte in prints}
    bytes_of |= {chr(256 + number): byte for number, byte in enumerate(others)}
    ids = [*found.train, *found.held_out]
    assert bytes(bytes_of[letter] for i in ids for letter in spelled[int(i)]) == content


def test_end_of_text_is_token_0(cache, tmp_path, tokenizers):
    path = tmp_path / "text"
    path.write_text("some words<|endoftext|>" * 100)
    found = load(cache, path, vocabulary=260)
    assert (found.train == 0).sum() + (found.held_out == 0).sum() >= 99
    tokenizer = tokenizers.Tokenizer.from_file(str(entry_of(cache) / "tokenizer.json"))
    assert tokenizer.id_to_token(0) == tokens.END_OF_TEXT


def test_bpe_sees_only_what_is_trained_on(cache, tmp_path, tokenizers, monkeypatch):
    paths = [tmp_path / name for name in "abc"]
    paths[0].write_text("ab " * 950 + "cd " * 50)
    paths[1].write_text("ef " * 1000)
    paths[2].write_text("gh " * 1000)
    monkeypatch.setattr(tokens, "_SAMPLE", 4000)
    with pytest.raises(ValueError, match=r"must be at most 261 for this text"):
        load(cache, *paths, vocabulary=262)
    load(cache, *paths, vocabulary=261)
    told = json.loads((entry_of(cache) / "tokenizer.json").read_text())
    learned = [name for name in told["model"]["vocab"] if len(name) > 1]
    assert sorted(learned) == sorted([tokens.END_OF_TEXT, "ab", "Ġab", "ef", "Ġef"])


def test_integers_are_as_wide_as_needed():
    """The rule alone: so large a BPE takes long to train."""
    for vocabulary, dtype in (
        (256, "uint8"),
        (257, "uint16"),
        (65_536, "uint16"),
        (65_537, "uint32"),
    ):
        assert tokens._dtype(vocabulary) == dtype


def test_another_process_makes_the_same_bpe(cache, prose, tokenizers, tmp_path):
    found = load(cache, prose, vocabulary=400)
    environment = {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    with child(tmp_path / "other", prose, "say = print", environment) as process:
        assert process.communicate()[0].splitlines()[-1] == found.identity


# --- datasets -------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    module = pytest.importorskip("datasets", reason="data sets need datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return module


@pytest.fixture
def folder(tmp_path):
    """A function that writes a folder with a file of JSON lines for each split."""

    def write(**splits):
        path = tmp_path / "data"
        path.mkdir(exist_ok=True)
        for split, rows in splits.items():
            lines = (json.dumps(row) + "\n" for row in rows)
            (path / f"{split}.jsonl").write_text("".join(lines))
        return str(path)

    return write


def documents(number, seed=0):
    generator = np.random.default_rng(seed)
    return [words(int(generator.integers(20, 200)), seed + i) for i in range(number)]


def rows(contents):
    return [{"id": 1, "text": content.decode()} for content in contents]


def test_one_document_in_twenty_is_held_out(cache, folder, datasets, small_blocks):
    contents = documents(50)
    name = folder(train=[*rows(contents), {"id": 2, "text": ""}, {"id": 3}])
    found = load(cache, dataset=name)
    held_out = [contents[0], contents[20], contents[40]]
    train = [content for content in contents if content not in held_out]
    assert found.train.tobytes() == SEPARATOR.join(train)
    assert found.held_out.tobytes() == SEPARATOR.join(held_out)


def test_a_split_is_held_out(cache, tmp_path, folder, datasets):
    train = documents(50)
    for splits in (("test",), ("validation", "test")):
        others = {split: documents(5, 99 + len(split)) for split in splits}
        parts = {"train": train, **others}
        name = folder(**{split: rows(contents) for split, contents in parts.items()})
        found = load(cache, dataset=name)
        assert found.train.tobytes() == SEPARATOR.join(train)
        assert found.held_out.tobytes() == SEPARATOR.join(others[splits[0]])


def test_documents_of_a_bpe(cache, folder, datasets, tokenizers):
    contents = documents(50)
    found = load(cache, dataset=folder(train=rows(contents)), vocabulary=300)
    tokenizer = tokenizers.Tokenizer.from_file(str(entry_of(cache) / "tokenizer.json"))
    held_out = SEPARATOR.join([contents[0], contents[20], contents[40]])
    decoded = tokenizer.decode(found.held_out.tolist(), skip_special_tokens=False)
    assert decoded.encode() == held_out.replace(SEPARATOR, b"<|endoftext|>")
    assert (found.train == 0).sum() == 46
    assert found.bytes_per_token == len(held_out) / len(found.held_out)


def test_limit(cache, folder, datasets):
    contents = [b"x" * 100] * 100
    name = folder(train=rows(contents))
    found = load(cache, dataset=name, limit=5050)
    assert len(found.train) + len(found.held_out) == 50 * 100 + 46 + 2
    found = load(cache, dataset=name, limit=6050)
    assert len(found.train) + len(found.held_out) == 60 * 100 + 56 + 2
    name = folder(validation=rows(contents))
    found = load(cache, dataset=name, limit=4100)
    assert (len(found.train), len(found.held_out)) == (38 * 101 - 1, 2 * 101 - 1)


def test_a_folder_that_changes_is_read_again(cache, folder, datasets):
    first = load(cache, dataset=folder(train=rows(documents(30))))
    again = load(cache, dataset=folder(train=rows(documents(30, seed=1))))
    assert first.identity != again.identity


def test_datasets_that_cannot_be_read(cache, folder, datasets, monkeypatch):
    for parts, message in (
        ({"test": rows(documents(2))}, r"split 'train'; got .* with test"),
        (
            {"train": [{"content": "a", "id": 1}]},
            r"column 'text'.*content \(str\), id \(int\)",
        ),
        ({"train": [{"text": 5}]}, r"column 'text'.*text \(int\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load(cache, dataset=folder(**parts))
    with pytest.raises(ValueError, match=r"`--dataset` must name .* reach 'no/such'"):
        load(cache, dataset="no/such")

    def cut_off():
        yield {"text": "a"}
        raise OSError("cut\noff")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": cut_off()})
    with pytest.raises(ValueError, match=r"OSError: cut off\. Check") as caught:
        load(cache, dataset="other")
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("*/"))


# --- the cache ------------------------------------------------------------------------


def assert_same(found, expected):
    np.testing.assert_array_equal(found.train, expected.train)
    np.testing.assert_array_equal(found.held_out, expected.held_out)
    assert found[2:] == expected[2:]


def test_made_once(cache, prose, monkeypatch, tokenizers):
    made = {size: load(cache, prose, vocabulary=size) for size in (256, 300, 310)}
    for lock in cache.glob("*.lock"):
        lock.unlink()
    monkeypatch.setattr(tokens, "_write", None)
    for size, first in made.items():
        assert_same(load(cache, prose, vocabulary=size), first)
    assert not list(cache.glob("*.lock"))  # what is there is read without


def test_identity_is_of_the_content(cache, prose, tmp_path, tokenizers):
    first = load(cache, prose)
    assert len(first.identity) == 16 and int(first.identity, 16)
    os.utime(prose, ns=(1, 1))
    copy = tmp_path / "copy"
    copy.write_bytes(prose.read_bytes())
    for path, where in ((prose, cache), (copy, cache), (copy, tmp_path / "other")):
        assert_same(load(where, path), first)
    copy.write_bytes(b"!" + prose.read_bytes()[1:])
    others = [load(cache, copy), load(cache, prose, vocabulary=300)]
    # The same bytes, split after 1916 or 1917 of them.
    copy.write_bytes(b"a" * 1009)
    others.append(load(cache, copy, copy))
    copy.write_bytes(b"a" * 2018)
    others.append(load(cache, copy))
    assert len({first.identity, *(other.identity for other in others)}) == 5


def test_text_that_changes_is_read_again(cache, prose):
    load(cache, prose)
    content = prose.read_bytes().replace(b"k", b"K")
    prose.write_bytes(content)
    os.utime(prose, ns=(1, 1))
    found = load(cache, prose)
    assert found.train.tobytes() + found.held_out.tobytes() == content


def save(array):
    return lambda path: np.save(path, array)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_damage_is_made_good(cache, prose, tokenizers):
    found = load(cache, prose, vocabulary=300)
    # What is damaged in place must not be mapped.
    expected = found._replace(train=found.train.copy(), held_out=found.held_out.copy())
    del found
    entry = entry_of(cache)
    for name, damage in (
        ("train.npy", cut),
        ("train.npy", Path.unlink),
        ("train.npy", lambda path: path.write_bytes(b"")),
        ("held_out.npy", save(np.zeros(5, np.uint16))),
        ("held_out.npy", save(np.uint16(5))),
        ("held_out.npy", lambda path: save(np.load(path).astype(int))(path)),
        ("tokens.json", Path.unlink),
        ("tokens.json", lambda path: path.write_text(path.read_text()[:40])),
        ("tokens.json", lambda path: path.write_text("{}")),
        ("tokens.json", lambda path: path.write_text("[]")),
        ("tokens.json", lambda path: path.write_bytes(b"\xff")),
        ("tokenizer.json", Path.unlink),
        ("tokenizer.json", cut),
        ("tokenizer.json", lambda path: path.write_text('{"model": {"vocab": {}}}')),
        ("tokenizer.json", lambda path: path.write_text('{"model": null}')),
    ):
        content = (entry / name).read_bytes()
        damage(entry / name)
        assert_same(load(cache, prose, vocabulary=300), expected)
        assert (entry / name).read_bytes() == content


def child(cache, path, say, environment=None):
    """A process that loads the tokens of a BPE and prints their identity."""
    program = f"""
import os, signal
from pathlib import Path
from tokens import load_tokens
{say}
found = load_tokens(
    text=[Path({str(path)!r})], vocabulary=400, cache=Path({str(cache)!r}),
    sequence=16, say=say,
)
print(found.identity)
"""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES)} | (environment or {}),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_at_once(cache, prose, tokenizers, tmp_path):
    """Both wait for a lock held here; then one makes the tokens and one reads them."""
    expected = load(tmp_path / "other", prose, vocabulary=400)
    (lock,) = (tmp_path / "other").glob("*.lock")
    cache.mkdir()
    with (cache / lock.name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        processes = [child(cache, prose, "say = print") for _ in range(2)]
        lines = [process.stdout.readline() for process in processes]
        assert all(line.startswith("waiting for another process") for line in lines)
        assert not list(cache.glob("*/"))
    lines = [process.communicate()[0].splitlines() for process in processes]
    assert [line[-1] for line in lines] == [expected.identity] * 2
    assert sorted(len(line) for line in lines) == [1, 2]
    assert {path.name for path in cache.iterdir()} == {lock.stem, lock.name}


def test_a_process_that_is_killed_leaves_nothing_half(cache, prose, tokenizers):
    say = "say = lambda line: os.kill(os.getpid(), signal.SIGKILL)"
    with child(cache, prose, say) as process:
        assert process.wait() == -signal.SIGKILL
    assert not list(cache.glob("*/tokens.json"))
    assert list(cache.glob("*.partial"))
    load(cache, prose, vocabulary=400)
    assert not list(cache.glob("*.partial"))


def test_an_error_leaves_nothing_half(cache, prose, tokenizers, monkeypatch):
    monkeypatch.setattr(tokens, "_encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(cache, prose, vocabulary=300)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_what_is_said(cache, prose, tokenizers, monkeypatch, small_blocks):
    monkeypatch.setattr(tokens, "_PAUSE", 0.0)
    said = []
    load(cache, prose, vocabulary=300, say=said.append)
    assert said[0] == "training a BPE of 300 tokens on 0.0 MB"
    assert said[-1] == "encoding: 0.0 MB of 0.0 MB"


# --- errors ---------------------------------------------------------------------------


def test_what_cannot_be(cache, prose, tmp_path, tokenizers, folder, datasets):
    for paths, options, message in (
        (
            [prose],
            {"vocabulary": 255},
            "`--vocabulary` must be at least 256, .* got 255",
        ),
        (
            [prose],
            {"vocabulary": 60_000},
            "`--vocabulary` must be at most .* got 60000",
        ),
        ([prose], {"dataset": "a/b"}, "must not come with --text; got 'a/b' and"),
        ([prose], {"limit": 5}, "`--limit` must come with --dataset, .* got 5"),
        (
            [prose],
            {"sequence": 5000},
            "`--text` must hold at least 5002 .* of 5000; got",
        ),
        ([], {"dataset": "./nothing"}, r"folder that is there, .* got '\./nothing'"),
        ([], {"dataset": "a/b", "limit": 0}, r"`--limit` must be a positive .* got 0"),
        (
            [],
            {"dataset": folder(train=rows(documents(3))), "limit": 1},
            r"`--dataset` must hold .* got 0 and 0\.",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load(cache, *paths, **options)
    with pytest.raises(ValueError, match=r"`--cache` must be a folder .* '/proc/none'"):
        load(Path("/proc/none"), prose)
    for content, message in (
        (b" \n\t ", "must not be empty"),
        (b"\x7fELF\x00\x01", "must be text"),
        (None, "must name files"),
    ):
        path = tmp_path / f"text {message}"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "other", path)
    assert not list((tmp_path / "other").glob("*/"))


def test_missing_package(cache, prose, monkeypatch):
    for package, paths, options, message in (
        ("tokenizers", [prose], {"vocabulary": 300}, r'`--vocabulary` .* -e "\.\[demo'),
        ("datasets", [], {"dataset": "a/b"}, r'`--dataset` .* install -e "\.\[hf\]"'),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=message):
            load(cache, *paths, **options)
