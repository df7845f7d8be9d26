"""The stages of a fine-tuning to few bits: each piece composes with the others.

A model is first trained a little in full precision: this is the teacher, and the start
of each target. Then come GPTQ, blocks, the training of the whole model, and its scales
alone. What a stage ends with is kept, so that a run continues where it was stopped.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import layout
import numpy as np
import optax
from batches import Batches, Windows
from checkpoints import Failed, RunFolder
from rich.progress import Progress, TaskID

import cage_jax as cage
from cage_jax import llama
from cage_jax.llama.loaded import Model
from cage_jax.llama.perplexity import perplexity

Target = Literal["ct_w4a16", "q4_0", "mxfp4", "int3", "int2", "w4a4"]
TARGETS: dict[Target, str] = {
    "ct_w4a16": "INT4 in groups of 32, for transformers and vLLM",
    "q4_0": "Q4_0, embedding Q8_0, for llama.cpp",
    "mxfp4": "MXFP4 weights and inputs, for transformers and vLLM",
    "int3": "INT3 in groups of 64, for cage_jax",
    "int2": "INT2 in groups of 64, for cage_jax",
    "w4a4": "INT4 weights and inputs in rotated groups of 64, for cage_jax",
}


SCALE_RATE = 1e-3  # of a scale, in a step


class Pieces(NamedTuple):
    """The pieces of a fine-tuning.

    Attributes:
      start: what it begins with: weights that are rounded, or GPTQ's.
      blocks: train block by block before the whole model.
      distill: learn the teacher's predictions; else the text.
      cage: pull weights to their grid in the second half of the training.
      scales: train the scales alone at the end.
    """

    start: Literal["rounded", "gptq"]
    blocks: bool
    distill: bool
    cage: bool
    scales: bool


class Sizes(NamedTuple):
    """Lengths of the stages, and of a batch.

    Attributes:
      base: steps in full precision.
      steps: steps of the whole model.
      scales: steps of its scales alone.
      calibration: windows for GPTQ and for the blocks.
      epochs: passes over these windows for each block.
      batch: windows in a step.
      sequence: tokens in a window.
    """

    base: int
    steps: int
    scales: int
    calibration: int
    epochs: int
    batch: int
    sequence: int


class Recipe(NamedTuple):
    """How a model is fine-tuned.

    Attributes:
      pieces: what a fine-tuning is made of.
      sizes: its lengths.
      learning_rate: the peak, which falls in a cosine to a tenth.
      dtype: of the computation; parameters are float32.
      seed: of the order of the windows.
      save_every: steps between two checkpoints.
    """

    pieces: Pieces
    sizes: Sizes
    learning_rate: float
    dtype: str = "float32"
    seed: int = 0
    save_every: int = 50


def rules_of(target: Target) -> cage.Rules:
    """Returns the rules of a target's weights, and of their inputs."""
    weights = {
        "ct_w4a16": cage.ct_w4a16(axis=-2, group_size=32),
        "q4_0": cage.q4_0(axis=-2),
        "mxfp4": cage.mxfp4(axis=-2),
        "int3": cage.int3(axis=-2, group_size=64),
        "int2": cage.int2(axis=-2, group_size=64),
        "w4a4": cage.int4(axis=-2, group_size=64, hadamard=64),
    }
    embedding = cage.q8_0(axis=-1) if target == "q4_0" else None
    return cage.Rules(
        [
            (r"layers/.*/kernel", weights[target], inputs_of(target)),
            (r"embedding/embedding", embedding),
            (r".*", None),
        ]
    )


def inputs_of(target: Target) -> cage.Quantizer | None:
    """Returns the quantizer of the layers' inputs."""
    inputs = {"mxfp4": cage.mxfp4(), "w4a4": cage.int4(group_size=64, hadamard=64)}
    return inputs.get(target)


def without_weights(rules: cage.Rules) -> cage.Rules:
    """Returns the rules of inputs alone, for weights that are rounded already."""
    return cage.Rules([(r.pattern, None, r.inputs) for r in rules])


