"""Build and install video-attn with the sliding tile attention kernels for Hopper.

The CPU component comes along: it costs no CUDA, and where the Hopper kernels cannot be built it is
what `tests/test_sta.py` runs on after the install.
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

from build_ext import settings

setup(**settings("cpu", "sta"))
