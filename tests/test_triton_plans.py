"""A call that was seen before starts the same kernels with the same arguments as Triton would.

Runs without a GPU: the kernels are compiled for sm_90 by Triton itself, and a driver that stands
for a GPU's writes down what it is told to start. In a process of its own, because kernels that
Triton interprets cannot be compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = '''
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from video_attn import BlockMask
from video_attn.backends import triton as backend
from video_attn.calls import BackwardCall, ForwardCall
from video_attn.device import DeviceInfo
from video_attn.kernels import plans
from video_attn.quantize import QuantizationOptions

started = []


class Launcher:
    """What Triton calls to start a kernel: grid, stream, function, metadata, hooks, arguments."""

    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, stream, function, *arguments):
        started.append((function, (x, y, z), [_said(a) for a in arguments[4:]]))


def _said(argument):
    if isinstance(argument, torch.Tensor):
        return addresses.setdefault(argument.data_ptr(), len(addresses)), argument.dtype
    return argument


class Utils:
    def load_binary(self, name, kernel, shared, device):
        return (name, f"{name} {hash(kernel)}", 0, 0, 1024)

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}


class Driver:
    launcher_cls, utils = Launcher, Utils()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7


driver.set_active(Driver())
backend.device_info = lambda device: DeviceInfo("cuda", "nvidia", "sm_90", "an H100", 132)


def tensors(offset=0, **shapes):
    """Tensors at an address that 16 divides, or not."""
    found = {}
    for name, shape in shapes.items():
        whole = torch.zeros(torch.Size(shape).numel() + 64, dtype=torch.bfloat16)
        start = -whole.data_ptr() // 2 % 8 + offset
        found[name] = whole[start : start + torch.Size(shape).numel()].view(shape)
    return found


def run(call, planned):
    """What a call starts, from its plan or as if it were the first; addresses by their order."""
    global addresses
    started.clear()
    addresses = {}
    if not planned:
        plans._plans.clear()
    made = len(plans._plans)
    run_it = backend._forward if isinstance(call, ForwardCall) else backend._backward
    run_it(call)
    assert planned == (len(plans._plans) == made), "planned or not"
    return list(started)


def check(*calls):
    """Every one of the calls, which one plan serves, starts what it would without a plan."""
    expected = [run(call, False) for call in calls]
    assert expected[0], "nothing was started"
    run(calls[0], False)
    for call, starts in zip(calls, expected, strict=True):
        assert run(call, True) == starts, (run(call, True), starts)
    print(f"{len(expected[0])} launches")


n, d = 256, 64
lists = torch.arange(4, dtype=torch.int32).expand(1, 2, 4, 4).contiguous()
lens = torch.tensor([[64, 64, 3, 64]], dtype=torch.int32)
plain = BlockMask.from_indices(lists, 64, 64, q_len=n, kv_len=n)
ragged = BlockMask.from_indices(
    lists, 64, 64, q_len=n, kv_len=n, q_block_lens=lens, kv_block_lens=lens
)
shape = {name: (1, 2, n, d) for name in ("q", "k", "v")}
codes = {"precision": "sage_fp16", "quantization": QuantizationOptions()}
for mask, options in ((None, {}), (ragged, {}), (plain, codes)):
    check(*[ForwardCall(**tensors(**shape), mask=mask, scale=0.1, **options) for _ in range(2)])
names = ("grad_out", "q", "k", "v", "out")
calls = [
    BackwardCall(
        **tensors(**dict.fromkeys(names, (1, 2, n, d))),
        lse=torch.zeros(1, 2, n), grad_lse=None, mask=ragged, scale=0.1,
    )
    for _ in range(2)
]
check(*calls)

# What decides is in the key: an odd address, another length, q being k, the scale.
first = ForwardCall(**tensors(**shape), mask=None, scale=0.1)
run(first, False)
x = tensors(**shape)["q"]
for other in (
    ForwardCall(**tensors(offset=3, **shape), mask=None, scale=0.1),
    ForwardCall(**tensors(**shape | {"q": (1, 2, n + 16, d)}), mask=None, scale=0.1),
    ForwardCall(x, x, x, mask=None, scale=0.1),
    ForwardCall(**tensors(**shape), mask=None, scale=0.2),
):
    made = len(plans._plans)
    backend._forward(other)
    assert len(plans._plans) == made + 1, other

# A mask whose lists are copied before the launch has no plan that would read the copy later.
strided = BlockMask(
    plain.kv_num_blocks, lists.repeat_interleave(2, -1)[..., ::2], 64, 64, q_len=n, kv_len=n
)
made = len(plans._plans)
backend._forward(ForwardCall(**tensors(**shape), mask=strided, scale=0.1))
assert len(plans._plans) == made
print("right")
'''


def test_plans_start_what_triton_starts():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "right"
