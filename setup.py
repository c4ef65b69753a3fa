"""Build and install video-attn with every native component that this machine can build."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

from build_ext import settings

setup(**settings("cpu", "sta", "vsa", "sage", "planning"))
