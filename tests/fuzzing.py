"""Damaged model files, and what `cage_jax.load` says of them.

    python tests/fuzzing.py --files 10000

Each file is a small model with a few bits, bytes or numbers changed. Whatever they are,
loading must give a model or one of the errors that are meant for it, within a second
and in ten times the memory of the file.
"""

import argparse
import json
import pathlib
import random
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from small_llama import TIED as CONFIG
from small_llama import on_host, params_of, with_codes, with_kernels
from small_tokenizer import files_of, small_tokenizer

import cage_jax as cage
from cage_jax.export import native
from cage_jax.export.files import MalformedFileError
from cage_jax.llama.loaded import Model

SECONDS, TIMES_THE_FILE, SPARE = 1.0, 10, 4 * 2**20
HUGE = (0, 1, 0x7F, 0xFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
TRICKS = ("../../etc/passwd", "/etc/passwd", "..", "a\0b", "C:\\x", "~", "", "." * 5000)


class Outcome(NamedTuple):
    """What became of a damaged file: "read", "refused", or what is wrong."""

    verdict: str
    what: str


def corpus(folder: pathlib.Path) -> list[pathlib.Path]:
    """A small model in each kind of file."""
    params = on_host(params_of(CONFIG))

    def codes(weights, embedding=None):
        found = with_kernels(weights, CONFIG)
        if embedding is not None:
            found = with_codes(found, "embedding/embedding", embedding)
        return on_host(found)

    tokenizer = files_of(small_tokenizer(__doc__ * 2))
    packed = codes(cage.ct_w4a16(group_size=32, symmetric=False))
    options = {"tokenizer": tokenizer}
    cage.export.compressed_tensors(packed, CONFIG, folder / "pack", **options)
    cage.export.compressed_tensors(codes(cage.mxfp4()), CONFIG, folder / "mxfp4")
    cage.export.compressed_tensors(codes(cage.nvfp4()), CONFIG, folder / "nvfp4")
    cage.export.compressed_tensors(
        params, CONFIG, folder / "shards", shard_bytes=100_000
    )
    blocks = codes(cage.q4_0(), cage.q8_0(axis=-1))
    cage.export.gguf(blocks, CONFIG, folder / "q4_0.gguf", **options)
    cage.export.gguf(codes(cage.q4_1()), CONFIG, folder / "q4_1.gguf")
    native.save(Model(codes(cage.int3()), CONFIG, tokenizer), folder / "native")
    cage.export.save(codes(cage.nf4(group_size=32)), folder / "tree.safetensors")
    return sorted(folder.iterdir())


# --- ways to damage bytes -------------------------------------------------------------


def _flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        data[_somewhere(data, draw)] ^= 1 << draw.randrange(8)


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def _grow(data: bytearray, draw: random.Random) -> None:
    data += draw.randbytes(draw.choice((1, 7, 4096)))


def _number(data: bytearray, draw: random.Random) -> None:
    width, place = draw.choice((4, 8)), _somewhere(data, draw)
    number = draw.choice(HUGE) % 2 ** (8 * width)
    data[place : place + width] = number.to_bytes(width, "little")


def _remove(data: bytearray, draw: random.Random) -> None:
    place = _somewhere(data, draw)
    del data[place : place + draw.choice((1, 4, 100))]


def _insert(data: bytearray, draw: random.Random) -> None:
    place = _somewhere(data, draw)
    data[place:place] = draw.randbytes(draw.choice((1, 4, 100)))


def _copy(data: bytearray, draw: random.Random) -> None:
    source, place = _somewhere(data, draw), _somewhere(data, draw)
    part = data[source : source + draw.choice((4, 8, 64))]
    data[place : place + len(part)] = part


def _digits(data: bytearray, draw: random.Random) -> None:
    """Another digit, sign or bracket in the text that there is."""
    places = [i for i, byte in enumerate(data[:4000]) if 0x20 <= byte < 0x7F]
    for place in draw.sample(places, min(len(places), draw.choice((1, 2, 5)))):
        data[place] = ord(draw.choice('0123456789-e."[]{},:nul'))


DAMAGES = (_flip, _cut, _grow, _number, _remove, _insert, _copy, _digits)


def _somewhere(data, draw):
    """A place: half of the time in the beginning, where the lengths are."""
    end = len(data) if draw.random() < 0.5 else min(len(data), 2000)
    return draw.randrange(max(end, 1))


def _json(data: bytearray, draw: random.Random) -> None:
    """Another value somewhere in a JSON file."""
    content = json.loads(bytes(data))
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw.choice(keys)
        inner = node[key]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.3:
            break
        node = inner
    values = (*HUGE, -1, 1.5, None, True, [], {}, "", [[[]]], *TRICKS)
    if draw.random() < 0.2:
        del node[key]
    else:
        node[key] = draw.choice(values)
    data[:] = json.dumps(content).encode()


def damaged(source: pathlib.Path, target: pathlib.Path, draw: random.Random) -> str:
    """Copies a file or folder with one thing changed, and says which."""
    files = [source]
    if source.is_dir():
        shutil.copytree(source, target)
        files = sorted(path for path in target.rglob("*") if path.is_file())
    file = draw.choice(files)
    data = bytearray(file.read_bytes())
    damage: Callable = draw.choice(DAMAGES)
    if file.suffix == ".json" and draw.random() < 0.7:
        damage = _json
    if data:
        damage(data, draw)
    (file if source.is_dir() else target).write_bytes(data)
    return f"{damage.__name__} in {file.name}"


# --- what comes of it -----------------------------------------------------------------


def outcome(path: pathlib.Path) -> Outcome:
    """Loads a file, and says whether that went as it must."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    limit = TIMES_THE_FILE * sum(file.stat().st_size for file in files) + SPARE
    tracemalloc.start()
    started = time.process_time()
    try:
        model = cage.load(path)
        jax.tree.map(np.asarray, model.params)
        found = Outcome("read", "")
    except (MalformedFileError, FileNotFoundError, ValueError) as error:
        kinds = (MalformedFileError, FileNotFoundError, ValueError)
        if type(error) in kinds and len(str(error)) > 20:
            found = Outcome("refused", str(error))
        else:
            found = Outcome("WRONG ERROR", f"{type(error).__name__}: {error}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found = Outcome("WRONG ERROR", f"{type(error).__name__}: {error}")
    finally:
        seconds = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if peak > limit:
        return Outcome("MEMORY", f"{peak} bytes, at most {limit}; {found}")
    # Programs are compiled in the first loads; those are no part of this.
    if seconds > SECONDS and found.verdict != "read":
        return Outcome("TIME", f"{seconds:.2f} s; {found}")
    return found


def run(files: int, seed: int) -> Iterator[tuple[str, Outcome]]:
    """Damages so many files, and yields what was done and what came of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "whole").mkdir()
        sources = corpus(folder / "whole")
        for source in sources:
            for _ in range(2):  # the second time nothing is compiled
                found = outcome(source)
            if found.verdict != "read":
                raise RuntimeError(f"{source.name} must be read; got {found}")
        for number in range(files):
            draw = random.Random(f"{seed} {number}")
            source = draw.choice(sources)
            target = folder / f"damaged{source.suffix}"
            what = damaged(source, target, draw)
            yield f"{number}: {source.name}, {what}", outcome(target)
            shutil.rmtree(target) if target.is_dir() else target.unlink()


