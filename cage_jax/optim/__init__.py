"""CAGE as Optax transformations.

Schedules, curvature, statistics, placements, the fused step and ready-made optimizers.
"""
