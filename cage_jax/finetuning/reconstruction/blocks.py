"""Blocks of a model: parts that run one after another, each on its own parameters."""

import re
from collections.abc import Callable, Sequence
from reprlib import repr as short
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_flatten_with_path

from cage_jax.arrays.names import did_you_mean, names_checked
from cage_jax.arrays.paths import flatten_with_paths, name_of
from cage_jax.core.rules import Rules
from cage_jax.program.tracing import split_grids
from cage_jax.program.visiting import INPUTS
from cage_jax.quantizers.grid import Grid


class Block(NamedTuple):
    """One block of a model; see `reconstruct`.

    Attributes:
      function: `function(params, x) -> x`, of the block's parameters and of what the
        block before returns: an array, or a tree of arrays. Blocks of one function,
        equal shapes and equal quantizers share their compiled programs.
      paths: path of the block's parameters, such as "layers/3"; the function gets what
        is there. For a tuple of paths it gets a tuple.
      row: row of these parameters that is the block's, where layers are stacked; or
        None. The function gets arrays without the axis of layers.
      teacher: the function in full precision, if `function` itself quantizes inputs,
        keys or values; or None.
    """

    function: Callable[[Any, Any], Any]
    paths: str | tuple[str, ...]
    row: int | None = None
    teacher: Callable[[Any, Any], Any] | None = None

    @property
    def name(self) -> str:
        """The block's paths, as they are named in errors."""
        paths = self.paths if isinstance(self.paths, str) else ", ".join(self.paths)
        return paths if self.row is None else f"{paths}[{self.row}]"

    @property
    def kind(self) -> Any:
        """Is equal for blocks that differ in the place of their parameters alone."""
        row, one = self.row is None, isinstance(self.paths, str)
        return self.function, self.teacher, row, one


@names_checked
def blocks(
    function: Callable[[Any, Any], Any],
    params: Any,
    pattern: str,
    *,
    stacked: bool = False,
    teacher: Callable[[Any, Any], Any] | None = None,
) -> list[Block]:
    r"""Makes the blocks of a model with equal layers.

    Args:
      function: as in `Block`.
      params: the model's parameters, with or without grids; arrays or their shapes.
      pattern: a regular expression for the path of a layer's parameters, such as
        r"layers/\d+"; with `stacked`, for that of all layers, such as "layers".
      stacked: whether the first axis of these arrays counts the layers.
      teacher: as in `Block`.

    Returns:
      A block for each layer. Layers have the order of the numbers in their paths, so
      that 10 follows 9.

    Raises:
      ValueError: if nothing has such a path, and for stacks of different heights.

    Example:
      >>> import cage_jax as cage
      >>> import jax.numpy as jnp
      >>> def layer(params, x):
      ...     return x + jnp.tanh(x @ params["w"])
      >>> params = {"layers": [{"w": jnp.ones((4, 4))}] * 3}
      >>> found = cage.finetuning.blocks(layer, params, r"layers/\d+")
      >>> [block.name for block in found]
      ['layers/0', 'layers/1', 'layers/2']
      >>> params = {"layers": {"w": jnp.ones((3, 4, 4))}}
      >>> found = cage.finetuning.blocks(layer, params, "layers", stacked=True)
      >>> [block.name for block in found]
      ['layers[0]', 'layers[1]', 'layers[2]']
    """
    try:
        whole = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`pattern` must be a regular expression; got {pattern!r}: {error}. Use "
            f"r'layers/\\d+'."
        ) from error
    paths, leaves, _ = flatten_with_paths(split_grids(params)[0])
    nodes = {
        "/".join(p.split("/")[:n])
        for p in paths
        for n in range(1, 1 + len(p.split("/")))
    }
    found = sorted((p for p in nodes if whole.fullmatch(p)), key=_by_number)
    if not found:
        raise ValueError(
            f"`pattern` must match the path of a layer's parameters; got {pattern!r}."
            f"{did_you_mean(pattern, nodes)} The parameters begin with {paths[:3]}."
        )
    if not stacked:
        return [Block(function, path, None, teacher) for path in found]
    made = []
    for top in found:
        inside = [leaf for path, leaf in zip(paths, leaves) if _is_in(path, top)]
        heights = {np.shape(leaf)[:1] for leaf in inside}
        if len(heights) != 1 or () in heights:
            raise ValueError(
                f"`stacked` must have one number of layers, the first axis of all "
                f"arrays; got the lengths {sorted(heights)} in `{top}`. Leave out "
                f"`stacked`, or match the stack alone."
            )
        ((height,),) = heights
        made += [Block(function, top, row, teacher) for row in range(height)]
    return made


