"""Quantization of one array: formats, scale types, scale rules, presets, rounding."""
