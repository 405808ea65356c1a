"""A teacher's outputs on disk: what they were made from, how they are packed, and files that survive what happens.

Nothing here knows of networks, configurations or training.
"""

from unikd_fast.teacher.cache.attachment import Attachment
from unikd_fast.teacher.cache.build import build_cache
from unikd_fast.teacher.cache.check import CacheCheck, ShardCheck
from unikd_fast.teacher.cache.codec import Codec
from unikd_fast.teacher.cache.key import CacheKey, hash_tensors
from unikd_fast.teacher.cache.shards import CacheFolder, CacheInfo
from unikd_fast.teacher.cache.writer import ShardWriter

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