def _by_number(path):
    """Returns a key for sorting by numbers: texts and numbers take turns."""
    parts = re.split(r"(\d+)", path)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _is_in(path, top):
    return path == top or path.startswith(top + "/")


class Part(NamedTuple):
    """The place of a block's parameters in a tree, and how they are quantized.

    Attributes:
      block: the block.
      structure: the structure of a tuple of subtrees, one for each path of the block.
      names: pairs of the path of a leaf in the tree and of that in the tuple.
      rules: a table for the tuple, equal for equal layers.
    """

    block: Block
    structure: Any
    names: tuple[tuple[str, str], ...]
    rules: Rules

    @property
    def bits(self) -> int | None:
        """The fewest bits of its weights; None if no weight is quantized."""
        return min(
            (rule.weights.bits for rule in self.rules if rule.weights), default=None
        )


class HostTree:
    """Parameters and grids that are read and written block by block, on the host.

    Args:
      variables: a tree of parameters, with or without grids.
    """

    def __init__(self, variables: Any):
        params, grids = split_grids(variables)
        self.has_grids = params is not variables
        paths, leaves, self.structure = flatten_with_paths(params)
        self.arrays: dict[str, Any] = dict(zip(paths, leaves))
        self.grids: dict[str, Grid] = dict(grids)
        self._given = dict(self.arrays), dict(grids)
        self._copied: set[tuple[int, str]] = set()

    def read(self, part: Part) -> dict[str, Any]:
        """Returns a block's parameters and grids, in the form of `with_grids`."""
        row = part.block.row
        leaves = [_cut(self.arrays[path], _rows(row)) for path, _ in part.names]
        grids = {
            name + end: _cut(self.grids[path + end], _rows(row, end))
            for path, name in part.names
            for end in ("", INPUTS)
            if path + end in self.grids
        }
        return {"params": part.structure.unflatten(leaves), "grids": grids}

    def write(self, part: Part, variables: dict[str, Any]) -> None:
        """Puts back what `read` returned, after it was trained."""
        row = part.block.row
        leaves = part.structure.flatten_up_to(variables["params"])
        for (path, name), leaf in zip(part.names, leaves):
            self._put(self.arrays, path, _rows(row), leaf)
            for end in ("", INPUTS):
                if (grid := variables["grids"].get(name + end)) is not None:
                    self._put(self.grids, path + end, _rows(row, end), grid)

    def tree(self) -> Any:
        """Returns everything in the form and on the devices that were given."""
        arrays, grids = jax.tree.map(_placed, (self.arrays, self.grids), self._given)
        params = self.structure.unflatten(arrays.values())
        return {"params": params, "grids": grids} if self.has_grids else params

    def _put(self, store, key, index, values):
        if index is ...:
            store[key] = jax.tree.map(np.asarray, values)
            return
        if (id(store), key) not in self._copied:
            self._copied.add((id(store), key))
            store[key] = jax.tree.map(np.array, store[key])
        for old, new in zip(jax.tree.leaves(store[key]), jax.tree.leaves(values)):
            old[index] = new


def _rows(row, end=""):
    """Returns the index of a row; the grid of an input has no axis of layers in it."""
    if row is None:
        return ...
    return row if end else slice(row, row + 1)


