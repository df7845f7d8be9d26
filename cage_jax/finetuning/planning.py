"""A plan for a budget of training tokens, in words and numbers."""

import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import jax
import optax

from cage_jax.arrays.checks import check_choice, check_int, check_number, is_int, warn
from cage_jax.arrays.names import names_checked
from cage_jax.core.quantized_array import check_no_codes
from cage_jax.core.rules import Rules
from cage_jax.finetuning.published_recipes import Recipe, nearest
from cage_jax.optim.recommended import LEAST_DOSE, likely_dose
from cage_jax.program.tracing import split_grids

# arXiv 2509.22935: what its law was fitted to, and its one constant.
_LAW = 6.7297
_LAW_WEIGHTS, _LAW_TOKENS, _LAW_BITS = (8.6e7, 2.2e9), (2.3e9, 1.4e12), (1, 6)
# The share that was usual before, and the least that it saw.
_LEAST_SHARE = 0.1
_FLOOR = 0.1  # of the learning rate, as a share of its peak
_STEPS = 1000  # to aim at
_MOST_STEPS = 10**7  # whose learning rates still fit in memory
_TOKENS_PER_STEP = (256, 262_144)  # of our SmolLM2, and of the CAGE paper
_NOTHING = 0.01  # a dose at which CAGE did nothing
_NEAR = 3  # times a recipe's weights or tokens
_FEW_TOKENS = 1e6
_GB = 1e9


