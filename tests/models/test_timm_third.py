"""The third third of timm's networks as teachers; three files, so that processes share them."""

import pytest

from support.timm_networks import NAMES, check_levels_and_a_step

pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", NAMES[2::3])
def test_levels_and_a_step(name: str) -> None:
    check_levels_and_a_step(name)
