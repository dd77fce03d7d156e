"""Search over an index, in NumPy only.

One query goes through these files, in this order:

    search.py       check the arguments, route, score, score again, keep the best
    routing.py      which leaves a query visits, and which leaves store a document
    one_query.py    scores of one query in its leaves
    batch.py        scores of many queries that share leaves
    topk.py         the best scores, ties broken by the smaller number
    ties.py         equal documents in the order of their rows, whatever the rounding

codes.py decodes PQ codes and blas.py controls the threads and the memory of products.
"""
