"""Bits for each parameter, within a budget.

`choose_bits` estimates the loss of each choice by `increases`, some of them from the
squared gradients of `fisher`, and picks by `knapsack`.
"""
