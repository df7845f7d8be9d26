"""Quantizing arrays and trees of parameters: rules, codes, gradients, the report."""
