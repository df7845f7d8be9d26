"""Block-wise reconstruction: each block learns to return what it did before.

`blocks` finds the parts of a model, `chain` runs one after another, `programs` trains
one of them, and `reconstruct` trains all.
"""
