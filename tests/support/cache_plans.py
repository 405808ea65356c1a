"""Sizes of a cache, made by hand."""

from unikd_fast.engine.cache_plan import CacheSizes

MIB, GIB = 2**20, 2**30
# 1000 samples in micro-batches of 50 on 2 processes: 10 for each in an epoch, of 0.4 s with the teacher, 0.1 s without.
SIZES = CacheSizes(samples=1000, views=4, view_bytes=600 * MIB, missing_bytes=2400 * MIB, free_bytes=5 * GIB)
