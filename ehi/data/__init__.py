"""Text in, token arrays out: corpora, queries and judgements; tokens; batches."""
