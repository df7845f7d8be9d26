"""Kernels for TPU and GPU, and where they take the place of `jax.numpy`."""
