"""GPTQ: rounding that keeps the outputs of each product.

`gptq` runs a program over all batches in `lockstep`, finds the `matrices` of each
product, and has `parameters` rounded by `columns`.
"""
