"""Scores of a search: measures, records, significance, figures. No jax."""
