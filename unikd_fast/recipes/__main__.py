"""`python -m unikd_fast.recipes configs` writes every configuration of `experiments` below that folder."""

import sys
from pathlib import Path

from unikd_fast.io import make_folder, write_json
from unikd_fast.recipes.experiments import experiments


def main(folder: str) -> None:
    """Writes the files; those that are there are replaced."""
    for path, config in experiments():
        file = Path(folder) / path
        make_folder(file.parent)
        write_json(file, config)


if __name__ == "__main__":
    main(sys.argv[1])
