"""Quantization of arrays and of trees of parameters by path.

`rules` names the quantizers, `quantize` applies them, `straight_through` gives them a
gradient, `quantized_array` holds codes and `low_bit_dot` multiplies them, and
`weight_report` says what becomes of each parameter.
"""
