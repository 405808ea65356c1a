"""A teacher's outputs on disk: what they were made from, how they are packed, and files that survive crashes.

Nothing here depends on networks, configurations or training.
"""

from unikd_fast.teacher.cache.codec import Codec
from unikd_fast.teacher.cache.folder import CacheFolder, CacheInfo, build_cache
from unikd_fast.teacher.cache.key import CacheKey, hash_tensors
from unikd_fast.teacher.cache.manifest import Attachment
from unikd_fast.teacher.cache.shard import CacheCheck, ShardCheck, ShardWriter

__all__ = [
    "Attachment",
    "CacheCheck",
    "CacheFolder",
    "CacheInfo",
    "CacheKey",
    "Codec",
    "ShardCheck",
    "ShardWriter",
    "build_cache",
    "hash_tensors",
]
