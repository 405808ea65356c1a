"""An image folder packed into a few large files: read at the speed of the disk, decoded less or not at all.

train-00000.bin ...   images one after the other, as JPEG or as raw rows
train-index.npy       where each lies, its CRC-32 and, of raw ones, its size
train-labels.npy      its class
train-ids.npy         its position in the folder's split, on which views and caches are keyed
manifest.json         what the store was made of and how, sizes of the shards, hashes of the arrays; written last
"""

from unikd_fast.data.packed.disk import PackError
from unikd_fast.data.packed.layout import StoreManifest, read_manifest
from unikd_fast.data.packed.pack import pack_folder
from unikd_fast.data.packed.records import PackSettings
from unikd_fast.data.packed.store import load_packed
from unikd_fast.data.packed.verify import StoreCheck, verify_store

__all__ = [
    "PackError",
    "PackSettings",
    "StoreCheck",
    "StoreManifest",
    "load_packed",
    "pack_folder",
    "read_manifest",
    "verify_store",
]
