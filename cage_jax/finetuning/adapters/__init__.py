"""Low-rank adapters beside weights that are frozen in few bits.

`low_rank` makes them and merges them, `frozen_weights` computes a weight and its
gradient from the positions of `stores`, `adapted` makes each weight where it is used.
"""
