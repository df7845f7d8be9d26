"""A model as a chain of blocks, and the activations between two of them."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cage_jax.arrays.checks import check_callable, check_float_dtype, warn
from cage_jax.arrays.paths import path_in_errors
from cage_jax.core.finite import check_finite
from cage_jax.core.quantize import fake_quant
from cage_jax.core.quantized_array import check_no_codes
from cage_jax.core.rules import Rules, check_rules
from cage_jax.finetuning.batches import checked_batches
from cage_jax.finetuning.reconstruction.blocks import Block, HostTree, Part, parts_of
from cage_jax.finetuning.reconstruction.programs import (
    Programs,
    is_float,
    programs_of,
    split,
)
from cage_jax.finetuning.run_folder import Digest, rules_in_full
from cage_jax.program.tracing import split_grids

MakeOptimizer = Callable[[Part], optax.GradientTransformation]


class Link(NamedTuple):
    """A block with its programs and the shapes of its inputs.

    Attributes:
      part: the block, the place of its parameters and their rules.
      programs: what is compiled for it and all equal blocks.
      inputs: shapes and dtypes of what it takes.
    """

    part: Part
    programs: Programs
    inputs: Any


class Streams(NamedTuple):
    """What a block takes, and what it is to return, of all batches, on the host.

    Attributes:
      inputs: for each batch, what the quantized blocks before return.
      targets: for each batch, what the blocks of the teacher return.
      like: shapes and dtypes of one batch, which may be kept in another dtype.
    """

    inputs: list[Any]
    targets: list[Any]
    like: Any


class Chain:
    """The blocks of a model, its parameters and its teacher's.

    Args:
      blocks, rules, params, teacher, first, stream_dtype: as in `reconstruct`.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        rules: Rules,
        params: Any,
        teacher: Any,
        first: Callable | None,
        stream_dtype: jax.typing.DTypeLike | None,
    ):
        check_rules(rules)
        check_no_codes(params=params, teacher=teacher)
        teacher, _ = split_grids(params if teacher is None else teacher)
        if first is not None:
            check_callable("first", first, "Use lambda params, *batch: x.")
        if stream_dtype is not None:
            check_float_dtype("stream_dtype", stream_dtype)
        self.rules, self._params, self._teacher = rules, params, teacher
        self._first, self._dtype = first or _alone, stream_dtype
        self.student, self.teacher = HostTree(params), HostTree(teacher)
        _check_like(self.teacher, self.student)
        self.parts, self.elsewhere = parts_of(blocks, rules, self.student)
        self._check_rules()

    def streams(self, batches: Iterable[tuple], digest: Digest | None) -> Streams:
        """Computes the inputs of the first block.

        Args:
          batches: as in `reconstruct`.
          digest: takes the batches, or None.

        Raises:
          TypeError, ValueError: as in `checked_batches`; for NaN or infinities, in
            parameters with a rule too, for shapes in their place and empty batches.
        """
        for argument, tree in (("params", self.student), ("teacher", self.teacher)):
            leaves = tree.arrays.items()
            check_finite({p: x for p, x in leaves if self.rules.match(p)}, argument)
        inputs: list[Any] = []
        targets: list[Any] = []
        like = None
        first = jax.jit(self._student_first), jax.jit(self._first)
        for number, batch in enumerate(checked_batches(batches)):
            if digest is not None:
                digest.add(batch)
            pair = first[0](self._params, *batch), first[1](self._teacher, *batch)
            like = jax.eval_shape(lambda x: x, pair[1])
            for stream, x in zip((inputs, targets), map(self.kept, pair)):
                if not all(map(_is_finite, jax.tree.leaves(x))):
                    raise ValueError(
                        f"`batches` must give finite inputs of the first block; got "
                        f"NaN or infinity in batch {number}. Look for it in the data, "
                        f"or in the parameters of `first`."
                    )
                if not all(leaf.size for leaf in jax.tree.leaves(x)):
                    raise ValueError(
                        f"`batches` must give inputs of the first block; got an empty "
                        f"array in batch {number}. Leave it out."
                    )
                stream.append(x)
        return Streams(inputs, targets, like)

    def shape_of_inputs(self, batch: tuple) -> Any:
        """Returns the shapes and dtypes of the first block's inputs."""
        return jax.eval_shape(self._first, self._teacher, *batch)

    def kept(self, x: Any) -> Any:
        """Brings activations to the host, in the dtype in which they are kept."""

        def keep(leaf):
            leaf = np.asarray(leaf)
            change = self._dtype is not None and is_float(leaf)
            return leaf.astype(self._dtype) if change else leaf

        return jax.tree.map(keep, x)

    def stream_bytes(self, x: Any) -> int:
        """Returns the bytes in which activations of these shapes are kept."""
        kept = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape,
                self._dtype
                if self._dtype is not None and is_float(leaf)
                else leaf.dtype,
            ),
            x,
        )
        return nbytes(kept)

    def links(self, x: Any, optimizer: MakeOptimizer) -> list[Link]:
        """Joins the blocks, whose outputs must be the inputs of the next ones.

        Args:
          x: shapes and dtypes of the first block's inputs.
          optimizer: makes the transformation of a block.

        Raises:
          ValueError: for a block that cannot take what the one before returns, with
            its name, and for one that returns no floats.
        """
        known: dict[Any, Programs] = {}
        links: list[Link] = []
        for part in self.parts:
            dtypes = tuple(leaf.dtype for leaf in jax.tree.leaves(x))
            key = part.block.kind, part.rules, dtypes
            if key not in known:
                known[key] = programs_of(part, dtypes, optimizer(part))
            link = Link(part, known[key], x)
            x = self._output(link, links)
            links.append(link)
        return links

    def described(self) -> dict[str, Any]:
        """Returns what results depend on, for `RunFolder`; functions are not in it."""
        return {
            "rules": rules_in_full(self.rules),
            "params": str(Digest().add(self._params)),
            "teacher": str(Digest().add(self._teacher)),
            "blocks": [part.block.name for part in self.parts],
            "stream_dtype": str(self._dtype),
        }

    def _check_rules(self):
        alone = [part.block.name for part in self.parts if not part.rules]
        if len(alone) == len(self.parts):
            raise ValueError(
                f"`rules` must quantize a parameter of `blocks`; got {self.rules}, and "
                f"blocks with the paths {[p for p, _ in self.parts[0].names][:3]} and "
                f"so on. Patterns are for paths in the whole model."
            )
        if alone:
            warn(
                f"`blocks` without a quantized parameter are not trained: "
                f"{', '.join(alone)}. Their outputs go to the next block."
            )
        for rule in (rule for part in self.parts for rule in part.rules):
            if rule.weights and rule.weights.rounding == "stochastic":
                raise ValueError(
                    f"`rules` must round to the nearest value here; got {rule.weights}."
                    f" Use dataclasses.replace(quantizer, rounding='nearest')."
                )

    def _student_first(self, variables, *batch):
        return self._first(split_grids(fake_quant(variables, self.rules))[0], *batch)

    def _output(self, link, before):
        """Returns the shape of a block's output; raises unless it takes its inputs."""
        name = link.part.block.name
        try:
            params = self.teacher.read(link.part)["params"]
            found = jax.eval_shape(link.programs.target, params, link.inputs)
        except Exception as error:
            whose = f"what {before[-1].part.block.name} returns" if before else "inputs"
            raise ValueError(
                f"`blocks`: {name} must take {whose}, {_in_words(link.inputs)}; got "
                f"the error {error} Look at the order of the blocks, and at what their "
                f"functions return."
            ) from error
        with path_in_errors(name):
            floats, rest = split(self.student.read(link.part))
            jax.eval_shape(link.programs.output, floats, rest, link.inputs, found)
        return found


def _alone(_, *batch):
    """Returns the inputs of the first block, if they are the batch."""
    return batch[0] if len(batch) == 1 else batch


def _check_like(teacher, student):
    """Raises unless a teacher has the parameters of its student."""
    ours, theirs = (
        {p: _like(x) for p, x in t.arrays.items()} for t in (student, teacher)
    )
    different = [
        path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)
    ]
    if different:
        path = different[0]
        raise ValueError(
            f"`{path}`: `teacher` must have the parameters of `params`; got "
            f"{theirs.get(path)} in place of {ours.get(path)}. Use the full-precision "
            f"parameters of the same model, in the same dtype."
        )


def _like(x):
    return f"{jnp.result_type(x)}{list(np.shape(x))}"


def _in_words(tree):
    return ", ".join(map(_like, jax.tree.leaves(tree)))


def _is_finite(leaf):
    return not is_float(leaf) or bool(np.isfinite(leaf).all())


def nbytes(tree: Any) -> int:
    """Returns the bytes of a tree of arrays, or of their shapes."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
