"""Damaged model files, and what `cage_jax.load` says of them.

    python tests/fuzzing.py --files 20000

Each file is a small model with a few bits, bytes or numbers changed. Whatever they are,
loading must give a model or a `MalformedFileError`, within a second and in ten times
the memory of the file. They are loaded in processes with a limit of memory and an alarm
for each file, so that one that crashes or hangs is found too.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
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
# Of a process: seconds for a file, memory beside what the whole files take.
MOST_SECONDS, MOST_MEMORY, FILES_OF_A_PROCESS = 10, 2**30, 1000
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
    cage.export.gguf(codes(cage.mxfp4()), CONFIG, folder / "mxfp4.gguf")
    native.save(Model(codes(cage.int3()), CONFIG, tokenizer), folder / "native")
    tree = codes(cage.nf4(group_size=32))
    cage.export.save(tree, folder / "tree.safetensors")
    cage.export.save_orbax(tree, folder / "orbax")
    x = jax.ShapeDtypeStruct((2, 64), jax.numpy.float32)
    cage.export.stablehlo(
        lambda params, x: x @ params["kernel"][0],
        tree["layers"]["up"],
        folder / "program",
        arguments=[x],
    )
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


def outcome(path: pathlib.Path, *, traced: bool) -> Outcome:
    """Loads a file, and says whether that went as it must; `traced` for its memory."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    limit = TIMES_THE_FILE * sum(file.stat().st_size for file in files) + SPARE
    if traced:
        tracemalloc.start()
    started = time.process_time()
    try:
        model = cage.load(path)
        jax.tree.map(np.asarray, model.params)
        found = Outcome("read", "")
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        refused = type(error) is MalformedFileError and len(str(error)) > 20
        # Not damaged, but not read: arrays of 64 bits, and codes in a program.
        known = ("jax_enable_x64", "weights='arguments'")
        refused |= type(error) is ValueError and any(w in str(error) for w in known)
        found = Outcome("refused" if refused else "WRONG ERROR", said)
    finally:
        seconds = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
        if traced:
            tracemalloc.stop()
    if peak > limit:
        return Outcome("MEMORY", f"{peak} bytes, at most {limit}; {found}")
    # Programs are compiled in the first loads; those are no part of this.
    if seconds > SECONDS and found.verdict != "read":
        return Outcome("TIME", f"{seconds:.2f} s; {found}")
    return found


def drawn(
    sources: pathlib.Path, number: int, seed: int
) -> tuple[random.Random, pathlib.Path]:
    """Returns the random numbers for a damaged file, and what is damaged."""
    draw = random.Random(f"{seed} {number}")
    return draw, draw.choice(sorted(sources.iterdir()))


def work(sources: pathlib.Path, numbers: list[int], seed: int) -> None:
    """Loads damaged copies, in a process that ends with the first that takes too much.

    Prints a line of JSON before each, and one with what came of it.
    """
    with tempfile.TemporaryDirectory() as name:
        for source in sorted(sources.iterdir()):
            for _ in range(2):  # the second time nothing is compiled
                found = outcome(source, traced=False)
            if found.verdict != "read":
                raise RuntimeError(f"{source.name} must be read; got {found}")
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MOST_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in numbers:
            draw, source = drawn(sources, number, seed)
            target = pathlib.Path(name) / f"damaged-{source.name}"
            what = damaged(source, target, draw)
            print(json.dumps([number, source.name, what]), flush=True)
            signal.alarm(MOST_SECONDS)  # which ends the process
            # Of one in eight, since tracing takes as long as reading.
            traced = number % 8 == 0 and source.name != "orbax"
            found = outcome(target, traced=traced)
            signal.alarm(0)
            print(json.dumps([number, *found]), flush=True)
            shutil.rmtree(target) if target.is_dir() else target.unlink()


def run(files: int, seed: int) -> Iterator[tuple[str, str, Outcome]]:
    """Damages so many files, and yields the reader, what was done, what came of it."""
    with tempfile.TemporaryDirectory() as name:
        sources = pathlib.Path(name)
        corpus(sources)
        # Folders of Orbax last. Where it fails it leaves threads behind, beside which
        # memory cannot be traced: Python 3.11 crashes.
        waiting = sorted(
            range(files), key=lambda n: (drawn(sources, n, seed)[1].name == "orbax", n)
        )
        while waiting:
            chosen = waiting[:FILES_OF_A_PROCESS]
            code = f"import fuzzing, pathlib\nfuzzing.work(pathlib.Path({name!r}), "
            worker = subprocess.Popen(
                [sys.executable, "-c", f"{code}{chosen}, {seed})"],
                env=os.environ | {"PYTHONPATH": ":".join(sys.path), "XLA_FLAGS": ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            said, complaints = worker.communicate()
            lines = [json.loads(line) for line in said.splitlines()]
            if not lines:
                raise RuntimeError(f"no file was loaded: {complaints[-2000:]}")
            for before, after in itertools.zip_longest(lines[::2], lines[1::2]):
                number, source, what = before
                _, *found = after or (
                    number,
                    "CRASH" if worker.returncode != -signal.SIGALRM else "TIME",
                    f"exit {worker.returncode}: {complaints[-300:]}",
                )
                yield source, f"{number}: {what} of {source}", Outcome(*found)
                waiting.remove(number)


def check(files: int, seed: int) -> None:
    """Asserts that all of so many damaged files are read or refused, and some each."""
    found = list(run(files, seed))
    wrong = [
        f"{what}: {one}"
        for _, what, one in found
        # Time is for `make fuzz`, where nothing else runs.
        if one.verdict not in ("read", "refused", "TIME")
    ]
    assert wrong == []
    verdicts = [one.verdict for _, _, one in found]
    # Of what is read a bit of a weight, a scale or a name is another.
    assert verdicts.count("refused") > files / 5
    assert verdicts.count("read") > files / 10


def main() -> int:
    """Runs the program; 1 where something went wrong."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--files", type=int, default=20_000, help="how many (20000)")
    flags.add_argument("--seed", type=int, default=0, help="of what is damaged (0)")
    options = flags.parse_args()
    counts: dict[str, collections.Counter] = {}
    for number, (source, what, found) in enumerate(run(options.files, options.seed), 1):
        counts.setdefault(source, collections.Counter())[found.verdict] += 1
        if found.verdict not in ("read", "refused"):
            print(f"{what}: {found.verdict}: {found.what}", flush=True)
        if number % 500 == 0:
            total = sum(counts.values(), collections.Counter())
            print(f"{number} of {options.files}: {dict(total)}", flush=True)
    for source, verdicts in sorted(counts.items()):
        print(f"{source}: {dict(verdicts)}")
    return int(
        bool({v for each in counts.values() for v in each} - {"read", "refused"})
    )


if __name__ == "__main__":
    sys.exit(main())
