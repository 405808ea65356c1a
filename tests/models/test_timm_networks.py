"""Two hundred networks of timm as teachers: levels and a step of training, or a refusal that names what works."""

import pytest

pytestmark = pytest.mark.long

NAMES: list[str] = []
