"""How much of what a chip can multiply a train step uses (MFU).

The operations are those of the model, not of the program: rounding, CAGE and what is
computed twice do not count. So the ratio of two steps is that of their times.
"""

import math
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from sizes import Size

# bfloat16 operations a second of one chip, dense, by the makers' data sheets. A device
# is the first of these whose name is in its own.
PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def peak_of(device: str) -> float | None:
    """Operations a second of a device kind, as jax names it; None for others."""
    return next((peak for name, peak in PEAK.items() if _named(name, device)), None)


def _named(name, device):
    return re.search(rf"\b{name}\b", device) is not None


def operations(size: Size, vocabulary: int) -> int:
    """Counts a train step's operations per token: six per weight, and attention.

    Attention takes twelve times layers, width of all heads and tokens, as if it were
    not causal.

    Source: PaLM, arXiv 2204.02311, appendix B.
    """
    config = size.config(vocabulary)
    shapes = config.shapes().items()
    weights = sum(math.prod(shape) for path, shape in shapes if "kernel" in path)
    attention = 12 * config.layers * config.heads * config.head_size * size.sequence
    return 6 * weights + attention
