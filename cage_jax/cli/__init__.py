"""The command `cage-jax`."""
