"""Kernels for TPU and GPU, and the choice between them and `jax.numpy`."""
