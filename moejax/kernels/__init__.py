"""Kernels: for each operation an api, a reference in plain jax (the oracle and the CPU backend) and its backends."""
