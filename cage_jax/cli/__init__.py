"""The command `cage-jax`.

`main` lists the commands, each in a file of its own. `command` has what they share,
`weights` makes rules of their flags, and `terminal` shows progress and errors.
"""
