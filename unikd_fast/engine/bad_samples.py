"""Training samples that were skipped because their files cannot be decoded, counted over all processes."""

from typing import Any

from unikd_fast.config import Config
from unikd_fast.data.bad_images import check_bad_share
from unikd_fast.data.loader import Loader
from unikd_fast.engine.processes import Processes

_NAMED = 5


def bad_sample_record(config: Config, loader: Loader, processes: Processes) -> dict[str, Any] | None:
    """What the metrics say at the end of an epoch, None if no sample was skipped; all processes must call it.

    After a resume in the middle of an epoch only the rest of it is counted.

    Raises:
        DataError: on every process, if all together skipped more than data.max_bad_share.
    """
    if config.data.bad_images == "error":
        return None
    names = [name for own in processes.gather([image.name for image in loader.bad_samples]) for name in own]
    if not names:
        return None
    samples = loader.schedule.samples_per_epoch
    check_bad_share(len(names), names, "training", samples=samples, max_share=config.data.max_bad_share)
    return {"skipped": len(names), "samples": samples, "files": sorted(set(names))[:_NAMED]}
