"""The differentiable index as `flax.nnx` modules: encoder, tree, PQ leaves, joint."""
