"""What the tests of the online teacher share."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(8, 3, 32, 32)
