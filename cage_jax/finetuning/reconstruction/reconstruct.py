"""Block-wise reconstruction: each block is trained to return what it did before."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cage_jax.arrays.checks import check_callable, check_int, check_number
from cage_jax.arrays.names import names_checked
from cage_jax.core.rules import Rules
from cage_jax.finetuning.batches import Progress, checked_batches
from cage_jax.finetuning.reconstruction.blocks import Block
from cage_jax.finetuning.reconstruction.chain import Chain, Link, nbytes
from cage_jax.finetuning.reconstruction.programs import joined, split
from cage_jax.finetuning.run_folder import Digest, RunFolder

Optimizer = Callable[[Rules, int], optax.GradientTransformation]

# EfficientQAT's numbers; the second rate is for 2 bits and less.
_RATE, _RATE_OF_FEW_BITS, _RATE_OF_GRIDS = 1e-5, 2e-5, 1e-4
_LAST_SHARE, _LARGEST_NORM = 1 / 20, 0.3


class Reconstructed(NamedTuple):
    """The result of `reconstruct`.

    Attributes:
      params: what was given as `params`, trained; not rounded.
      errors: the relative squared error of each block's output over all batches, before
        and after training, by the block's name: what is lost in all blocks so far.
      elsewhere: the paths of parameters in no block, which were left as they are.
    """

    params: Any
    errors: dict[str, tuple[float, float]]
    elsewhere: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{name}: {before:.4g} -> {after:.4g}"
            for name, (before, after) in self.errors.items()
        ]
        lines.append(f"in no block: {', '.join(self.elsewhere) or 'nothing'}")
        return "\n".join(lines)


class Memory(NamedTuple):
    """The bytes that `reconstruct` takes beside `params` and `teacher`.

    Attributes:
      streams: on the host: the inputs and the targets of one block, for all batches.
      params: on the device: parameters and grids of the largest block, and their
        gradients.
      optimizer: on the device: the optimizer's state of that block.
      batch: on the device: inputs and targets of one batch. The values that the block
        itself keeps for its gradient come on top.
    """

    streams: int
    params: int
    optimizer: int
    batch: int

    def __str__(self) -> str:
        streams, params, optimizer, batch = (f"{n / 1e6:.4g} MB" for n in self)
        return (
            f"host: {streams} of activations; device: {params} of parameters and "
            f"gradients, {optimizer} of optimizer state, {batch} of a batch, and what "
            f"one block keeps for its gradient"
        )


@names_checked
def reconstruct(
    blocks: Sequence[Block],
    rules: Rules,
    params: Any,
    batches: Iterable[tuple],
    *,
    first: Callable | None = None,
    teacher: Any = None,
    epochs: int = 2,
    learning_rate: float | None = None,
    grid_learning_rate: float = _RATE_OF_GRIDS,
    optimizer: Optimizer | None = None,
    stream_dtype: jax.typing.DTypeLike | None = None,
    folder: Any = None,
    progress: Progress | None = None,
) -> Reconstructed:
    r"""Trains each block of a quantized model to return what it does in full precision.

    Blocks are trained one after another, in the memory of one. The inputs of a block
    come from the quantized blocks before it. Its target is the teacher's output, in a
    model that is in full precision from the first block on. So a block learns to undo
    errors of the blocks before it. All its floats are trained, and its learned grids,
    on the mean squared error of its output, with weights as in `fake_quant`, and inputs
    as in `quantize_activations` if the rules have such. A block whose error on all
    batches did not fall is left as it was. In a second stage EfficientQAT trains the
    grids alone, on the loss of the whole model.

    Args:
      blocks: the blocks in the order of the model, from `cage.finetuning.blocks` or
        `cage.llama.blocks`. Equal ones are compiled once.
      rules: the rules for the paths of the whole model.
      params: the parameters, where training starts: those of the teacher, the values of
        codes such as `dequantize(codes)`, or what `with_grids` made of either. In
        float32: bfloat16 loses steps of 1e-5.
      batches: the arguments of `first` after the parameters, a tuple for each batch; of
        equal shapes, so that there is one program. They are walked once. Each epoch has
        their order.
      first: `first(params, *batch) -> x`, the input of the first block, such as
        embedded tokens. It is not trained; its weights are quantized if the rules say
        so, its inputs are not. None if the batches are the inputs.
      teacher: parameters in full precision; None for `params`.
      epochs: passes over the batches, for each block.
      learning_rate: AdamW's at the start, for parameters; it falls in a cosine to 1/20.
        None for 1e-5, for blocks with weights of 2 bits or less 2e-5. Small models can
        take more.
      grid_learning_rate: the same for learned grids.
      optimizer: `optimizer(rules, total_steps)`, another Optax transformation for each
        block, such as `lambda rules, n: cage_adamw(1e-5, rules, total_steps=n)`; it
        gets the rules by the paths in that block. None for AdamW without decay, with
        gradients clipped at the norm 0.3.
      stream_dtype: dtype in which activations are kept between blocks, such as
        bfloat16; None for that of the model.
      folder: a folder for finished blocks. If a run was stopped, the same call goes on
        after the last one, with equal results; the activations are computed again.
        Functions and optimizers are not compared: others need another folder.
      progress: called with what is done, how much of it, and of how much.

    Returns:
      A `Reconstructed`: its `params` have the form, dtypes and devices of `params`, the
      other fields say what was gained and what was left.

    Raises:
      TypeError: for anything but blocks, rules and tuples as batches; for codes.
      ValueError: for a learning rate beside an optimizer; for a path that does not
        exist or is in two blocks; for a block that cannot take what the one before
        returns; if no block has anything to quantize; for NaN and infinities in the
        inputs, an output or a loss; for a folder of another call; for a block without
        floats in its output, and for stacked layers that share a scale.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> import jax.numpy as jnp
      >>> def layer(params, x):
      ...     return x + jnp.tanh(x @ params["w"])
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> weights = [jax.random.normal(key, (16, 16)) / 4 for key in keys[1:]]
      >>> params = {"layers": [{"w": w} for w in weights]}
      >>> batches = [(x,) for x in jax.random.normal(keys[0], (8, 32, 16))]
      >>> rules = cage.Rules([(r".*w", cage.lsq(3, axis=-2))])
      >>> found = cage.finetuning.reconstruct(
      ...     cage.finetuning.blocks(layer, params, r"layers/\d+"),
      ...     rules,
      ...     cage.with_grids(params, rules),
      ...     batches,
      ...     learning_rate=3e-3,
      ...     grid_learning_rate=3e-3,
      ... )
      >>> [after < before for before, after in found.errors.values()]
      [True, True]

    Source: EfficientQAT, arXiv 2407.11062, Block-AP. Its program takes the arguments
    `--clip_grad 0.3` and never clips in this stage.
    """
    check_int("epochs", epochs, "Use 2.", least=1)
    if learning_rate is not None:
        check_number("learning_rate", learning_rate, "Use 1e-5.", above=0)
        if optimizer is not None:
            raise ValueError(
                f"`learning_rate` must not come with an `optimizer`; got "
                f"{learning_rate} and one. Give the rate to that one alone."
            )
    check_number("grid_learning_rate", grid_learning_rate, "Use 1e-4.", above=0)
    if optimizer is not None:
        remedy = "Use optimizer=lambda rules, total_steps: optax.adam(1e-5)."
        check_callable("optimizer", optimizer, remedy)
    chain = Chain(blocks, rules, params, teacher, first, stream_dtype)
    digest = None if folder is None else Digest()
    streams = chain.streams(batches, digest)
    total = epochs * len(streams.inputs)

    def adamw_or_other(part):
        if optimizer is not None:
            return optimizer(part.rules, total)
        return _adamw(part.bits, total, learning_rate, grid_learning_rate)

    links = chain.links(streams.like, adamw_or_other)
    run: dict[str, Any] = {}
    if folder is not None:
        settings = epochs, learning_rate, grid_learning_rate, optimizer is None
        run = chain.described() | {"batches": str(digest), "settings": settings}
    kept, say = RunFolder(folder, run), progress or _silent
    errors = {}
    for number, link in enumerate(links):
        train = functools.partial(_train, link, streams, epochs, say)
        name = link.part.block.name
        errors[name] = _advance(chain, link, streams, train, kept, f"block{number}")
        say("blocks", number + 1, len(links))
    return Reconstructed(chain.student.tree(), errors, chain.elsewhere)


@names_checked
def reconstruction_memory(
    blocks: Sequence[Block],
    rules: Rules,
    params: Any,
    batches: Iterable[tuple],
    *,
    first: Callable | None = None,
    optimizer: Optimizer | None = None,
    stream_dtype: jax.typing.DTypeLike | None = None,
) -> Memory:
    """Computes the bytes that `reconstruct` will take; nothing is run.

    Args:
      blocks, rules, first, optimizer, stream_dtype: as in `reconstruct`.
      params: as there; arrays or their shapes (`jax.ShapeDtypeStruct`).
      batches: as there; arrays or their shapes.

    Raises:
      TypeError, ValueError: as in `reconstruct`, for blocks, paths and shapes.

    Example:
      >>> import cage_jax as cage
      >>> import jax
      >>> def layer(params, x):
      ...     return x @ params["w"]
      >>> like = jax.ShapeDtypeStruct((8, 256, 256), "float32")
      >>> params = {"layers": {"w": like}}
      >>> blocks = cage.finetuning.blocks(layer, params, "layers", stacked=True)
      >>> rules = cage.Rules([(r".*w", cage.int4(axis=-2))])
      >>> batches = [(jax.ShapeDtypeStruct((32, 256), "float32"),)] * 100
      >>> cage.finetuning.reconstruction_memory(blocks, rules, params, batches)
      Memory(streams=6553600, params=524288, optimizer=524304, batch=65536)
    """
    chain = Chain(blocks, rules, params, None, first, stream_dtype)

    def adamw_or_other(part):
        return (
            optimizer(part.rules, 1) if optimizer else _adamw(part.bits, 1, None, 1.0)
        )

    streams = batch = held = state = 0
    links: dict[str, list[Link]] = {}
    for each in checked_batches(batches):
        x = chain.shape_of_inputs(each)
        key = str(x)
        if key not in links:
            links[key] = chain.links(x, adamw_or_other)
        size = 2 * max(chain.stream_bytes(link.inputs) for link in links[key])
        streams, batch = streams + size, max(batch, size)
    for link in next(iter(links.values())):
        floats, rest = split(chain.student.read(link.part))
        held = max(held, 2 * nbytes(floats) + nbytes(rest))
        state = max(state, nbytes(jax.eval_shape(link.programs.start, floats)))
    return Memory(streams, held, state, batch)


def _advance(chain, link, streams, train, kept, file):
    """Trains a block, or reads it, and moves both streams behind it.

    Returns:
      The relative squared error of its output, before and after.
    """
    params = jax.device_put(chain.teacher.read(link.part)["params"])
    for i, x in enumerate(streams.targets):
        streams.targets[i] = chain.kept(link.programs.target(params, x))
    del params  # one copy of the block less in training
    floats, rest = split(chain.student.read(link.part))
    rest = jax.device_put(rest)
    measure = functools.partial(_measure, chain, link, streams, rest)
    structure: Any
    leaves, structure = jax.tree.flatten(floats)
    found = kept.read(file, [*leaves, np.zeros(2)])
    if found is None:
        before = after = measure(floats)
        if link.part.rules:
            trained = train(floats, rest)
            if (reached := measure(trained)) < before:
                floats, after = jax.device_get(trained), reached
        kept.write(file, [*jax.tree.leaves(floats), np.array([before, after])])
    else:
        *leaves, (before, after) = found
        floats = structure.unflatten(leaves)
    measure(floats, forward=True)
    chain.student.write(link.part, joined(floats, rest))
    return float(before), float(after)


def _measure(chain, link, streams, rest, floats, forward=False):
    """Computes the relative squared error; with `forward`, moves the inputs too."""
    name, total, size = link.part.block.name, 0.0, 0.0
    floats = jax.device_put(floats)
    for i, (x, target) in enumerate(zip(*streams[:2])):
        x, error, square = link.programs.output(floats, rest, x, target)
        parts = {"full-precision": float(square), "quantized": float(error)}
        for which, number in parts.items():
            if not math.isfinite(number):
                raise ValueError(
                    f"`blocks`: {name} must return finite numbers; got NaN or infinity "
                    f"of the {which} block in batch {i}. Look for it in its function "
                    f"or its parameters, lower the learning rate, or compute in "
                    f"float32."
                )
        total, size = total + parts["quantized"], size + parts["full-precision"]
        if forward:
            streams.inputs[i] = chain.kept(x)
    return total / max(size, 1e-30)


def _train(link, streams, epochs, say, floats, rest):
    """Trains a block on its inputs and targets."""
    name, count = link.part.block.name, len(streams.inputs)
    floats = jax.tree.map(jnp.array, floats)  # copied, because steps donate
    state = link.programs.start(floats)
    for epoch in range(epochs):
        losses = []
        for i, (x, target) in enumerate(zip(*streams[:2])):
            floats, state, loss = link.programs.step(floats, state, rest, x, target)
            losses.append(loss)
            say(name, epoch * count + i + 1, epochs * count)
        # Read once an epoch, so that devices need not wait for this program.
        wrong = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if wrong:
            raise ValueError(
                f"`blocks`: the loss of {name} must be finite; got "
                f"{float(losses[wrong[0]])} at step {epoch * count + wrong[0] + 1}. "
                f"Lower the learning rate, or compute in float32."
            )
    return floats


def _adamw(bits, total, rate, rate_of_grids):
    """Makes EfficientQAT's optimizer."""
    if rate is None:
        few = bits is not None and bits <= 2
        rate = _RATE_OF_FEW_BITS if few else _RATE

    def adamw(rate):
        schedule = optax.cosine_decay_schedule(rate, total, alpha=_LAST_SHARE)
        return optax.adamw(schedule, weight_decay=0.0)

    return optax.chain(
        optax.clip_by_global_norm(_LARGEST_NORM),
        optax.partition(
            {"params": adamw(rate), "grids": adamw(rate_of_grids)},
            {"params": "params", "grids": "grids"},
        ),
    )


def _silent(*_):
    pass