class Finetuning:
    """The stages of a model on a text, with what they end with in a folder.

    Args:
      model: the pretrained model.
      tokens: what it learns from.
      held_out: what judges it.
      recipe: how it is fine-tuned.
      folder: keeps checkpoints.
      bars: shows progress.
    """

    def __init__(
        self,
        model: Model,
        tokens: np.ndarray,
        held_out: np.ndarray,
        recipe: Recipe,
        folder: RunFolder,
        bars: Progress,
    ):
        self.model, self.held_out = model, held_out
        self.recipe, self.sizes = recipe, recipe.sizes
        self._folder, self._bars = folder, bars
        # A batch lies on as many devices as divide it.
        count = math.gcd(self.sizes.batch, len(jax.devices()))
        self._mesh = layout.mesh_of(jax.devices()[:count])
        self._batches = Batches(
            Windows(tokens, self.sizes.sequence),
            batch=self.sizes.batch,
            seed=recipe.seed,
            sharding=layout.batch_sharding(self._mesh),
        )

    def base(self) -> Any:
        """Trains in full precision; returns the parameters of the teacher."""
        params = jax.device_put(
            self.model.params, layout.shardings(self.model.params, self._mesh)
        )
        optimizer = self._adamw(self.recipe.learning_rate, self.sizes.base)
        loss = self._cross_entropy(cage.Rules([(r".*", None)]))
        return self._trained("base", loss, optimizer, params, self.sizes.base)

    def finetune(
        self, target: Target, teacher: Any, report: Callable[[str, Any], None]
    ) -> Any:
        """Fine-tunes the teacher to a target.

        Args:
          target: the target.
          teacher: parameters in full precision.
          report: is called with the name of each stage, and the codes after it.

        Returns:
          The tree with codes.
        """
        rules, pieces = rules_of(target), self.recipe.pieces
        params = teacher
        report("rounded", cage.quantize(params, rules))
        if pieces.start == "gptq":
            params = self._kept(
                f"{target}-start", teacher, lambda: self._gptq(target, teacher)
            )
            report("gptq", cage.quantize(params, rules))
        if pieces.blocks:
            start = params
            params = self._kept(
                f"{target}-blocks",
                teacher,
                lambda: self._reconstructed(target, teacher, start),
            )
            report("blocks", cage.quantize(params, rules))
        if self.sizes.steps:
            params = self._whole(target, teacher, params)
            report("trained", cage.quantize(params, rules))
        codes = cage.quantize(params, rules)
        if pieces.scales:
            codes = self._scaled(target, teacher, codes)
            report("scales", codes)
        return codes

    # --- stages

    def _gptq(self, target, teacher):
        return cage.gptq(
            self._logits,
            rules_of(target),
            teacher,
            self._calibration(),
            rounded=False,
            progress=self._progress(f"{target} gptq"),
        )

    def _reconstructed(self, target, teacher, params):
        found = cage.finetuning.reconstruct(
            llama.blocks(self.model.config, dtype=self.recipe.dtype),
            rules_of(target),
            params,
            self._calibration(),
            first=self._embedded,
            teacher=teacher,
            epochs=self.sizes.epochs,
            # More than its default, which is for thousands of steps of each block.
            learning_rate=self.recipe.learning_rate,
            folder=self._folder.folder / f"{target}-blocks",
            progress=self._progress(f"{target} blocks"),
        )
        return found.params

    def _whole(self, target, teacher, params):
        rules, steps = rules_of(target), self.sizes.steps
        pull = rules if self.recipe.pieces.cage else None
        optimizer = self._adamw(self.recipe.learning_rate, steps, pull)
        loss = self._loss(rules, teacher)
        return self._trained(target, loss, optimizer, params, steps)

    def _scaled(self, target, teacher, codes):
        scales, frozen = cage.finetuning.only_scales(codes)
        # Scales differ in size, and Adam's steps do not.
        optimizer = optax.chain(
            self._adamw(SCALE_RATE, self.sizes.scales),
            optax.stateless(lambda steps, own: jax.tree.map(jnp.multiply, steps, own)),
        )
        loss = jax.tree_util.Partial(
            _of_scales, self._loss(without_weights(rules_of(target)), teacher), frozen
        )
        name, steps = f"{target}-scales", self.sizes.scales
        scales = self._trained(name, loss, optimizer, scales, steps)
        return cage.finetuning.merge(scales, frozen)

    # --- parts of stages

    def _logits(self, params: Any, windows: jax.Array) -> jax.Array:
        """Predicts each token of windows but the first."""
        return llama.logits(
            params, windows[:, :-1], self.model.config, dtype=self.recipe.dtype
        )

    def _embedded(self, params, windows):
        return llama.embed(params, windows[:, :-1], dtype=self.recipe.dtype)

    def _loss(self, rules, teacher):
        """Returns `(params, windows) -> loss`, a pytree."""
        if self.recipe.pieces.distill:
            return cage.distill(self._logits, rules, teacher)
        return self._cross_entropy(rules)

    def _cross_entropy(self, rules):
        logits = cage.quantize_activations(self._logits, rules)

        def loss(params, windows):
            params = cage.fake_quant(params, rules)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits(params, windows), windows[:, 1:]
            ).mean()

        return jax.tree_util.Partial(loss)

    def _adamw(self, rate, steps, rules=None):
        rate = optax.cosine_decay_schedule(rate, steps, alpha=0.1)
        options = {"b2": 0.95, "weight_decay": 0.0}
        if rules is None:
            adamw = optax.adamw(rate, **options)
        else:
            adamw = cage.cage_adamw(rate, rules, total_steps=steps, **options)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def _calibration(self) -> list[tuple]:
        count = -(-self.sizes.calibration // self.sizes.batch)
        return [(self._batches[step],) for step in range(count)]

    def _progress(self, name: str) -> Callable[[str, int, int], None]:
        task = self._bars.add_task(name, total=None, status="")

        def progress(what, done, total):
            self._bars.update(task, completed=done, total=total, status=what)

        return progress

    def _kept(self, name: str, like: Any, make: Callable[[], Any]) -> Any:
        """Returns what a stage ended with, of this run or of the one before."""
        with self._folder.checkpoints(f"{name}-end") as end:
            if end.latest_step() is not None:
                self._bars.console.print(f"{name} was done before.")
                return end.restore(0, _abstract(like))
            params = make()
            end.save(0, params)
            end.wait()
        return params

    def _trained(self, name, loss, optimizer, params, steps) -> Any:
        """Trains from the newest checkpoint on; returns the parameters."""
        make = partial(self._steps, name, loss, optimizer, params, steps)
        params = self._kept(name, params, make)
        self._folder.forget(name)  # whose optimizer state is twice as large
        return params

    def _steps(self, name, loss, optimizer, params, steps):
        @partial(jax.jit, donate_argnums=0)
        def run(state, loss, tokens):
            params, before = state
            value, gradients = jax.value_and_grad(loss)(params, tokens)
            updates, after = optimizer.update(gradients, before, params)
            return (optax.apply_updates(params, updates), after), value

        params = jax.tree.map(jnp.copy, params)
        state = params, jax.jit(optimizer.init)(params)
        task = self._bars.add_task(name, total=steps, status="compiling")
        with self._folder.checkpoints(name) as checkpoints:
            done = checkpoints.latest_step() or 0
            if done:
                state = checkpoints.restore(done, _abstract(state))
                self._bars.console.print(f"{name} goes on from step {done}.")
            batches = self._batches.start(done)
            for number in range(done + 1, steps + 1):
                state, value = run(state, loss, next(batches))
                self._show(task, name, number, float(value))
                if number % self.recipe.save_every == 0 and number < steps:
                    checkpoints.save(number, state)
            checkpoints.wait()
        return state[0]

    def _show(self, task: TaskID, name: str, number: int, loss: float) -> None:
        self._bars.update(task, completed=number, status=f"loss {loss:.3f}")
        if not math.isfinite(loss):
            raise Failed(
                f"the loss of {name} is {loss} at step {number}. Start again in "
                f"another --out with a lower --learning-rate."
            )

    # --- judging

    def perplexity(
        self, params: Any, tokens: int | None = None, inputs: Any = None
    ) -> float:
        """Computes the perplexity of the held-out text."""
        return perplexity(
            params,
            self.held_out[:tokens],
            self.model.config,
            context=self.sizes.sequence,
            inputs=inputs,
        ).value

    def losses(self, params: Any, cut: Sequence[Any], inputs: Any) -> np.ndarray:
        """Computes the loss of each token, except the first of each window."""

        @jax.jit
        def losses(params, tokens):
            logits = llama.logits(params, tokens, self.model.config, inputs=inputs)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], tokens[:, 1:]
            )

        found = [losses(params, jnp.asarray(window[None])) for window in cut]
        return np.concatenate([np.asarray(each[0], np.float64) for each in found])


def _abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def _of_scales(loss, frozen, scales, windows):
    return loss(cage.finetuning.weights(scales, frozen), windows)
