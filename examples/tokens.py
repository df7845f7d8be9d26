"""Tokens to train on: bytes, or byte-level BPE, cached on disk."""

import contextlib
import fcntl
import functools
import hashlib
import importlib
import io
import itertools
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from text import blocks, pieces, text_files

END_OF_TEXT = "<|endoftext|>"  # between the documents of a dataset; token 0 of a BPE
BYTES = 256  # vocabulary without a tokenizer
_END = b"\0"  # END_OF_TEXT among bytes
_FORMAT = 1  # version of the cache's entries
_PARTS = ("train", "held_out")
_LIMIT = 1_000_000_000
_SAMPLE = 20_000_000  # bytes that a BPE is trained on
_BATCH = 4_000_000  # bytes encoded at once
_EVERY = 20  # one document in this many is held out
_PAUSE = 5.0  # seconds between two lines of progress
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # bytes decoded by "surrogateescape"


class Tokens(NamedTuple):
    """A text as tokens, read-only and mapped from the cache.

    Attributes:
      train: to train on, of shape (n,): uint8 for bytes, else uint16 or, above 65,536
        tokens, uint32.
      held_out: to validate on, likewise.
      vocabulary: number of tokens; 256 for bytes.
      bytes_per_token: of the held-out text, to convert losses to bytes.
      identity: identifies the text and its tokenizer, independent of their location.
    """

    train: np.ndarray
    held_out: np.ndarray
    vocabulary: int
    bytes_per_token: float
    identity: str


def load_tokens(
    *,
    text: Sequence[Path] = (),
    dataset: str | None = None,
    vocabulary: int = BYTES,
    limit: int | None = None,
    cache: Path,
    sequence: int,
    say: Callable[[str], None] = lambda line: None,
) -> Tokens:
    """Loads the tokens of a text, which are made once and then read from `cache`.

    A BPE is trained on the first 20 MB of the training part, and is kept beside its
    tokens as tokenizer.json, which `tokenizers` and transformers read. Every byte is
    also a token, so nothing is lost, even outside UTF-8. Documents of a dataset are
    separated by a zero byte or, with a BPE, by token 0, "<|endoftext|>"; the same
    letters in a text become that token, too. The text may be larger than memory.

    Args:
      text: files, joined and split as by `text.text_files`.
      dataset: instead of files, the name of a dataset on the Hugging Face Hub, or a
        folder that `datasets` can read, with a column "text". Its split "validation",
        or else "test", is held out; without either, one document in twenty. With
        neither files nor a dataset, the sources of Python's standard library are used.
      vocabulary: 256 for bytes, or the size of a BPE, with bytes and end of text.
      limit: largest number of bytes to take from the dataset; 1 GB if None.
      cache: a folder, created if it is missing. If several processes need the same
        tokens at once, one makes them and the others wait.
      sequence: length of a training window, to check that there is enough text.
      say: called with a message before slow stages.

    Raises:
      ValueError: for a text that is missing, too short or not text, a dataset that
        cannot be read, a vocabulary that is too small or too large for the text, and a
        package that is not installed.
    """
    _check(text, dataset, vocabulary, limit)
    if dataset is None:
        source = _from_files(text)
    else:
        source = _from_dataset(dataset, _LIMIT if limit is None else limit)
    key = json.dumps([_FORMAT, vocabulary, source.key])
    entry = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    tokens = _read(entry, vocabulary)
    if tokens is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"`--cache` must be a folder that can be written; got {str(cache)!r} "
                f"({error.strerror}). Name another."
            ) from error
        with _alone(entry.with_suffix(".lock"), say):
            tokens = _read(entry, vocabulary) or _make(entry, source, vocabulary, say)
    least = sequence + 2
    if min(len(tokens.train), len(tokens.held_out)) < least:
        raise ValueError(
            f"`--{source.flag}` must hold at least {least} tokens to train on, and as "
            f"many to validate on, for windows of {sequence}; got {len(tokens.train)} "
            f"and {len(tokens.held_out)}. Use more text, or a shorter --sequence."
        )
    return tokens


def _check(text, dataset, vocabulary, limit):
    if vocabulary < BYTES:
        raise ValueError(
            f"`--vocabulary` must be at least {BYTES}, since every byte is a token; "
            f"got {vocabulary}. Use {BYTES} for bytes, or more for a BPE."
        )
    if text and dataset is not None:
        raise ValueError(
            f"`--dataset` must not come with --text; got {dataset!r} and "
            f"{' '.join(map(str, text))}. Leave one of them out."
        )
    if limit is not None and dataset is None:
        raise ValueError(
            f"`--limit` must come with --dataset, which it is the bytes of; got "
            f"{limit}. Leave it out."
        )
    if limit is not None and limit <= 0:
        raise ValueError(
            f"`--limit` must be a positive number of bytes; got {limit}. Leave it out "
            f"for {_LIMIT}."
        )


# --- sources of text ------------------------------------------------------------------


