"""`python -m unikd_fast.recipes configs` writes every configuration of `experiments` below that folder."""

import json
import sys
from pathlib import Path

from unikd_fast.recipes.experiments import experiments


def main(folder: str) -> None:
    """Writes the files; those that are there are replaced."""
    for path, config in experiments():
        file = Path(folder) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
