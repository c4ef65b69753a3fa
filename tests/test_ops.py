"""The operators as torch sees them: opcheck of every one, torch.compile, dynamic shapes, export."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
import torch._dynamo.testing
from op_samples import GPU_ONLY, SAMPLES
from problems import Built, Problem
from torch import Tensor

from video_attn import BlockMask, attention

SPARSE = Problem(
    index=0, seed=21, kind="lists", dtype=torch.float32, batch=2, kv_heads=1, group=2, head_dim=32,
    head_dim_v=24, memory="bhsd", logits="normal", with_lse_grad=True, q_len=75, kv_len=90,
    q_block_size=16, kv_block_size=32, lens="shared", mask_heads=True, density=0.6,
)  # fmt: skip
DENSE = Problem(
    index=1, seed=22, kind="causal", dtype=torch.float32, batch=2, kv_heads=2, group=1, head_dim=16,
    head_dim_v=16, memory="bshd", logits="normal", with_lse_grad=True, q_len=33, kv_len=41,
)  # fmt: skip
PROBLEMS = pytest.mark.parametrize("problem", [SPARSE, DENSE], ids=["mask", "causal"])


def test_every_operator_has_samples():
    """Every operator that importing the package defines, but those of GPUs alone."""
    # Asked from a fresh process: other tests import more, and register emulations of some.
    program = (
        "import sys, torch, video_attn; ask = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "print(*[name for name in sys.argv[1:] if ask(f'video_attn::{name}', 'CPU')]); "
        "print(*torch._C._dispatch_get_all_op_names())"
    )
    command = [sys.executable, "-c", program, *sorted(GPU_ONLY)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    runs_on_cpu, names = (line.split() for line in answer.splitlines())
    ours = {n.split("::")[1].split(".")[0] for n in names if n.startswith("video_attn::")}
    assert ours - GPU_ONLY == set(SAMPLES), "add it to tests/op_samples.py"
    assert not runs_on_cpu, f"{runs_on_cpu} run on a CPU: they need samples"


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_opcheck(name):
    """Schema, fake tensors, autograd registration and AOT dispatch with dynamic shapes."""
    operator = getattr(torch.ops.video_attn, name).default
    samples = list(SAMPLES[name]())
    assert samples
    for arguments in samples:
        # An operator without tensors has nothing to trace.
        has_tensors = any(isinstance(x, Tensor) for x in arguments)
        checks = "ALL" if has_tensors else ("test_schema", "test_autograd_registration")
        torch.library.opcheck(operator, arguments, test_utils=checks)


# -- torch.compile ---------------------------------------------------------------------------------


def answer(run: Callable[..., tuple[Tensor, Tensor]], built: Built) -> oracle.Result:
    q, k, v = (x.detach().requires_grad_() for x in (built.q, built.k, built.v))
    out, lse = run(q, k, v, built.mask)
    grads = torch.autograd.grad((out, lse), (q, k, v), (built.grad_out, built.grad_lse))
    return oracle.Result(out.detach(), lse.detach(), *grads)


def model(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> tuple[Tensor, Tensor]:
    """attention() with neighbours that a compiler would like to fuse with it."""
    out, lse = attention(q * 1.5, k, v, mask, return_lse=True, is_causal=mask is None)
    return out + q.mean(), lse


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_close(got: oracle.Result, wanted: oracle.Result) -> None:
    """Up to the rounding of a fused multiplication around the operator."""
    for name, a, b in zip(oracle.Result._fields, got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def check_compiled(built: Built, **options: Any) -> None:
    """One graph without a break, and the numbers of the eager call."""
    compiled = torch.compile(model, fullgraph=True, **options)
    assert_close(answer(compiled, built), answer(model, built))


@PROBLEMS
def test_compile_without_graph_break(problem):
    check_compiled(problem.build(), backend="aot_eager")


@PROBLEMS
def test_compile_without_graph_break_with_dynamic_shapes(problem):
    check_compiled(problem.build(), backend="aot_eager", dynamic=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")
@PROBLEMS
def test_compile_with_inductor(problem):
    check_compiled(problem.build())


def test_compile_of_forward_alone():
    built = SPARSE.build()
    with torch.no_grad():
        expected = model(built.q, built.k, built.v, built.mask)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(built.q, built.k, built.v, built.mask)
    torch.testing.assert_close(got, expected)


def test_compiled_code_serves_other_masks_of_the_same_shape():
    """A top-k mask changes every step; the compiled graph must follow without a new compilation."""
    built, other = SPARSE.build(), SPARSE.build()
    for each, keep in ((built, built.mask.to_dense()), (other, ~built.mask.to_dense())):
        each.mask = BlockMask.from_dense(
            keep, 16, 32, each.mask.q_block_lens, each.mask.kv_block_lens, q_len=75, kv_len=90
        )
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for each in (built, other):
        assert_close(answer(compiled, each), answer(model, each))
    assert counter.frame_count == 1


def test_mask_made_inside_the_compiled_region():
    """Patterns that depend on data (top-k) build their mask between two layers."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.unflatten(2, (-1, 16)).mean(3) @ k.unflatten(2, (-1, 16)).mean(3).mT
        keep = scores >= scores.amax(-1, keepdim=True)
        return attention(q, k, v, BlockMask.from_dense(keep, 16, 16))

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
    expected = run(q, k, v)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(got, expected)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), (q, k, v)), wanted)


