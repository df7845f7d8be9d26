"""Kernels for TPU and GPU.

`candidates` lists the kernels that suit an array, `tiling` says how they divide it, and
`arrays/dispatch.py` chooses one, or `jax.numpy`, for each program. The words of this
folder have one meaning each:

| word | meaning |
|---|---|
| variant | one form of a computation, for one platform; see `arrays/dispatch.py` |
| piece | a part of an array that must stay whole when devices divide it |
| group | the elements that share a scale |
| tile | 8 rows by 128 columns, in which a TPU stores an array (32 rows of bytes) |
| tiling | the division of an array into blocks and strips |
| block | what a kernel holds on the chip at once |
| strip | what it computes at once, in registers; a block is a row of strips |
| read | one run over all blocks of a group; there are two if the group is an axis |
| part | what one strip adds to the scale of a group that is longer |
| term | one of three bfloat16 numbers, whose sum is a float32 number |
"""