def check(files: int, seed: int) -> None:
    """Asserts that all of so many damaged files are read or refused, and some each."""
    found = dict(run(files, seed))
    wrong = [
        f"{what}: {one}"
        for what, one in found.items()
        # Time is for `make fuzz`, where nothing else runs.
        if one.verdict not in ("read", "refused", "TIME")
    ]
    assert wrong == []
    verdicts = [one.verdict for one in found.values()]
    # Of what is read a bit of a weight, a scale or a name is another.
    assert verdicts.count("refused") > files / 5
    assert verdicts.count("read") > files / 10


def main() -> int:
    """Runs the program; 1 where something went wrong."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--files", type=int, default=10_000, help="how many (10000)")
    flags.add_argument("--seed", type=int, default=0, help="of what is damaged (0)")
    options = flags.parse_args()
    counts: dict[str, int] = {}
    for number, (what, found) in enumerate(run(options.files, options.seed), 1):
        counts[found.verdict] = counts.get(found.verdict, 0) + 1
        if found.verdict not in ("read", "refused"):
            print(f"{what}: {found.verdict}: {found.what}", flush=True)
        if number % 500 == 0:
            print(f"{number} of {options.files}: {counts}", flush=True)
    print(f"{options.files} files: {counts}")
    return int(bool(counts.keys() - {"read", "refused"}))


if __name__ == "__main__":
    sys.exit(main())
