"""Quantizing a whole program, unedited.

The product that each parameter is in, the inputs of products, products of codes, caches
of keys and values, and the report of a model.
"""