class _Source(NamedTuple):
    flag: str
    name: str
    key: list[Any]  # identifies it without reading it
    size: str  # in words, for progress
    pieces: Iterator[tuple[bool, bytes]]  # each with True if it is held out


def _from_files(files: Sequence[Path]) -> _Source:
    stamps = _stamps(path for path, _ in text_files(files))
    name = " ".join(map(str, files))
    return _Source(
        flag="text",
        name=name or f"the standard library of Python {platform.python_version()}",
        key=stamps,
        size=_megabytes(sum(size for _, size, _ in stamps)),
        pieces=pieces(files),
    )


def _from_dataset(name: str, limit: int) -> _Source:
    stamps = _stamps(path for path in sorted(Path(name).rglob("*")) if path.is_file())
    return _Source(
        flag="dataset",
        name=name,
        key=[name, limit, stamps],
        size=f"at most {_megabytes(limit)}",
        pieces=_joined(_documents(name, limit)),
    )


def _stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Returns the path, size and modification time of each file."""
    stats = ((path.resolve(), path.stat()) for path in paths)
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _documents(name: str, limit: int) -> Iterator[tuple[bool, bytes]]:
    splits = _splits(name)
    if "train" not in splits:
        raise ValueError(
            f"`--dataset` must have a split 'train'; got {name!r} with "
            f"{', '.join(splits)}. Name another."
        )
    train = _texts(name, splits["train"])
    other = next((split for split in ("validation", "test") if split in splits), None)
    if other is None:
        for number, document in enumerate(_first(train, limit)):
            yield number % _EVERY == 0, document
    else:
        share = limit // _EVERY
        for document in _first(train, limit - share):
            yield False, document
        for document in _first(_texts(name, splits[other]), share):
            yield True, document


def _splits(name: str) -> dict[str, Iterable[dict[str, Any]]]:
    datasets = _package("datasets", "dataset", "hf")
    try:
        return datasets.load_dataset(name, streaming=True)
    except Exception as error:
        raise _unreadable(name, error) from error


def _texts(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    rows = iter(rows)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unreadable(name, error) from error
        if row is None:
            return
        text = row.get("text", ())  # None is an empty document
        if not isinstance(text, str | None):
            raise ValueError(
                f"`--dataset` must have a column 'text' of text; got {name!r} with "
                f"{', '.join(f'{key} ({type(row[key]).__name__})' for key in row)}. "
                f"Rename the column, or use another dataset."
            )
        if text:
            yield text.encode()


def _unreadable(name, error):
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        return ValueError(
            f"`--dataset` must name a folder that is there, or a dataset on the "
            f"Hugging Face hub; got {name!r}. Check the path."
        )
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(
        f"`--dataset` must name a dataset on the Hugging Face hub, or a folder that "
        f"`datasets` can read; got {name!r}, and {cause}. Check the name and the "
        f"network."
    )


def _first(documents: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yields whole documents of at most `size` bytes in total."""
    for document in documents:
        size -= len(document)
        if size < 0:
            return
        yield document


def _joined(documents: Iterable[tuple[bool, bytes]]) -> Iterator[tuple[bool, bytes]]:
    begun = set()
    for held_out, document in documents:
        if held_out in begun:
            yield held_out, _END
        begun.add(held_out)
        for block in blocks(io.BytesIO(document), len(document)):
            yield held_out, block


# --- bytes and BPE --------------------------------------------------------------------


def _bytes(batch: Iterable[bytes]) -> Iterator[np.ndarray]:
    return (np.frombuffer(piece, np.uint8) for piece in batch)


def _train(sample: Sequence[bytes], vocabulary: int, say: Callable[[str], None]) -> Any:
    """Trains a byte-level BPE, the same for the same sample."""
    tokenizers = _package("tokenizers", "vocabulary", "demo")
    size = _megabytes(sum(map(len, sample)))
    say(f"training a BPE of {vocabulary} tokens on {size}")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    texts = (piece.decode(errors="ignore") for piece in sample if piece != _END)
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocabulary:
        raise ValueError(
            f"`--vocabulary` must be at most {found} for this text, in which no more "
            f"pairs of tokens come twice; got {vocabulary}. Use fewer, or more text."
        )
    return tokenizer


def _encode(tokenizer: Any, batch: Sequence[bytes]) -> Iterator[list[int]]:
    """Encodes each piece; parts that are not UTF-8 become tokens of bytes."""
    texts = [
        [END_OF_TEXT]
        if piece == _END
        else _NOT_UTF8.split(piece.decode(errors="surrogateescape"))
        for piece in batch
    ]
    valid = [part for parts in texts for part in parts[::2]]
    encoded = iter(tokenizer.encode_batch_fast(valid))
    # Tokens 1 to 256 are bytes: first those that a BPE's alphabet leaves unchanged.
    alphabet = tokenizer.pre_tokenizer.alphabet()
    order = sorted(range(BYTES), key=lambda byte: (chr(byte) not in alphabet, byte))
    for parts in texts:
        tokens: list[int] = []
        for number, part in enumerate(parts):
            if number % 2:
                tokens += (1 + order.index(ord(letter) - 0xDC00) for letter in part)
            else:
                tokens += next(encoded).ids
        yield tokens


