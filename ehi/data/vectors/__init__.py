"""Vectors in: files of embeddings, their metrics, exact neighbours and labels."""
