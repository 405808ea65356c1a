"""``unikd-data``: packs an image folder for fast reading, checks a packed store, and says what it holds."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unikd_fast.command import run_command
from unikd_fast.data.packed import PackSettings, StoreManifest, pack_folder, read_manifest, verify_store
from unikd_fast.data.packed.records import DEFAULT_QUALITY, DEFAULT_SHARD_BYTES
from unikd_fast.errors import ConfigError

_FAULTS_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Its exit code: 0; 1 if a store has faults or packing could not go on; 2 for arguments and images that do not
        fit; 130 after Ctrl-C.

    Example:
        >>> main(["pack", "/data/imagenet", "/data/imagenet-256", "--size", "256", "--workers", "16"])
        0
    """
    options = _parser().parse_args(arguments)

    def body() -> int:
        try:
            code: int = options.run(options)
        except (ValueError, FileNotFoundError, NotADirectoryError) as error:  # also a DataError of an image
            raise ConfigError(str(error)) from error
        return code

    return run_command("unikd-data", body, stopped="stopped; run the same again, finished shards are kept")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unikd-data", description="Packed stores of images, data.name = packed.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    pack = commands.add_parser(
        "pack", help="pack an image folder", description="Pack an image folder; what was interrupted goes on."
    )
    pack.add_argument("source", type=Path, help="holds train/<class>/<image> and val/<class>/<image>")
    pack.add_argument("target", type=Path, help="new or empty folder, or one that was begun")
    pack.add_argument(
        "--format",
        choices=("jpeg", "raw"),
        default="jpeg",
        help="raw: pixels, with nothing left to decode, in 5 to 20 times the room (default: %(default)s)",
    )
    pack.add_argument(
        "--size",
        type=int,
        default=0,
        help="pixels of the short side, at least those that evaluation resizes to; smaller images keep their size; "
        "0 with jpeg: the files are copied untouched (default: %(default)s)",
    )
    pack.add_argument("--quality", type=int, help=f"of JPEG, 1 to 100 (default: {DEFAULT_QUALITY})")
    pack.add_argument("--workers", type=int, default=2, help="processes; 0: this one alone (default: %(default)s)")
    pack.add_argument(
        "--shard-bytes",
        type=int,
        default=DEFAULT_SHARD_BYTES,
        help="about the size of a file, which is also what each process begins anew after an interruption "
        "(default: %(default)s)",
    )
    pack.add_argument(
        "--bad",
        choices=("error", "skip"),
        default="error",
        help="images that cannot be decoded; skip: leave them out and list them (default: %(default)s)",
    )
    pack.set_defaults(run=_pack)

    verify = commands.add_parser("verify", help="read a whole store and name every fault")
    verify.add_argument("store", type=Path)
    verify.set_defaults(run=_verify)

    info = commands.add_parser("info", help="what a store holds")
    info.add_argument("store", type=Path)
    info.set_defaults(run=_info)
    return parser


def _pack(options: argparse.Namespace) -> int:
    settings = PackSettings(options.format, options.size, options.quality, options.shard_bytes)
    manifest = pack_folder(
        options.source, options.target, settings, workers=options.workers, skip_bad=options.bad == "skip"
    )
    for name, part in manifest.splits.items():
        for path, reason in part.skipped:
            print(f"left out: {name}/{path}: {reason}", file=sys.stderr)
    print(_summary(options.target, manifest))
    return 0


def _verify(options: argparse.Namespace) -> int:
    check = verify_store(options.store)
    for fault in check.faults[:_FAULTS_SHOWN]:
        print(fault, file=sys.stderr)
    if len(check.faults) > _FAULTS_SHOWN:
        print(f"... and {len(check.faults) - _FAULTS_SHOWN} faults more", file=sys.stderr)
    print(f"{options.store}: {check.images} images are as they were packed, {len(check.faults)} faults")
    return 0 if check.ok else 1


def _info(options: argparse.Namespace) -> int:
    print(_summary(options.store, read_manifest(options.store)))
    return 0


def _summary(store: Path, manifest: StoreManifest) -> str:
    settings = manifest.settings
    kind = "raw pixels" if settings["format"] == "raw" else "files as they were"
    if settings["quality"] is not None:
        kind = f"JPEG of quality {settings['quality']}"
    size = f", short side at most {settings['size']} pixels" if settings["size"] else ""
    lines = [f"{store}: {len(manifest.class_names)} classes, {kind}{size}"]
    for name, part in manifest.splits.items():
        left_out = f", {len(part.skipped)} of {part.source_count} left out" if part.skipped else ""
        lines.append(
            f"  {name}: {part.count} images, {sum(part.shard_bytes)} bytes in {len(part.shard_bytes)} files{left_out}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
