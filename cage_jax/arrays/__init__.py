"""Array arithmetic that does not depend on quantizers.

It holds exact operations, rotations, shards, paths, packed codes, and the choice
between several forms of a computation.
"""
