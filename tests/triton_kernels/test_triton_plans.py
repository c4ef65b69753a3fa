"""A call that was seen before starts the same kernels with the same arguments as Triton would.

Runs without a GPU: the kernels are compiled for sm_90 by Triton itself, and ``fake_gpu`` writes
down what is started. In a process of its own, because kernels that Triton interprets cannot be
compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from video_attn.cli import main
from video_attn.tools import warmup

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = '''
import fake_gpu
import torch

from video_attn import BlockMask
from video_attn.backends import triton as backend
from video_attn.backends.triton_blocks import BLOCK_OPS
from video_attn.calls import BackwardCall, ForwardCall
from video_attn.kernels import plans
from video_attn.kernels.launch import Side
from video_attn.quantize import QuantizationOptions

fake_gpu.install()


def tensors(offset=0, **shapes):
    return {name: fake_gpu.tensor(*shape, offset=offset) for name, shape in shapes.items()}


def run(call, planned):
    """What a call starts, from its plan or as if it were the first; addresses by their order."""
    fake_gpu.forget()
    if not planned:
        plans._plans.clear()
    made = len(plans._plans)
    run_it = backend._forward if isinstance(call, ForwardCall) else backend._backward
    run_it(call)
    assert planned == (len(plans._plans) == made), "planned or not"
    return list(fake_gpu.started)


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

# Likewise for the coarse branch: the number that weighs it.
side = Side(64, n, None)
out, coarse = fake_gpu.tensor(1, 2, n, d), fake_gpu.tensor(1, 2, n // 64, d)
for gate in (0.3, 0.7):
    made = len(plans._plans)
    BLOCK_OPS.add_coarse(out, coarse, gate, side)
    assert len(plans._plans) == made + 1, gate

# A mask whose lists are copied before the launch has no plan that would read the copy later.
strided = BlockMask(
    plain.kv_num_blocks, lists.repeat_interleave(2, -1)[..., ::2], 64, 64, q_len=n, kv_len=n
)
made = len(plans._plans)
backend._forward(ForwardCall(**tensors(**shape), mask=strided, scale=0.1))
assert len(plans._plans) == made
print("right")
'''


def run_compiled(script: str, *arguments: str, **environment: str) -> str:
    """What a script prints, in a process of its own where Triton compiles."""
    pytest.importorskip("triton")
    paths = [str(ROOT / "tests"), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    variables.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_plans_start_what_triton_starts():
    assert run_compiled(SCRIPT).splitlines()[-1] == "right"


WARMED = """
import sys

import fake_gpu

from video_attn.backends import triton as backend
from video_attn.calls import ForwardCall

fake_gpu.install()
q, k, v = (fake_gpu.tensor(2, 4, 768, 32) for _ in range(3))
backend._forward(ForwardCall(q, k, v, mask=None, scale=0.1))
assert len(fake_gpu.started) == 1
"""


def test_warmup_compiles_what_a_call_needs(tmp_path):
    """Other batches, heads and lengths find their kernel on disk, and a second warmup finds all."""
    command = "import sys; from video_attn.cli import main; sys.exit(main())"
    options = ["warmup", "--arch", "sm_90", "--head-dim", "32", "--pattern", "dense"]
    options += ["--forward-only", "--jobs", "1"]
    printed = run_compiled(command, *options, TRITON_CACHE_DIR=str(tmp_path))
    assert "forward, dense" in printed and "s in all, for sm_90" in printed
    kernels = sorted(tmp_path.rglob("*.cubin"))
    assert len(kernels) == 1
    run_compiled(command, *options, TRITON_CACHE_DIR=str(tmp_path))
    run_compiled(WARMED, TRITON_CACHE_DIR=str(tmp_path))
    assert sorted(tmp_path.rglob("*.cubin")) == kernels


def test_warmup_compiles_for_rows_that_follow_one_another_and_for_others():
    """Where a row of the table is packed there are two kernels; elsewhere one serves all."""
    dense = ("dense", torch.bfloat16, 128, 128, 1, 6144, None, False, "native")
    for arch, expected in (("sm_90", [True, False]), ("sm_80", [False])):
        launches = warmup.kernels_of(warmup.Job(arch, "forward", *dense))
        assert [launch.args["PACKED"] for launch in launches] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "sm_70"], "sm_70 is not one of"),
        (["--arch", "sm_90", "--precision", "fp8"], "--forward-only"),
        (["--arch", "sm_80", "--precision", "fp8", "--forward-only"], "no FP8 matrix units"),
        (["--arch", "sm_90", "--head-dim-v", "257"], "at most 256, got 257"),
    ],
)
def test_what_warmup_refuses(options, message, capsys):
    assert main(["warmup", "--head-dim", "64", "--pattern", "vsa", *options]) == 2
    assert message in capsys.readouterr().err
