"""Training: losses, starts, the jitted step, the loop, and encoding of corpora."""
