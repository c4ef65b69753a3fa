"""Imported before everything else: torch's operators can be registered once per process.

Test runners that take a package out of ``sys.modules`` and import it again are told so.
"""

from __future__ import annotations

import sys

import torch

if "video_attn.ops" not in sys.modules and any(
    name.startswith("video_attn::") for name in torch._C._dispatch_get_all_op_names()
):
    raise ImportError(
        "video_attn was imported before in this process, and then taken out of sys.modules. Its "
        "torch operators cannot be registered a second time: keep its modules in sys.modules, or "
        "start a new process"
    )