class Memory(NamedTuple):
    """Memory of a training in GB, of 10^9 bytes, without activations."""

    parameters: float
    gradients: float
    adam: float
    teacher: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to spend a budget of training tokens; `print` it.

    Attributes:
      weights: number of the model's weights.
      tokens: number of tokens to train with.
      bits: bits of a code.
      pretrained: whether the model is.
      tokens_per_byte: S, tokens for each byte of codes.
      law: the share of a training from scratch that the law would quantize; 0 where it
        has no value.
      share: the share of these tokens to train quantized.
      learning_rate: its peak.
      recipe: the nearest published or measured training.
      steps: quantized optimizer steps.
      dose: that of `cage.recommended` in these steps, for errors of usual size.
      memory: in GB.
      pieces: what to do, in order.
      remarks: what is extrapolated or was not measured.
    """

    weights: int
    tokens: float
    bits: float
    pretrained: bool
    tokens_per_byte: float
    law: float
    share: float
    learning_rate: float
    recipe: Recipe
    steps: int
    dose: float
    memory: Memory
    pieces: tuple[str, ...]
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        start = "a pretrained model" if self.pretrained else "from scratch"
        law = f"{self.law:.1%} at {self.tokens_per_byte:.3g} tokens a byte"
        quantized = (
            f"all tokens, in {self.steps} steps; what comes before is done. (Of a "
            f"training from scratch with these tokens, the law would quantize {law})"
            if self.pretrained
            else f"the last {self.share:.0%} of the tokens, in {self.steps} steps. "
            f"(The law says {law})"
        )
        memory = ", ".join(
            f"{name} {size:.3g}" for name, size in self.memory._asdict().items() if size
        )
        return "\n".join(
            [
                f"{self.weights:.3g} weights of {self.bits:g} bits, {self.tokens:.3g} "
                f"tokens, {start}",
                f"quantized: {quantized}",
                f"learning rate: {self.learning_rate:g} at its peak, to a tenth. "
                f"Nearest: {self.recipe.name}, {self.recipe.rate:g}",
                f"CAGE: {_cage_in_words(self.dose)}",
                f"memory: {self.memory.total:.3g} GB ({memory}), and activations",
                *(f"{i}. {piece}" for i, piece in enumerate(self.pieces, 1)),
                *(f"- {remark}" for remark in self.remarks),
            ]
        )


@names_checked
def plan(
    tokens: float,
    params: Any,
    bits: float,
    *,
    pretrained: bool = True,
    learning_rate: float | None = None,
    tokens_per_step: int | None = None,
    show: bool = True,
) -> Plan:
    """Plans how to spend a budget of training tokens on a model of few bits.

    It is advice, and says how far it is extrapolated: a formula and a table of
    trainings that were published or measured here, of which the nearest in weights and
    tokens gives the learning rate.

    Args:
      tokens: how many tokens there are to train with.
      params: the parameters, their shapes, or the number of weights.
      bits: bits of a code.
      pretrained: whether the model is pretrained. Then all tokens are trained
        quantized; otherwise the last ones, as many as the law says, and at least a
        tenth.
      learning_rate: its peak; None for that of the nearest training. It decays to a
        tenth by a cosine.
      tokens_per_step: None for as many as make 1000 steps, from 256 to 262,144, or
        more for 10^7 steps at most.
      show: whether the plan is printed.

    Returns:
      A `Plan`. Warns if CAGE will hardly act at this learning rate, in these steps.

    Raises:
      TypeError, ValueError: for arguments out of range.

    Example:
      >>> import cage_jax as cage
      >>> found = cage.plan(3e9, 30_000_000, 4, pretrained=False, show=False)
      >>> round(found.share, 3), found.learning_rate, found.steps, round(found.dose, 2)
      (0.281, 0.0012, 3213, 0.7)

    Source: `f = exp(-6.7297 / ln S)`, S = tokens / (weights * bits / 8), of
    arXiv 2509.22935, read at second hand; the other figures in benchmarks/quality and
    in `cage_jax.finetuning.published_recipes`.
    """
    check_number("tokens", tokens, "Use 1e9.", least=1)
    check_number("bits", bits, "Use 4.", above=0, most=16)
    check_choice("pretrained", pretrained, (True, False))
    weights, width = _size(params)
    recipe = nearest(weights, tokens, pretrained)
    rate = recipe.rate if learning_rate is None else learning_rate
    check_number("learning_rate", rate, "Use 1e-5, or None.", above=0)
    fewest, most = _TOKENS_PER_STEP
    least = math.ceil(tokens / _MOST_STEPS)
    usual = max(int(min(max(tokens // _STEPS, fewest), most)), least)
    if tokens_per_step is None:
        tokens_per_step = usual
    check_int("tokens_per_step", tokens_per_step, f"Use {usual}.", least=max(least, 1))
    per_byte = tokens / (weights * bits / 8)
    law = math.exp(-_LAW / math.log(per_byte)) if per_byte > 1 else 0.0
    share = 1.0 if pretrained else max(law, _LEAST_SHARE)
    steps = max(round(share * tokens / tokens_per_step), 1)
    acts = _dose(rate, steps)
    if acts < LEAST_DOSE:
        warn(f"CAGE: {_cage_in_words(acts)}")
    teacher = 2 * weights if pretrained else 0  # in bfloat16
    found = Plan(
        weights,
        tokens,
        bits,
        pretrained,
        per_byte,
        law,
        share,
        rate,
        recipe,
        steps,
        acts,
        Memory(*(each / _GB for each in (width, width, 2 * width, teacher))),
        _pieces(bits, tokens, pretrained, acts),
        _remarks(weights, tokens, bits, pretrained, law, recipe),
    )
    if show:
        print(found)
    return found


def _size(params) -> tuple[int, int]:
    """Returns the number of weights, and of their bytes."""
    if is_int(params) or isinstance(params, float):
        check_number("params", params, "Use the number of weights.", least=1)
        return int(params), 4 * int(params)
    check_no_codes(params=params)
    params, _ = split_grids(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = Rules([(".*", None)]).report(params)
    weights = sum(row.size for row in report.rows)
    if not weights:
        raise ValueError("`params` must have weights; got none. Use their number.")
    return weights, report.bytes_before


def _dose(rate, steps) -> float:
    schedule = optax.cosine_decay_schedule(rate, steps, _FLOOR)
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies ints and floats
        return likely_dose(schedule, steps)


def _cage_in_words(dose) -> str:
    if dose >= LEAST_DOSE:
        return (
            f"a dose of {dose:.2g}, by total_steps. Gains were seen from about "
            f"{LEAST_DOSE:g} on, most at 2 bits; compare with the free ones"
        )
    does = "do nothing" if dose < _NOTHING else "hardly act"
    return (
        f"it will {does} at this learning rate, in these steps: its dose is "
        f"{dose:.2g}, and gains were seen from about {LEAST_DOSE:g} on. Train "
        f"{LEAST_DOSE / dose:.2g} times as many steps, or leave it out"
    )


def _pieces(bits, tokens, pretrained, dose) -> tuple[str, ...]:
    """Returns what to do, in order."""
    free = "free: a learning rate that decays to 0, or the mean of the last fifth"
    beside = "; then CAGE beside them, at a rate that ends at a tenth"
    last = (free + beside if dose >= LEAST_DOSE else free, "codes: cage.quantize")
    if not pretrained:
        return (
            "full precision at first",
            "cage.fake_quant to the end. The law's paper lets the learning rate decay "
            "only now",
            *last,
        )
    if bits >= 6:
        return (
            "round to nearest, cage.quantize, and measure: with g2p-en at 8 bits there "
            "was nothing to gain (cross-entropy .2291, rounded .2293)",
            "only if the loss rose, cage.distill",
        )
    found = ["bits where they cost least: cage.choose_bits"]
    found.append(
        "a better start than rounding: cage.gptq(..., rounded=False), by some hundred "
        "sequences"
    )
    if bits < 3.5:
        found.append(
            "block by block, cage.finetuning.reconstruct: weights at 1e-5 (2e-5 at 2 "
            "bits), scales at 1e-4, 8 M tokens in EfficientQAT"
        )
    if tokens < _FEW_TOKENS:
        found.append(
            "scales alone, cage.finetuning.only_scales, by cage.distill: so few tokens "
            "say little about each weight"
        )
    else:
        found.append("all weights: cage.distill, from the full-precision model")
    return (*found, *last)


def _remarks(weights, tokens, bits, pretrained, law, recipe) -> tuple[str, ...]:
    """Returns what is extrapolated, and what was not measured."""
    found = []
    for what, factor in zip(("weights", "tokens"), recipe.factors(weights, tokens)):
        if not 1 / _NEAR <= factor <= _NEAR:
            found.append(
                f"the learning rate is extrapolated: {factor:.2g} times the {what} of "
                f"the nearest training. Try a third and three times of it"
            )
    limits = (
        (weights, _LAW_WEIGHTS, "weights"),
        (tokens, _LAW_TOKENS, "tokens"),
        (bits, _LAW_BITS, "bits"),
    )
    beyond = [name for x, (low, high), name in limits if not low <= x <= high]
    if beyond and not pretrained:
        found.append(f"the law is extrapolated in {' and '.join(beyond)}")
    if law < _LEAST_SHARE and not pretrained:
        found.append(
            f"the law says less than the {_LEAST_SHARE:.0%} and more of its "
            f"experiments, and that was usual before: {_LEAST_SHARE:.0%} is taken"
        )
    if pretrained and bits < 6:
        found.append(
            "the order of the pieces is that of published recipes, and was not "
            "measured as a whole here"
        )
    return tuple(found)
