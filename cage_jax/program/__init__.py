"""Quantization of whole programs, without editing them.

It finds the products of parameters with data, quantizes their inputs, multiplies codes,
caches keys and values, and reports on a model.
"""