def test_dynamic_lengths_need_no_new_compilation():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(q: Tensor) -> Tensor:
        return attention(q, q, q)

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for length in (17, 40, 64, 129):
        q = torch.randn(2, 2, length, 16)
        torch.testing.assert_close(compiled(q), run(q))
    assert counter.frame_count == 1


def test_bad_input_is_refused_inside_compiled_code():
    compiled = torch.compile(model, backend="aot_eager")
    q, k, v = (torch.randn(1, 2, 8, n) for n in (8, 4, 8))
    with pytest.raises(Exception, match="k must have the head_dim of q"):
        compiled(q, k, v, None)


# -- fake tensors and streams ----------------------------------------------------------------------


@PROBLEMS
@pytest.mark.parametrize("memory", ["bhsd", "bshd", "slack"])
def test_fake_outputs_have_the_strides_of_real_ones(problem, memory):
    """Inductor trusts these strides: a wrong one is a wrong answer without an error."""
    built = replace(problem, memory=memory, kv_heads=2, with_lse_grad=True).build()
    q, k, v = built.kernel_inputs
    real = attention(q, k, v, built.mask, return_lse=True, backend="reference")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = attention(*(mode.from_tensor(x) for x in (q, k, v)), built.mask, return_lse=True)
    for got, wanted in zip(fake, real, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert got.stride() == wanted.stride()


def test_export():
    """torch.export keeps the operator as one node."""

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, is_causal=True)

    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    program = torch.export.export(Layer(), (q, k, v))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("video_attn.attention_forward" in name for name in names)
    torch.testing.assert_close(program.module()(q, k, v), attention(q, k, v, is_causal=True))


def test_autocast_reaches_the_operator_in_one_dtype():
    """Under autocast a model mixes dtypes; attention says so instead of mixing them silently."""
    q, k = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="v must have the dtype"),
    ):
        attention(q, k, k.bfloat16())


@pytest.mark.gpu
@PROBLEMS
def test_cuda_graph(problem, gpu):
    """Captured once, replayed on other values; no host synchronisation on the way."""
    built = problem.build(gpu, torch.bfloat16)
    q, k, v = (x.detach().clone().requires_grad_() for x in (built.q, built.k, built.v))
    if built.mask is not None:
        built.mask.transposed()

    def run() -> oracle.Result:
        out, lse = attention(q, k, v, built.mask, return_lse=True, is_causal=built.mask is None)
        grads = torch.autograd.grad(out, (q, k, v), built.grad_out)
        return oracle.Result(out, lse, *grads)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for x in (q, k, v):
            x.copy_(x.flip(2))
    graph.replay()
    torch.cuda.synchronize()
    case = oracle.Case(q.detach(), k.detach(), v.detach(), built.token_mask, None, built.grad_out)
    oracle.check_against_oracle(oracle.Result(*(x.detach() for x in captured)), case, "replayed")


@pytest.mark.gpu
@PROBLEMS
def test_compile_on_gpu(problem, gpu):
    check_compiled(problem.build(gpu))
