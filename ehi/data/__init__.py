"""Corpora, queries and judgements: opened, prepared, tokenised."""
