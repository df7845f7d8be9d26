"""Trainings with few bits that were published or measured here, to go by."""

import math
from typing import NamedTuple


class Recipe(NamedTuple):
    """A training with few bits.

    Attributes:
      name: who trained what.
      pretrained: whether it began with a pretrained model.
      weights: the number of the model's weights.
      tokens: the fewest and the most tokens.
      rate: the peak of the learning rate of weights.
    """

    name: str
    pretrained: bool
    weights: float
    tokens: tuple[float, float]
    rate: float

    def factors(self, weights: float, tokens: float) -> tuple[float, float]:
        """Returns how many times as many weights and tokens others are."""
        fewest, most = self.tokens
        return weights / self.weights, tokens / min(max(tokens, fewest), most)


RECIPES = (
    Recipe(
        "QAD of NVIDIA, 49 B weights in NVFP4, by distillation, at second hand",
        *(True, 49e9, (3e8, 3e9), 1e-5),
    ),
    Recipe(
        "ParetoQ, 125 M weights of 2 to 4 bits, by cross-entropy",
        *(True, 1.25e8, (1e10, 3e10), 2e-5),
    ),
    Recipe(
        "EfficientQAT, Llama-2-7B of 2 to 4 bits, block by block (2e-5 at 2 bits)",
        *(True, 7e9, (8.4e6, 1.7e7), 1e-5),
    ),
    Recipe(
        "our study, SmolLM2-135M of 3 and 4 bits, by cross-entropy",
        *(True, 1.35e8, (24_576, 24_576), 1e-4),
    ),
    Recipe(
        "our trial of g2p-en, 0.8 M weights of 2 and 3 bits, by distillation",
        *(True, 834_890, (1e6, 2e6), 1e-3),
    ),
    Recipe(
        "our study, a language model of 0.1 M weights from scratch",
        *(False, 93e3, (2e6, 2e6), 3e-3),
    ),
    Recipe(
        "our study, a language model of 0.5 M weights from scratch",
        *(False, 4.9e5, (1e6, 1e6), 3e-3),
    ),
    Recipe(
        "the CAGE paper, a Llama of 30 M weights from scratch",
        *(False, 3e7, (3e9, 3e9), 1.2e-3),
    ),
)


def nearest(weights: float, tokens: float, pretrained: bool) -> Recipe:
    """Returns the recipe whose factors, multiplied, are the least."""

    def distance(recipe):
        return sum(abs(math.log(each)) for each in recipe.factors(weights, tokens))

    alike = [each for each in RECIPES if each.pretrained == pretrained]
    return min(alike, key=distance)
