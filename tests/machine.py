"""What the machine of these tests has. No conftest: of those there are several, by one name."""

from __future__ import annotations

import torch

HAS_GPU = torch.cuda.is_available()
