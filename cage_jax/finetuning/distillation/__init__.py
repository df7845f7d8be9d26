"""Learning from a teacher's predictions.

`distill` makes the loss, `divergence` computes it in `chunks`, and `teacher_cache`
keeps a teacher's `top_logits` on disk.
"""
