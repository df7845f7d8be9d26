"""What is trained beside weights that are frozen in few bits.

`low_rank` makes adapters and merges them, `only_scales` trains the scales of codes,
`frozen_weights` computes a weight and its gradient from codes or from the positions of
`stores`, `adapted` makes each weight where it is used.
"""
