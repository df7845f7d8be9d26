"""Arithmetic on arrays that knows nothing of quantizers.

Exact operations, rotations, shards, paths, packed codes, and the form of a computation
that a program gets.
"""
