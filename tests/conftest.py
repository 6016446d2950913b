"""Every test has 16 virtual CPU devices and strict promotion."""

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("moejax", deadline=None, max_examples=20, derandomize=True)
hypothesis.settings.load_profile("moejax")
