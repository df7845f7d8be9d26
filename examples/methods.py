"""The compared methods: CAGE, its rivals, and free alternatives.

A method is an optimizer, and the weights at which the gradient is taken. All methods
are judged by the loss at quantized weights. Nothing is tuned: the numbers are those of
the papers or of their authors' code; comments name those that no paper states.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import jax
import optax

import cage_jax as cage
from cage_jax import contrib


class Training(NamedTuple):
    """A training run, as methods see it.

    Attributes:
      rules: which parameters are quantized, and how.
      steps: of the whole run.
      rate: the learning rate by step.
      base: the optimizer of all methods, with that learning rate.
    """

    rules: cage.Rules
    steps: int
    rate: optax.Schedule
    base: optax.GradientTransformation


def _plain(training: Training) -> optax.GradientTransformation:
    return training.base


def _straight_through(
    training: Training, params: Any, step: jax.Array, key: jax.Array
) -> Any:
    del step, key
    return cage.fake_quant(params, training.rules)


class Method(NamedTuple):
    """A method of training.

    Attributes:
      words: its name in tables.
      optimizer: maps a `Training` to an optimizer.
      weights: maps a `Training`, the parameters, the step and a key to the weights at
        which the gradient is taken.
      number: the name of the one number to tune; "" for none.
    """

    words: str
    optimizer: Callable[..., optax.GradientTransformation] = _plain
    weights: Callable[..., Any] = _straight_through
    number: str = ""

    def times(self, factor: float) -> "Method":
        """Returns the method with its number multiplied by a factor."""
        if not self.number:
            raise ValueError(f"{self.words} has no number to be tuned")
        if self.optimizer is _plain:
            return self._replace(weights=partial(self.weights, factor=factor))
        return self._replace(optimizer=partial(self.optimizer, factor=factor))


def _pulled(training, **chosen):
    return cage.decoupled(
        training.base, training.rules, learning_rate=training.rate, **chosen
    )


def _published(training, factor=1.0):
    strength = cage.silence_then_ramp(training.steps, PUBLISHED_STRENGTH * factor)
    return _pulled(training, strength=strength)


PUBLISHED_STRENGTH = 10.0
# The doses of the paper's runs are 1.6 to 2.9.
DOSE = 2.0
RECOMMENDED_DOSE = signature(cage.recommended).parameters["dose"].default
DAMPENING = 0.1


def _matched(training, factor=1.0):
    ramp = cage.ramp_to_dose(
        training.rate, training.steps, dose=DOSE * factor, silence=0.8, power=1.0
    )
    return _pulled(training, strength=ramp)


def _recommended(training, factor=1.0):
    dose = RECOMMENDED_DOSE * factor
    chosen = cage.recommended(training.rate, training.steps, dose=dose)
    return _pulled(training, **chosen)


def _dampening(training, factor=1.0):
    strength = contrib.cosine_ramp(training.steps, DAMPENING * factor)
    return optax.chain(
        contrib.dampening(training.rules, strength=strength), training.base
    )


def _lotion(training, factor=1.0):
    penalty = contrib.lotion(training.rules, strength=factor)
    return optax.chain(penalty, training.base)


def _unrounded(training, params, step, key):
    del training, step, key
    return params


def _parq(training, params, step, key, factor=1.0):
    del key
    slope = contrib.parq_schedule(training.steps, steepness=STEEPNESS * factor)(step)
    return contrib.parq(params, training.rules, slope)


STEEPNESS = 10.0
INTERPOLATED = 0.4
# The paper's K is 60,000 steps; it does not state the length of its runs.
INTERPOLATIONS = 5


def _winq(training, factor=1.0):
    every = max(1, training.steps // INTERPOLATIONS)
    share = min(1.0, INTERPOLATED * factor)
    pull = contrib.interpolation(training.rules, share, every=every)
    return optax.chain(training.base, pull)


def _noisy(training, params, step, key):
    del step
    return contrib.noisy_fake_quant(params, training.rules, key)


# Trained methods by name.
METHODS = {
    "ste": Method("straight through (STE)"),
    "cage": Method("CAGE as published", _published, number="strength"),
    "matched": Method(f"CAGE, dose {DOSE:g}", _matched, number="dose"),
    "recommended": Method("CAGE as recommended", _recommended, number="dose"),
    "dampening": Method("dampening", _dampening, number="strength"),
    "lotion": Method("LOTION", _lotion, _unrounded, number="strength"),
    "parq": Method("PARQ", weights=_parq, number="steepness"),
    "winq": Method("WinQ", _winq, _noisy, number="share of an interpolation"),
}
# Methods other than STE and CAGE as published.
RIVALS = tuple(name for name in METHODS if name not in ("ste", "cage"))
# Methods and the arms derived from other runs, for tables.
WORDS = {
    "full": "full precision",
    "ptq": "rounded after training (PTQ)",
    "ste": METHODS["ste"].words,
    "averaged": "STE, last fifth averaged",
    "ste0": "STE, learning rate to 0",
    **{name: method.words for name, method in METHODS.items()},
    "recommended0": "CAGE as recommended, learning rate to 0",
}
AVERAGED_SHARE = 0.2


def full(training: Training, params: Any, step: jax.Array, key: jax.Array) -> Any:
    """Returns full-precision weights, for runs without quantization."""
    return _unrounded(training, params, step, key)


class Trained(NamedTuple):
    """Parameters after the last step, and their mean over the last steps."""

    last: Any
    average: Any


# `(weights, params, step, key) -> gradient` by the parameters, of the loss at
# weights(params) on the step's data.
Gradient = Callable[[Callable[[Any], Any], Any, jax.Array, jax.Array], Any]


class Steps:
    """The steps of a training, one by one.

    Args:
      method: the method.
      training: the run.
      gradient: of each step.
      key: of all random numbers.
    """

    def __init__(
        self, method: Method, training: Training, gradient: Gradient, key: jax.Array
    ):
        averaged = training.steps - max(1, round(AVERAGED_SHARE * training.steps))
        averaging = contrib.averaging(1.0, start=averaged)
        self._tx = optax.chain(method.optimizer(training), averaging)
        self._method, self._training = method, training
        self._gradient, self._key = gradient, key

    def start(self, params: Any) -> Any:
        """Returns what steps advance."""
        return params, self._tx.init(params)

    def step(self, carry: Any, number: jax.Array) -> Any:
        """Does a step, of the given number from 0 on."""
        params, state = carry
        data_key, own_key = jax.random.split(jax.random.fold_in(self._key, number))

        def weights(params):
            return self._method.weights(self._training, params, number, own_key)

        gradient = self._gradient(weights, params, number, data_key)
        updates, state = self._tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def end(self, carry: Any) -> Trained:
        """Returns the parameters that came out."""
        params, state = carry
        return Trained(params, contrib.averaged(state))


def train(
    method: Method,
    training: Training,
    params: Any,
    gradient: Gradient,
    key: jax.Array,
) -> Trained:
    """Does all `Steps` in one scan, to be jitted, and mapped over seeds."""
    steps = Steps(method, training, gradient, key)

    def step(carry, number):
        return steps.step(carry, number), None

    numbers = jax.numpy.arange(training.steps)
    return steps.end(jax.lax.scan(step, steps.start(params), numbers)[0])
