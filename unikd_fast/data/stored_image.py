"""Where one image lies on disk: a file of its own, or a stretch of a larger one."""

from typing import NamedTuple
from zlib import crc32

from unikd_fast.errors import DataError


class StoredImage(NamedTuple):
    """One image of a data set on disk; what a decoding process is told to read.

    It holds its own path, so that decoding processes keep no list of a million files.
    """

    path: str
    offset: int = 0  # first byte
    length: int = -1  # in bytes; -1: to the end of the file
    checksum: int | None = None  # CRC-32 of these bytes, where the container stores one
    shape: tuple[int, int] | None = None  # (height, width) of raw uint8 RGB rows; None: an encoded image

    @property
    def name(self) -> str:
        """What messages call it; bytes of the path that are no UTF-8 are escaped, so that any stream can show it."""
        path = self.path.encode("utf-8", "backslashreplace").decode()
        return path if self.offset == 0 and self.length < 0 else f"{path} at byte {self.offset}"

    def read(self) -> bytes:
        """The bytes of the image.

        Raises:
            DataError: the file is missing, unreadable, too short, or not what was written; names it.

        Example:
            >>> StoredImage("n01440764_10026.JPEG").read()[:2].hex()
            'ffd8'
        """
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123  half the time of Path.open, for every image
                file.seek(self.offset)
                content = file.read(self.length)
        except OSError as error:
            raise DataError(f"cannot read {self.name}: {error.strerror}; restore the file or remove it") from error
        if len(content) < self.length:
            raise DataError(
                f"cannot read {self.name}: {self.length} bytes are expected, {len(content)} are there; the file was "
                "truncated, pack it again"
            )
        if self.checksum is not None and crc32(content) != self.checksum:
            raise DataError(
                f"cannot read {self.name}: its checksum is {self.checksum:08x} and its bytes give "
                f"{crc32(content):08x}; the file is damaged, pack it again"
            )
        return content
