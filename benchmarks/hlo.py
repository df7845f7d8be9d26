"""What a compiled program moves: between devices, and to and from main memory.

Read from the text of optimized HLO. A loop counts as often as it turns, if it counts
up to a constant as those of `jax.lax.scan` do; of a condition the costlier branch
counts. Memory on the chip (`S(1)` in a layout) is not main memory.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
# What neither reads nor writes: names of values, and what runs other computations.
_FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "tuple",
    "while",
}
# What runs other computations as a whole, and not for each element.
_RUNS = {"async-start", "call", "conditional", "fusion", "while"}
_FREE_CALLS = re.compile(
    r'custom_call_target="(AllocateBuffer|ConcatBitcast|AsyncCollective\w+)"'
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "f4e2m1fn": 4}
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


class Shape(NamedTuple):
    """One array: its bytes, and whether they are in main memory."""

    bytes: int
    in_memory: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str

    @property
    def called(self) -> list[str]:
        """The computations it runs, in order."""
        names = " ".join(_CALLED.findall(self.rest))
        return re.findall(r"[\w.\-]+", names)


class Moved(NamedTuple):
    """What a device moves in a run of a program.

    Attributes:
      memory: bytes read from and written to main memory.
      collectives: of each kind of collective, the bytes of its results.
      counts: of each kind, how often it is run.
    """

    memory: int
    collectives: Counter[str]
    counts: Counter[str]


def moved(text: str) -> Moved:
    """What the program of an HLO text moves, on each device."""
    computations, entry = _parse(text)
    return _moved(computations, entry, {})


def largest_gather(text: str) -> int:
    """The number of bytes of the largest result of an all-gather; 0 without one."""
    computations, _ = _parse(text)
    return max(
        (
            _received(each)
            for instructions in computations.values()
            for each in instructions
            if _collective(each) == "all-gather"
        ),
        default=0,
    )


def _moved(computations, name, known) -> Moved:
    if name in known:
        return known[name]
    memory, collectives, counts = 0, Counter(), Counter()
    by_name = {each.name: each for each in computations[name]}
    seen = set()
    for each in computations[name]:
        if (kind := _collective(each)) is not None:
            # One that runs beside others stands in the text at its start and its end.
            channel = re.search(r"channel_id=(\d+)", each.rest)
            if channel is None or channel[1] not in seen:
                collectives[kind] += _received(each)
                counts[kind] += 1
                seen.add(channel[1] if channel else None)
        times, inner = _inner(computations, each, known)
        if inner is not None:
            memory += 0 if each.kind == "fusion" else times * inner.memory
            for kind, bytes in inner.collectives.items():
                collectives[kind] += times * bytes
                counts[kind] += times * inner.counts[kind]
        if each.kind not in _FREE and not each.kind.endswith("-done"):
            memory += _traffic(each, by_name, computations)
    known[name] = Moved(memory, collectives, counts)
    return known[name]


def _inner(computations, instruction, known):
    """How often what an instruction calls is run, and what it moves then, or None."""
    called = [name for name in instruction.called if name in computations]
    if not called or instruction.kind not in _RUNS:
        return 1, None
    parts = {name: _moved(computations, name, known) for name in called}
    match instruction.kind:
        case "while":
            body = re.search(r"body=%?([\w.\-]+)", instruction.rest)[1]
            condition = re.search(r"condition=%?([\w.\-]+)", instruction.rest)[1]
            return _turns(computations[condition], instruction), parts[body]
        case "conditional":
            return 1, max(parts.values(), key=lambda part: part.memory)
        case _:
            return 1, parts[called[0]]


def _turns(condition, loop):
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    constants = {
        each.name: int(found[1])
        for each in condition
        if each.kind == "constant"
        and (found := re.match(r"constant\((\d+)\)", each.rest))
    }
    for each in condition:
        if each.kind == "compare" and "direction=LT" in each.rest:
            for operand in each.operands:
                if operand in constants:
                    return constants[operand]
    raise ValueError(
        f"`text` must have loops that count up to a constant; got {loop.name}. Unroll "
        f"it, or use jax.lax.scan."
    )


def _collective(instruction):
    kind = instruction.kind.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _received(instruction):
    """The bytes of what a collective gives to a device."""
    sizes = [shape.bytes for shape in instruction.shapes]
    match instruction.kind:
        case "all-gather-start" | "collective-permute-start":
            return sizes[1]  # the first is the operand, others are flags
        case _:
            return sum(sizes)


def _traffic(instruction, by_name, computations):
    """Bytes of main memory that an instruction reads and writes."""
    written = [shape.bytes if shape.in_memory else 0 for shape in instruction.shapes]
    match instruction.kind:
        case "dynamic-slice" | "gather" | "slice":
            return 2 * sum(written)  # not all of what is sliced
        case "dynamic-update-slice":
            return 2 * _bytes(by_name.get(instruction.operands[1]))
        case "copy-start" | "slice-start":  # from the first to the second
            moved = instruction.shapes[1].bytes
            return moved * sum(shape.in_memory for shape in instruction.shapes[:2])
        case "custom-call" if _FREE_CALLS.search(instruction.rest):
            return 0
        case "fusion":
            inside = _Inside(computations, instruction.called[0])
            shares = inside.shares_written()
            total = sum(bytes * share for bytes, share in zip(written, shares))
        case _:
            inside, total = None, sum(written)
    for number, operand in enumerate(instruction.operands):
        found = by_name.get(operand)
        read = sum(s.bytes for s in found.shapes if s.in_memory) if found else 0
        total += read * (inside.share_read(number) if inside else 1)
    return round(total)


def _bytes(instruction):
    return sum(shape.bytes for shape in instruction.shapes) if instruction else 0


# Of what these make, each element needs one of theirs.
_ONE_TO_ONE = {"bitcast", "convert", "copy", "reshape", "transpose"}


class _Inside:
    """A fusion from inside: which share of its operands and results it touches."""

    def __init__(self, computations, name):
        self.computations = computations
        self.instructions = computations[name]
        self.by_name = {each.name: each for each in self.instructions}

    def share_read(self, number: int) -> float:
        """Returns the share of an operand that is read.

        Slices read a part; an operand that is updated in place is not read.
        """
        own = f"parameter({number})"
        name = next((e.name for e in self.instructions if e.rest.startswith(own)), None)
        return 1.0 if name is None else min(1.0, self._read(name))

    def _read(self, name):
        # What a fusion hands on, another one around it reads.
        share = 1.0 if name == self.instructions[-1].name else 0.0
        for user in self.instructions:
            for place, operand in enumerate(user.operands):
                if operand == name:
                    share += self._read_by(user, place, name)
        return share

    def _read_by(self, user, place, name):
        match user.kind:
            case "dynamic-slice" | "gather" | "slice" if place == 0:
                return _bytes(user) / max(_bytes(self.by_name[name]), 1)
            case "dynamic-update-slice" if place == 0:
                return 0.0
            case "fusion":
                return _Inside(self.computations, user.called[0]).share_read(place)
            case kind if kind in _ONE_TO_ONE:
                return self._read(user.name)
            case _:
                return 1.0

    def shares_written(self) -> list[float]:
        """Returns the share of each result that is written.

        It is below 1 for a result that is updated in place.
        """
        root = self.instructions[-1]
        if root.kind == "fusion":
            return _Inside(self.computations, root.called[0]).shares_written()
        if root.kind != "tuple":
            return [self._written(root)]
        return [self._written(self.by_name[name]) for name in root.operands]

    def _written(self, made):
        match made.kind:
            case "dynamic-update-slice":
                update = _bytes(self.by_name[made.operands[1]])
                return update / max(_bytes(made), 1)
            case "fusion" if len(made.shapes) == 1:
                return _Inside(self.computations, made.called[0]).shares_written()[0]
            case kind if kind in _ONE_TO_ONE:
                return self._written(self.by_name[made.operands[0]])
            case _:
                return 1.0


def _parse(text) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if (start := _COMPUTATION.match(line)) and not line.startswith(" "):
            current = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_instruction(found[2], found[3]))
    if not entry:
        raise ValueError("`text` must be HLO with an entry; got none.")
    return computations, entry


def _instruction(name, text) -> Instruction:
    type_text, rest = _split_type(re.sub(r"/\*.*?\*/", "", text))
    kind, _, after = rest.partition("(")
    inside = _inside(after)
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, kind.strip(), tuple(_shapes(type_text)), operands, rest)


def _split_type(text):
    """The type of an instruction, and what follows it."""
    if not text.startswith("("):
        type_text, _, rest = text.partition(" ")
        return type_text, rest
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: place + 1], text[place + 2 :]
    raise ValueError(f"`text` must have closed brackets; got {text!r}.")


def _inside(text):
    """What is before the bracket that closes."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:place]
    return text


def _shapes(text) -> Iterator[Shape]:
    for dtype, dimensions, layout in _SHAPE.findall(text):
        if dtype == "token":
            continue
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
        size = math.prod(int(n) for n in dimensions.split(",") if n)
        yield Shape(math.ceil(size * bits / 8), "S(" not in (layout or ""))
