"""A language model, its quantization, its loss and its optimizer."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import layout
import optax
from flax import nnx
from jax import lax
from sizes import Size

import cage_jax as cage
from cage_jax.llama.model import Llama


class LanguageModel:
    """A Llama whose layers are quantized, as functions of its parameters.

    Args:
      size: the model's dimensions.
      w_bits: of the weights of the layers, 1 to 8.
      a_bits: of the inputs of the layers, 1 to 8, or 16 for no quantization.
      kv_bits: of keys and values, 2 to 8, or None for no quantization.
      microbatch: windows at a time in `gradient`.
      seed: of the initial weights.
      vocabulary: number of tokens.
      stochastic: `loss` rounds the weights stochastically if it is given a key.
    """

    def __init__(
        self,
        size: Size,
        *,
        w_bits: int,
        a_bits: int,
        kv_bits: int | None,
        microbatch: int,
        seed: int,
        vocabulary: int = 256,
        stochastic: bool = False,
    ):
        self.size, self.microbatch, self.seed = size, microbatch, seed
        self.vocabulary = vocabulary
        weights = cage.quest(w_bits, axis=-2, hadamard=size.hadamard)
        self.rules = self._training_rules = _rules(weights)
        if stochastic:
            drawn = dataclasses.replace(weights, rounding="stochastic")
            self._training_rules = _rules(drawn)
        inputs = None
        if a_bits != 16:
            inputs = cage.quest(a_bits, hadamard=size.hadamard)
        kv = None
        if kv_bits is not None:
            # One scale per token and head.
            kv = cage.Quantizer(cage.formats.Integer(kv_bits), axis=-1)
        self.graphs = {
            quantized: nnx.graphdef(nnx.eval_shape(partial(self._model, *quantizers)))
            for quantized, quantizers in ((False, (None, None)), (True, (inputs, kv)))
        }

    def _model(self, inputs, kv):
        config, dtype = self.size.config(self.vocabulary), self.size.dtype
        rngs = nnx.Rngs(self.seed)
        return Llama(config, dtype=dtype, inputs=inputs, kv=kv, rngs=rngs)

    def initial_params(self) -> Any:
        """Returns the parameters of the seed."""
        return nnx.state(self._model(None, None), nnx.Param)

    def loss(
        self,
        params: Any,
        windows: jax.Array,
        quantized: bool,
        teacher: Any = None,
        key: jax.Array | None = None,
        weights: Callable[[Any], Any] | None = None,
    ) -> jax.Array:
        """Computes the mean cross-entropy in nats of the next token, or to the teacher.

        The weights are `weights(params)`, or the quantized ones if that is None.
        """
        if weights is not None:
            params = weights(params)
        elif quantized:
            params = cage.fake_quant(params, self._training_rules, key=key)
        if teacher is None:
            return self.cross_entropy(params, windows, quantized)
        guess = jax.nn.softmax(self._logits(teacher, windows, False))
        logits = self._logits(params, windows, quantized)
        return optax.softmax_cross_entropy(logits, guess).mean()

    def cross_entropy(
        self, weights: Any, windows: jax.Array, quantized: bool
    ) -> jax.Array:
        """Computes the mean cross-entropy of the next token.

        The weights are used as given; `quantized` says whether inputs are quantized.
        """
        logits = self._logits(weights, windows, quantized)
        targets = windows[:, 1:].astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def _logits(self, weights, windows, quantized):
        model = nnx.merge(self.graphs[quantized], weights)
        return model(windows[:, :-1].astype(jnp.int32))

    def gradient(
        self,
        params: Any,
        windows: jax.Array,
        quantized: bool,
        teacher: Any = None,
        key: jax.Array | None = None,
        weights: Callable[[Any], Any] | None = None,
    ) -> tuple[jax.Array, Any]:
        """Computes the loss and its gradient, the mean over microbatches.

        If the loss is not finite, neither is the gradient.
        """
        loss, gradients = self._gradient(
            params, windows, quantized, teacher, key, weights
        )
        finite = jnp.isfinite(loss)
        return loss, jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), gradients)

    def _gradient(self, params, windows, quantized, teacher, key, weights):
        # Microbatches are strided, so that each device of a mesh has a share of each.
        parts = windows.reshape(self.microbatch, -1, windows.shape[-1]).swapaxes(0, 1)
        loss = partial(
            self.loss, quantized=quantized, teacher=teacher, key=key, weights=weights
        )
        compute = jax.value_and_grad(loss)
        if len(parts) == 1:
            return compute(params, parts[0])

        def add(total, part):
            one = compute(params, part)
            return jax.tree.map(jnp.add, total, one), None

        zero = (jnp.zeros([]), jax.tree.map(jnp.zeros_like, params))
        total, _ = lax.scan(add, zero, parts)
        return jax.tree.map(lambda x: x / len(parts), total)

    def step(self, optimizer: optax.GradientTransformation) -> Callable:
        """Returns `((params, state), windows) -> ((params, state), loss)`, not jitted.

        The other arguments are those of `gradient`.
        """

        def step(state, windows, quantized=True, teacher=None, key=None, weights=None):
            params, before = state
            loss, gradients = self.gradient(
                params, windows, quantized, teacher, key, weights
            )
            updates, after = optimizer.update(gradients, before, params)
            return (optax.apply_updates(params, updates), after), loss

        return step

    def step_on(
        self, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation
    ) -> tuple[Any, Any]:
        """Returns `step` jitted for a mesh, and its state as abstract arrays on it."""
        state = layout.placed(jax.eval_shape(lambda: self.first_state(optimizer)), mesh)
        places = layout.shardings_of(state)
        step = self.step(optimizer)
        return jax.jit(step, donate_argnums=0, out_shardings=(places, None)), state

    def first_state(self, optimizer: optax.GradientTransformation) -> tuple[Any, Any]:
        """Returns the initial state of `step`."""
        params = self.initial_params()
        return params, optimizer.init(params)

    def optimizer(
        self,
        learning_rate: optax.Schedule,
        strength: float | Callable,
        curvature: Any = None,
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the paper's AdamW with CAGE after clipping; norms do not decay."""
        adamw = partial(
            cage.cage_adamw, rules=self.rules, strength=strength, curvature=curvature
        )
        return optimizer_of(adamw, learning_rate)


# Gradients in a row that are not finite never stop the optimizer, only the program.
_ANY_NUMBER = 2**31 - 1


def optimizer_of(
    adamw: Callable, learning_rate: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.adamw`, or `adamw` with its arguments, with the paper's settings.

    A gradient that is not finite changes nothing; the state counts these steps.
    """
    paper = optax.chain(
        optax.clip_by_global_norm(1.0),
        adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=_decays),
    )
    return optax.apply_if_finite(paper, max_consecutive_errors=_ANY_NUMBER)


def _rules(weights):
    """Returns rules that quantize the layers' matrices and nothing else."""
    return cage.Rules([(r"layers/.*/kernel", weights), (r".*", None)])


def _decays(params):
    """Returns whether each parameter decays: all but the norms and learned grids."""
    return jax.tree.map_with_path(
        lambda path, _: re.search("norm|grids", jax.tree_util.keystr(path)) is None,
        params,
    )


def learning_rate(peak: float, steps: int, floor: float) -> optax.Schedule:
    """Returns a warm-up over a tenth of the steps and a cosine decay to `floor`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=steps // 10,
        decay_steps=steps,
        end_value=floor * peak,
    )
