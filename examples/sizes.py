"""Sizes of language models, and the hyperparameters of their training."""

import dataclasses

from cage_jax.llama.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the hyperparameters of its training."""

    layers: int
    width: int
    learning_rate: float
    steps: int
    batch: int = 512
    sequence: int = 512
    microbatch: int = 32
    head_size: int = 128
    hidden_multiple: int = 256
    dtype: str = "bfloat16"

    @property
    def hidden(self) -> int:
        """Width of the SwiGLU, 8/3 of the model's, rounded up."""
        multiple = self.hidden_multiple
        return -(-8 * self.width // (3 * multiple)) * multiple

    @property
    def hadamard(self) -> int:
        """Block of the rotation: 128, or less if that does not divide the width."""
        return min(128, self.width & -self.width, self.hidden & -self.hidden)

    def config(self, vocabulary: int) -> LlamaConfig:
        """Returns the model's dimensions for that many tokens."""
        return LlamaConfig(
            vocabulary=vocabulary,
            width=self.width,
            hidden=self.hidden,
            layers=self.layers,
            heads=self.width // self.head_size,
            head_size=self.head_size,
            context=self.sequence,
        )


def _paper(layers: int, width: int, learning_rate: float, tokens: float) -> Size:
    return Size(layers, width, learning_rate, steps=round(tokens / 512**2))


# 30m to 800m are the CAGE paper's: size, learning rate, 100 tokens per parameter.
SIZES = {
    "tiny": Size(1, 64, 3e-3, 60, 8, 64, 8, 32, 64, "float32"),
    "demo": Size(2, 128, 3e-3, 2000, 8, 128, 8, 64, 128, "float32"),
    "30m": _paper(6, 640, 1.2e-3, 3e9),
    "50m": _paper(7, 768, 1.2e-3, 5e9),
    "100m": _paper(8, 1024, 6e-4, 10e9),
    "200m": _paper(10, 1280, 3e-4, 20e9),
    "430m": _paper(13, 1664, 1.5e-4, 43e9),
    "800m": _paper(16, 2048, 7.5e-5, 80e9),
}
