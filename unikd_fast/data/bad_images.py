"""Images that cannot be decoded: what takes their place, how many there may be, and who is told."""

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unikd_fast.errors import DataError

BadImages = Literal["error", "skip"]

_NAMED_IN_ERRORS = 3

_logger = logging.getLogger("unikd_fast")


class BadImage(NamedTuple):
    """A sample whose image cannot be decoded."""

    name: str
    sample_id: int
    reason: str  # the error, which names the image and the remedy


class BadImageTally:
    """Count the bad images of one pass over a split, as one process meets them, and log each file once.

    Args:
        purpose: what the pass is, for messages: "training", "val", ...
        samples: of the whole pass, over all processes.
        max_share: share of them that may be bad.
        logged: names of files already logged; this adds its own.

    Example:
        >>> tally = BadImageTally("training", samples=50_000, max_share=0.001, logged=set())
        >>> tally.add([BadImage("n01440764_10026.JPEG", 7, "cannot decode n01440764_10026.JPEG: the file is empty")])
        >>> len(tally.images)
        1
    """

    def __init__(self, purpose: str, *, samples: int, max_share: float, logged: set[str]) -> None:
        self._purpose, self._samples, self._max_share, self._logged = purpose, samples, max_share, logged
        self._images: list[BadImage] = []

    @property
    def images(self) -> tuple[BadImage, ...]:
        """Those met so far, in order."""
        return tuple(self._images)

    def add(self, images: Sequence[BadImage]) -> None:
        """Count the bad images of a batch.

        Raises:
            DataError: these are too many; see `check_bad_share`.
        """
        for image in images:
            if image.name not in self._logged:
                self._logged.add(image.name)
                _logger.warning("%s: skipped a sample: %s", self._purpose, image.reason)
        self._images += images
        names = [image.name for image in self._images[:_NAMED_IN_ERRORS]]
        check_bad_share(len(self._images), names, self._purpose, samples=self._samples, max_share=self._max_share)


def check_bad_share(count: int, names: Sequence[str], purpose: str, *, samples: int, max_share: float) -> None:
    """Hold the number of bad samples of a pass against the share of them that is allowed.

    Args:
        count: bad samples.
        names: of some of their files, the first ones.
        purpose: what the pass is.
        samples: of the whole pass.
        max_share: allowed share.

    Raises:
        DataError: there are more; the message holds both shares and the first names.

    Example:
        >>> check_bad_share(1, ["a.jpeg"], "training", samples=50_000, max_share=0.001)
    """
    if not count or count / samples <= max_share:
        return
    first = ", ".join(names[:_NAMED_IN_ERRORS]) + (", ..." if count > _NAMED_IN_ERRORS else "")
    raise DataError(
        f"{purpose}: {count} of {samples} samples cannot be decoded, a share of {count / samples:.3g}, and "
        f"data.max_bad_share allows {max_share:.3g}: {first}; repair the files or remove them, or raise "
        "data.max_bad_share"
    )


def stand_ins(good: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Tell which sample stands at each place of a batch: itself, or for a bad one the next good one, round the end.

    Args:
        good: (N,) whether each sample could be decoded; one at least could.

    Returns:
        (N,) places in the batch.

    Example:
        >>> stand_ins(np.array([True, False, False, True, False])).tolist()
        [0, 3, 3, 3, 0]
    """
    places = np.flatnonzero(good)
    return places[np.searchsorted(places, np.arange(len(good))) % len(places)]
