"""One file per backend. Importing this package fills the registry; it loads no kernel."""

from . import cpu, cuda_sage, hopper, reference, triton

__all__ = ["cpu", "cuda_sage", "hopper", "reference", "triton"]
