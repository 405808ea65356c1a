"""What ``unikd-cache verify`` and ``unikd-cache info`` say about a folder; no configuration is needed for it."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from unikd_fast.engine.units import size
from unikd_fast.teacher.cache import CacheFolder
from unikd_fast.teacher.cache.writer import committed_path


def verify_folder(folder: CacheFolder, *, repair: bool) -> bool:
    """Reads a whole cache, with a bar on a terminal, and prints what is wrong with it.

    Args:
        repair: discard bad shards, so that the next build makes these anew.

    Returns:
        Whether every shard is ok; with `repair`, True: no bad shard is left, though some may not be built.

    Raises:
        CacheError: what belongs to all records is damaged, or a bad shard is being built by another process.
    """
    folder.attachment()  # raises where it is damaged: no shard is of use without it
    count, hidden = folder.info().shards, not sys.stderr.isatty()
    with tqdm(total=count, desc=str(folder.path), unit="shard", disable=hidden, leave=False) as bar:
        check = folder.verify(lambda done, _: bar.update(1))
    bad = 0
    for shard, status, records in check.faulty:
        found = "not built" if status == "missing" else status
        if status != "missing":
            bad += 1
            if repair:
                folder.discard(shard)
                found += ", discarded"
        if records:
            found += f": {len(records):,}, the first is {records[0]}"
        print(f"{committed_path(folder.path, shard).name}: {found}")
    missing = len(check.faulty) - bad
    said = f"{folder.path}: {count - len(check.faulty)} of {count} shards are ok"
    said += f", {missing} not built" if missing else ""
    said += f", {bad} {'discarded' if repair else 'bad'}" if bad else ""
    if not check.ok:
        discard = "unikd-cache verify --repair discards what is bad, then " if bad and not repair else ""
        said += f"; {discard}unikd-cache build makes what is not there"
    print(said, flush=True)
    return check.ok or repair


def folder_facts(folder: CacheFolder) -> dict[str, Any]:
    """Sizes, codec, key and builder of a cache, JSON-able.

    Raises:
        CacheError: what belongs to all records is damaged.
    """
    info, attachment = folder.info()._asdict(), folder.attachment()
    key = info.pop("key_fields")
    return {
        "folder": str(folder.path),
        **info,
        "codec": {**folder.codec.settings, "record_bytes": folder.codec.record_bytes},
        "key": key,
        "builder": None if attachment is None else attachment.record,
    }


def describe_facts(facts: dict[str, Any]) -> str:
    """What `folder_facts` gave, as text: a table, a line for every field of the key, and who built it."""
    codec = facts["codec"]
    logits = codec["kind"] if codec["top_k"] is None else f"the {codec['top_k']} largest"
    gaussians = " and Gaussians" if codec["gaussian"] else ""
    rows = [
        ("folder", facts["folder"]),
        ("stored", f"{facts['views']} views x {facts['samples']:,} samples"),
        ("shards", f"{facts['shards_done']} of {facts['shards']} are built"),
        ("size", f"{size(facts['bytes_done'])} of {size(facts['bytes_total'])} ({facts['bytes_total']:,} bytes)"),
        (
            "codec",
            f"{logits} logits of {codec['num_classes']} classes{gaussians}, {codec['record_bytes']} bytes a view",
        ),
    ]
    lines = [f"{name:<12}{text}" for name, text in rows]
    return "\n".join([*lines, *_leaves(facts["key"]), *_leaves(facts["builder"] or "nobody yet", "builder")])


def _leaves(value: Any, name: str = "") -> Iterator[str]:
    """A line for every leaf of nested names."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield f"{name}: {value if isinstance(value, str) else json.dumps(value)}"