def _cut(tree, index):
    def cut(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.eval_shape(lambda x: x[index], x)
        return np.asarray(x)[index]

    return jax.tree.map(cut, tree)


def _placed(new, old):
    return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new


def parts_of(
    blocks: Sequence[Block], rules: Rules, tree: HostTree
) -> tuple[list[Part], tuple[str, ...]]:
    """Finds the parameters of blocks.

    Returns:
      A part for each block, and the paths of parameters that are in none.

    Raises:
      TypeError: for anything but blocks.
      ValueError: for a path that is not there or in two blocks, and for a scale that
        several layers of a stack share.
    """
    if not blocks or not all(isinstance(block, Block) for block in blocks):
        raise TypeError(
            f"`blocks` must be one Block or more; got {short(blocks)}. Use "
            f"cage.finetuning.blocks(function, params, pattern), or a list of "
            f"Block(function, path)."
        )
    # The tree of its own paths, in which a block's part is found.
    paths = tree.structure.unflatten(tree.arrays)
    likes = tree.structure.unflatten(
        jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x))
        for x in tree.arrays.values()
    )
    quantizers = {path: each[0] for path, each in rules.quantized(likes).items()}
    owners: dict[str, dict[int | None, Block]] = {path: {} for path in tree.arrays}
    parts = []
    for block in blocks:
        tops = (block.paths,) if isinstance(block.paths, str) else block.paths
        nodes = tuple(_node(paths, top, block) for top in tops)
        names, whole, _ = flatten_with_paths({"params": nodes})
        # One line for each quantizer, as tables of a whole model have them.
        lines: dict[Any, list[str]] = {}
        for path, name in zip(whole, names):
            _claim(owners[path], block, path)
            quantizer, inputs = quantizers.get(path), rules.match_inputs(path)
            if block.row is not None:
                _check_row(block, path, np.shape(tree.arrays[path]), quantizer)
            if quantizer or inputs:
                lines.setdefault((quantizer, inputs), []).append(re.escape(name))
        pairs = tuple(zip(whole, names))
        table = Rules(("|".join(names), *pair) for pair, names in lines.items())
        parts.append(Part(block, jax.tree.structure(nodes), pairs, table))
    return parts, tuple(path for path, taken in owners.items() if not taken)


def _node(tree, path, block):
    """Returns the part of a tree at a path of a block."""
    found = _descend(tree, path)
    if found is None:
        found = _descend(tree, "params/" + path)
    if found is None:
        raise ValueError(
            f"`blocks` must have paths of the parameters; got {path!r} of the block "
            f"{block.name}.{did_you_mean(path, jax.tree.leaves(tree))} Print "
            f"rules.report(params) to see all paths."
        )
    return found


def _descend(node, path):
    if not path:
        return node
    for key, child in tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]:
        name = name_of(key[0]) if key else None
        if name is not None and _is_in(path, name):
            found = _descend(child, path[len(name) + 1 :])
            if found is not None:
                return found
    return None


def _claim(taken, block, path):
    """Notes that a parameter is a block's; raises if it is another's too."""
    other = taken.get(block.row) or taken.get(None)
    if block.row is None and taken:
        other = next(iter(taken.values()))
    if other is not None:
        raise ValueError(
            f"`{path}`: a parameter must be in one of `blocks`; got it in {other.name} "
            f"and in {block.name}. Leave it out of one of them, or make one block of "
            f"both."
        )
    taken[block.row] = block


def _check_row(block, path, shape, quantizer):
    """Raises unless a row of a stack can be quantized by itself."""
    if not shape or not 0 <= block.row < shape[0]:
        raise ValueError(
            f"`{path}`: `row` must be one of the first axis; got {block.row} for shape "
            f"{shape}. Use cage.finetuning.blocks(..., stacked=True)."
        )
    if quantizer is None or shape[0] == 1:
        return
    found = quantizer.blocks(shape)
    divided = quantizer.scale_type.has_tensor_divisor
    heights = {found.scale_shape[0], found.tensor_shape[0] if divided else shape[0]}
    if heights != {shape[0]}:
        raise ValueError(
            f"`{path}`: a stack of layers must have scales for each layer; got "
            f"{quantizer}, whose scales several of {shape[0]} layers share. Use "
            f"cage.resolve(rules, ...), or name the axes, such as axis=-2."
        )
