"""Fine-tuning a pretrained model to few bits: what composes with CAGE and with Optax.

The pieces are functions of parameters and batches, and work with models of any
framework.

- `choose_bits` gives each parameter the bits that cost the least loss in a budget.
- `fisher` estimates, by squared gradients, how much the loss minds an error.
"""

from cage_jax.finetuning.choosing_bits import choose_bits
from cage_jax.finetuning.squared_gradients import fisher

__all__ = ["choose_bits", "fisher"]
