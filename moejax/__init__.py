"""moejax: train, plan and serve sparse Mixture-of-Experts transformers in JAX."""
