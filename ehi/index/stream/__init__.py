"""An index folder from shards: read -> route, count -> encode, scatter -> write."""

from ehi.index.stream.build import build_folder
from ehi.index.stream.shards import Shard

__all__ = ["Shard", "build_folder"]
