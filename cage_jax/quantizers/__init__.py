"""Quantization of one array.

A `Quantizer` is a format, a scale rule, a scale type and the axes of its groups.
`presets` makes the usual ones, `registry` lists them, and `rounding` applies one.
"""
