"""Jointly learned retrieval indexes: encoder, tree and PQ leaves under one loss.

The flow, and where each step lives::

    config      experiments/configs/*.py, experiments/systems.py
      -> data         ehi/data      text in, token arrays out           (no jax)
      -> encoder      ehi/model/tower.py, transformer.py, pretrained.py
      -> tree         ehi/model/tree.py, routers.py     soft routing to B^H leaves
      -> pq leaves    ehi/model/rotation.py, pq.py      straight-through codes
      -> model        ehi/model/joint.py    encoder + tree + leaves
      -> starts       ehi/train/kmeans.py, opq.py       fits before the first step
      -> losses       ehi/train/losses.py, tree_losses.py, vector_losses.py
      -> objective    ehi/train/objective.py, objective.py  their weighted sum
      -> train step   ehi/train/step.py, optimizer.py   one jitted step, all the above
      -> loop         ehi/train/loop.py     phases, mining, checkpoints
      -> index        ehi/index     a folder of NumPy arrays            (NumPy only)
      -> search       ehi/index/search/search.py   beam search, no jax
      -> eval         ehi/eval      metrics, records, significance
      -> tables       experiments/tables.py

The alphabet of shapes, used in every trailing comment:

    N batch, or number of rows     L tokens of a text        V vocabulary
    T width of the tower           D width of an embedding   C candidate documents
    H height of the tree           B branching factor        P = B^H leaves
    M subspaces                    K codewords (16 or 256)   S = D / M
    k results                      b beam width              s leaves of a document
"""

__version__ = "0.1.0"