def _package(name: str, flag: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`--{flag}` must have the package {error.name!r}, which is not "
            f'installed. Run pip install -e ".[{extra}]" in the folder of '
            f"pyproject.toml."
        ) from error


# --- the cache ------------------------------------------------------------------------


def _read(entry: Path, vocabulary: int) -> Tokens | None:
    """Reads the tokens in the cache; None if they are missing or damaged."""
    try:
        told = json.loads((entry / "tokens.json").read_text())
        arrays = [_mapped(entry, part) for part in _PARTS]
        whole = [list(array.shape) for array in arrays] == told["shapes"]
        whole &= all(array.dtype == _dtype(vocabulary) for array in arrays)
        if vocabulary > BYTES:
            tokenizer = json.loads((entry / "tokenizer.json").read_text())
            whole &= len(tokenizer["model"]["vocab"]) == vocabulary
        tokens = Tokens(*arrays, vocabulary, told["bytes_per_token"], told["identity"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return tokens if whole else None


def _make(
    entry: Path, source: _Source, vocabulary: int, say: Callable[[str], None]
) -> Tokens:
    """Writes an entry completely or not at all, and reads it."""
    partial = entry.with_suffix(".partial")
    for left in (partial, entry):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    try:
        _write(partial, source, vocabulary, say)
        partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    tokens = _read(entry, vocabulary)
    assert tokens is not None
    return tokens


def _write(folder, source, vocabulary, say):
    stream, encode, identity = source.pieces, _bytes, hashlib.sha256()
    versions = {"numpy": np.__version__}
    if vocabulary > BYTES:
        head = list(_head(stream))
        tokenizer = _train([piece for out, piece in head if not out], vocabulary, say)
        tokenizer.save(str(folder / "tokenizer.json"))
        identity.update(tokenizer.to_str().encode())
        stream = itertools.chain(head, stream)
        encode = functools.partial(_encode, tokenizer)
        versions["tokenizers"] = metadata.version("tokenizers")
    read = 0  # number of held-out bytes
    dtype = _dtype(vocabulary)
    with (
        _growing(folder / "train.npy", dtype) as train,
        _growing(folder / "held_out.npy", dtype) as held_out,
    ):
        for batch in _batches(_followed(stream, source.size, say)):
            encoded = encode([piece for _, piece in batch])
            for (out, piece), tokens in zip(batch, encoded):
                (held_out if out else train).write(np.asarray(tokens, dtype).tobytes())
                read += out * len(piece)
    arrays = [_mapped(folder, part) for part in _PARTS]
    for array in arrays:
        identity.update(len(array).to_bytes(8, "little"))
        identity.update(array)
    told = {
        "source": source.name,
        "vocabulary": vocabulary,
        "shapes": [array.shape for array in arrays],
        "bytes_per_token": read / max(len(arrays[1]), 1),
        "identity": identity.hexdigest()[:16],
        "versions": versions,
    }
    (folder / "tokens.json").write_text(json.dumps(told, indent=2) + "\n")


def _dtype(vocabulary: int) -> np.dtype:
    return np.min_scalar_type(vocabulary - 1)


def _mapped(folder: Path, part: str) -> np.ndarray:
    return np.lib.format.open_memmap(folder / f"{part}.npy", mode="r")


@contextlib.contextmanager
def _growing(path: Path, dtype: np.dtype) -> Iterator[BinaryIO]:
    """Opens a .npy file of one axis, whose length is set when it is closed."""

    def head(length):
        told = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, told)

    with path.open("wb") as file:
        head(0)  # NumPy leaves room in the header for the length
        begin = file.tell()
        yield file
        length = (file.tell() - begin) // dtype.itemsize
        file.seek(0)
        head(length)


def _head(stream: Iterator[tuple[bool, bytes]]) -> Iterator[tuple[bool, bytes]]:
    """Takes the beginning of a stream, enough to train a BPE on."""
    missing = _SAMPLE
    while missing > 0 and (item := next(stream, None)):
        held_out, piece = item
        missing -= 0 if held_out else len(piece)
        yield item


def _batches(
    stream: Iterable[tuple[bool, bytes]],
) -> Iterator[list[tuple[bool, bytes]]]:
    batch, size = [], 0
    for item in stream:
        batch.append(item)
        size += len(item[1])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _followed(
    stream: Iterable[tuple[bool, bytes]], size: str, say: Callable[[str], None]
) -> Iterator[tuple[bool, bytes]]:
    """Yields the stream, and reports progress to `say` every few seconds."""
    read, last = 0, time.monotonic()
    for item in stream:
        yield item
        read += len(item[1])
        if time.monotonic() - last >= _PAUSE:
            say(f"encoding: {_megabytes(read)} of {size}")
            last = time.monotonic()


@contextlib.contextmanager
def _alone(lock: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Locks out other processes; the lock ends with its process in any case."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process, which makes the same tokens")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
