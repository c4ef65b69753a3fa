"""What the machine of these tests has. No conftest: of those there are several, by one name."""

from __future__ import annotations

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Of kernels that are interpreted where there is no GPU: with one, `-m gpu` means them too. Calls
# without a backend's name do not reach them on a GPU that has a better one.
ON_A_GPU_TOO = [pytest.mark.gpu] if HAS_GPU else []
