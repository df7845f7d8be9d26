"""Fine-tuning a pretrained model to few bits: what composes with CAGE and with Optax.

The pieces are functions of parameters and batches, and work with models of any
framework.
"""

__all__: list[str] = []
