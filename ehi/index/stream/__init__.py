"""An index folder from shards that do not fit in memory together.

build.py does the steps, shards.py reads the shards, sorting.py sorts in scratch files.
"""

from ehi.index.stream.build import build_folder
from ehi.index.stream.shards import Shard

__all__ = ["Shard", "build_folder"]
