"""One file per backend. Importing this package fills the registry; it loads no kernel."""

from . import cpu, reference, triton

__all__ = ["cpu", "reference", "triton"]
