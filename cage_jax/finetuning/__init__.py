"""Fine-tuning a pretrained model to few bits: what composes with CAGE and with Optax.

The pieces are functions of parameters and batches, and work with models of any
framework.

- `plan` says how to spend a budget of training tokens, as a `Plan`.
- `choose_bits` gives each parameter the bits that cost the least loss in a budget.
- `distill` makes the loss of a quantized student that learns from a teacher.
- `cache_teacher` writes the largest logits of a teacher, a `TeacherCache` reads them.
- `fisher` estimates, by squared gradients, how much the loss minds an error.
- `gptq` rounds parameters so that their products with data change little.
- `blocks` finds the layers of a model in its parameters, a `Block` each.
- `reconstruct` trains block after block to return what it does in full precision.
- `reconstruction_memory` says how many bytes that takes.
- `kl` is the loss of distillation, from all logits of a teacher or its `TopLogits`.
- `only_scales` freezes codes and gives their scales, to be trained alone.
- `low_rank` freezes weights in few bits and gives each a low-rank adapter.
- `weights` makes parameters of them, through which the adapters are trained.
- `adapted` lets a model take adapters, and makes each weight where it is used.
- `merge` makes codes of adapters and frozen weights.
"""

from cage_jax.finetuning.adapters.adapted import adapted
from cage_jax.finetuning.adapters.low_rank import low_rank, merge, weights
from cage_jax.finetuning.adapters.only_scales import only_scales
from cage_jax.finetuning.bits.choose_bits import choose_bits
from cage_jax.finetuning.bits.fisher import fisher
from cage_jax.finetuning.distillation.distill import distill
from cage_jax.finetuning.distillation.divergence import kl
from cage_jax.finetuning.distillation.teacher_cache import TeacherCache, cache_teacher
from cage_jax.finetuning.distillation.top_logits import TopLogits
from cage_jax.finetuning.gptq.gptq import gptq
from cage_jax.finetuning.planning import Plan, plan
from cage_jax.finetuning.reconstruction.blocks import Block, blocks
from cage_jax.finetuning.reconstruction.reconstruct import (
    Memory,
    Reconstructed,
    reconstruct,
    reconstruction_memory,
)

__all__ = [
    "Block",
    "Memory",
    "Plan",
    "Reconstructed",
    "TeacherCache",
    "TopLogits",
    "adapted",
    "blocks",
    "cache_teacher",
    "choose_bits",
    "distill",
    "fisher",
    "gptq",
    "kl",
    "low_rank",
    "merge",
    "only_scales",
    "plan",
    "reconstruct",
    "reconstruction_memory",
    "weights",
]
