"""Backend `hopper` without a GPU: what it serves, what it copies, what its operators check.

What the kernels compute is tested in ``test_hopper_emulation.py`` and ``test_hopper_gpu.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hopper_emulation
import pytest
import torch
from hopper_problems import PROBLEMS, served
from problems import place
from torch import Tensor

from video_attn import BlockMask, native, registry
from video_attn.backends import hopper
from video_attn.native import Component
from video_attn.registry import Problem, select, why_not

# -- what it serves --------------------------------------------------------------------------------

GOOD = Problem("forward", "cuda", "sm_90", torch.bfloat16, 128, 128, 64, 64)
SERVED: list[dict[str, Any]] = [
    {},
    {"direction": "backward", "dtype": torch.float16},
    {"q_block_size": None, "kv_block_size": None},
    *({"q_block_size": n, "kv_block_size": m} for n, m in ((128, 128), (384, 128), (192, 320))),
    *({"head_dim": n, "head_dim_v": n} for n in (8, 40, 64, 72, 120)),
]


@pytest.mark.parametrize("changes", SERVED, ids=str)
def test_serves(changes):
    assert hopper._supports(replace(GOOD, **changes)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": "sm_80"}, "device sm_80 is not sm_90 (H100, H200)"),
        ({"arch": "sm_100"}, "device sm_100 is not sm_90"),
        ({"arch": "gfx942"}, "device gfx942 is not sm_90"),
        ({"device_type": "cpu", "arch": "cpu"}, "device cpu is not sm_90"),
        ({"precision": "sage_fp8"}, "precision 'sage_fp8' is not 'native'"),
        ({"dtype": torch.float32}, "dtype torch.float32 is not float16 or bfloat16"),
        ({"is_causal": True, "q_block_size": None, "kv_block_size": None}, "is_causal is not in"),
        ({"head_dim": 136, "head_dim_v": 136}, "head_dim 136 is more than 128"),
        ({"head_dim": 100, "head_dim_v": 100}, "head_dim 100 is not a multiple of 8"),
        ({"head_dim_v": 64}, "head_dim of v 64 is not head_dim 128"),
        ({"q_block_size": 32, "kv_block_size": 32}, "q_block_size 32 is not a multiple of 64 from"),
        ({"q_block_size": 160, "kv_block_size": 128}, "q_block_size 160 is not a multiple"),
        ({"q_block_size": 128}, "kv_block_size 64 is not a multiple of 64 from 128 on (or both 64"),
        ({"kv_block_size": 128}, "q_block_size 64 is not a multiple of 64 from 128 on"),
    ],
)
def test_refusals(changes, reason):
    assert reason in hopper._supports(replace(GOOD, **changes))


def test_causal_problems_are_not_served():
    small = replace(PROBLEMS[0], kind="causal", batch=1, kv_heads=1, group=1)
    assert not served(small)


def test_the_list_of_the_gpu_has_every_kind():
    kinds = {(p.kind, p.q_block_size) for p in PROBLEMS}
    assert {
        ("dense", 0),
        ("lists", 64),
        ("lists", 384),
        ("sliding", 384),
        ("selected", 64),
    } <= kinds
    assert len(PROBLEMS) > 300


def test_the_common_list_runs_on_hopper_too():
    """The list of test_attention.py runs on `hopper` too, wherever it can serve."""
    from test_attention import GPU_PROBLEMS

    assert sum(map(served, GPU_PROBLEMS)) > 50


@pytest.fixture
def built(monkeypatch):
    """Sets which of the two components are there."""

    def set_components(*names: str) -> None:
        def component(name: str) -> Component:
            reason = None if name in names else f"component {name} was not built: nvcc not found"
            return Component(name, reason is None, reason)

        monkeypatch.setattr(hopper.native, "component", component)
        registry.forget_choices()

    yield set_components
    monkeypatch.undo()
    registry.forget_choices()


def reason_for(problem: Problem) -> str | None:
    return next(v.reason for v in why_not(problem) if v.backend == "hopper")


COARSE, DENSE = (
    replace(GOOD, q_block_size=size, kv_block_size=size) for size in (384, None)
)  # and GOOD is fine


def test_each_component_serves_its_own_problems(built):
    built("sta", "vsa")
    assert [reason_for(p) for p in (GOOD, COARSE, DENSE)] == [None] * 3
    built("sta")
    assert reason_for(GOOD) == "component vsa was not built: nvcc not found"
    assert [reason_for(p) for p in (COARSE, DENSE)] == [None] * 2
    built("vsa")
    assert reason_for(GOOD) is None
    for problem in (COARSE, DENSE):
        assert reason_for(problem) == "component sta was not built: nvcc not found"


def test_neither_component(built):
    built()
    reason = reason_for(GOOD)
    assert reason is not None and "component sta" in reason and "component vsa" in reason
    # What cannot be served at all is not a matter of building.
    assert reason_for(replace(GOOD, arch="sm_80")) == "device sm_80 is not sm_90 (H100, H200)"


def test_comes_before_triton_and_hands_over(built):
    built("sta", "vsa")
    assert select(GOOD).name == "hopper"
    assert select(replace(GOOD, direction="backward")).name == "hopper"
    for other in ({"head_dim": 256, "head_dim_v": 256}, {"arch": "sm_100"}):
        assert reason_for(replace(GOOD, **other)) is not None


def test_this_machine_says_how_to_build():
    reason = hopper._available()
    if any(native.component(name).loaded for name in ("sta", "vsa")):
        assert reason is None
    else:
        assert reason is not None and "component sta" in reason


# -- copies for the tensor memory accelerator ------------------------------------------------------


@pytest.mark.parametrize("memory", ["bhsd", "bshd", "fused"])
def test_tensors_are_read_in_place(memory):
    x = torch.randn(2, 2, 20, 24).bfloat16()
    for placed in place({"q": x, "k": x, "v": x}, memory, "cpu"):
        assert hopper.aligned(placed) is placed


@pytest.mark.parametrize("memory", ["offset", "slack", "expanded"])
def test_tensors_that_do_not_fit_are_copied(memory):
    x = torch.randn(2, 2, 20, 24).bfloat16()
    placed = place({"q": x, "k": x}, memory, "cpu")[1]
    copied = hopper.aligned(placed)
    assert torch.equal(copied, placed) and copied.is_contiguous()
    assert copied.data_ptr() % 16 == 0 and copied.data_ptr() != placed.data_ptr()


def test_strides_along_a_single_element_do_not_matter():
    x = torch.empty_strided((1, 1, 16, 8), (3, 5, 8, 1), dtype=torch.float16)
    assert hopper.aligned(x) is x


# -- the operators ---------------------------------------------------------------------------------

needs_emulation = pytest.mark.skipif(
    hopper_emulation.missing() is not None, reason=f"host emulation: {hopper_emulation.missing()}"
)


@pytest.fixture(scope="module")
def emulation() -> None:
    """The operators on CPU tensors: the bindings' own source, and the kernels'."""
    hopper_emulation.load()


def arguments(grain: str, direction: str) -> dict[str, Any]:
    """Good arguments of an operator, by name."""
    size = {"coarse": 128, "fine": 64}[grain]
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    q, k, v = randn(2, 4, 150, 16), randn(2, 2, 200, 16), randn(2, 2, 200, 16)
    keep = torch.rand(1, 4, -(-150 // size), -(-200 // size), generator=generator) < 0.7
    mask = BlockMask.from_dense(keep, size, size, q_len=150, kv_len=200)
    lists = {"kv_num_blocks": mask.kv_num_blocks, "kv_indices": mask.kv_indices}
    if direction == "backward":
        lists |= dict(zip(("q_num_blocks", "q_indices"), mask.transposed(), strict=True))
    common = {"q": q, "k": k, "v": v}
    sides = {
        "q_block_lens": None,
        "kv_block_lens": torch.full((2, keep.shape[3]), size - 9, dtype=torch.int32),
        "q_block_size": size,
        "kv_block_size": size,
        "scale": 0.25,
    }
    out, lse = torch.zeros_like(q), torch.zeros(2, 4, 150)
    if direction == "forward":
        return {**common, **lists, **sides, "out": out, "lse": lse}
    grads = {"grad_out": randn(2, 4, 150, 16), "grad_lse": torch.zeros(2, 4, 150)}
    results = {"dq": torch.zeros_like(q), "dk": torch.zeros_like(k), "dv": torch.zeros_like(v)}
    return {
        **grads, **common, "out": out, "lse": lse, **lists, **sides, "deterministic": True,
        **results,
    }  # fmt: skip


OPERATORS = [(grain, way) for grain in ("coarse", "fine") for way in ("forward", "backward")]


@needs_emulation
@pytest.mark.parametrize(("grain", "direction"), OPERATORS)
def test_opcheck(grain, direction, emulation):
    """The schema names what is changed, the fake agrees with the kernel."""
    operator = getattr(torch.ops.video_attn, f"hopper_{grain}_{direction}").default
    given = arguments(grain, direction)
    assert list(given) == [argument.name for argument in operator._schema.arguments]
    torch.library.opcheck(operator, tuple(given.values()))


def wrong(grain: str, direction: str) -> list[tuple[dict[str, Any], str]]:
    """Changed arguments, and what the message must say."""
    good = arguments(grain, direction)
    q, k, counts, indices = (good[n] for n in ("q", "k", "kv_num_blocks", "kv_indices"))
    odd = torch.zeros(2 * 2 * 200 * 16 + 1, dtype=torch.bfloat16)[1:].view(2, 2, 200, 16)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"q": q.float()}, "q must be float16 or bfloat16"),
        ({"q": q[0]}, "q must have 4 dimensions"),
        ({"k": k.half()}, "k must have the dtype of q"),
        ({"v": good["v"][:, :, :-1]}, "v has size 199 in dimension 2, expected 200"),
        ({"k": k.mT.contiguous().mT}, "k must have stride 1 on its channels"),
        ({"v": torch.zeros(2, 2, 200, 20).bfloat16()[..., :16]}, "v has stride 20 in dimension 2"),
        ({"k": k[:, :1].expand_as(k)}, "k has stride 0 in dimension 1"),
        ({"v": odd}, "v does not start at a multiple of 16 bytes"),
        ({"k": torch.zeros(2, 3, 200, 16).bfloat16()}, "heads 4 is not a multiple of kv heads 3"),
        ({"lse": good["lse"].double()}, "lse must be float32"),
        ({"lse": good["lse"][:, :, ::2]}, "lse must be contiguous"),
        ({"q_block_size": 96}, "q_block_size is 96, allowed: multiples of 64"),
        ({"kv_block_size": 0}, "both 0"),
        ({"scale": -0.25}, "scale is -0.25, allowed: 0 and more"),
        ({"kv_num_blocks": None}, "block lists"),
        ({"kv_indices": None}, "counts and indices come together"),
        ({"kv_num_blocks": counts.long()}, "key block lists must be int32"),
        ({"kv_indices": indices[:, :, :-1]}, "key block lists must be"),
        ({"kv_num_blocks": counts[:, :3]}, "key block lists must be"),
        ({"kv_block_lens": good["kv_block_lens"][:, 1:]}, "kv_block_lens must be"),
        ({"kv_block_lens": good["kv_block_lens"].float()}, "block lens must be int32"),
        ({"q": torch.zeros(2, 4, 150, 136).bfloat16()}, "head_dim is 136, allowed: multiples of 8"),
    ]
    if direction == "backward":
        cases += [
            ({"dq": good["dq"].half()}, "dq must have the dtype of q"),
            ({"dk": good["dk"][:, :1]}, "dk has size 1 in dimension 1"),
            ({"grad_lse": good["grad_lse"][0]}, "grad_lse must be contiguous"),
            ({"q_indices": good["q_indices"][:, :, 1:]}, "query block lists must be"),
        ]
    return cases


@needs_emulation
@pytest.mark.parametrize(("grain", "direction"), OPERATORS)
def test_bindings_check_their_arguments(grain, direction, emulation):
    """A second line of defence, and the last one before a kernel writes out of bounds."""
    operator = getattr(torch.ops.video_attn, f"hopper_{grain}_{direction}")
    good = arguments(grain, direction)
    operator(**good)
    for changes, message in wrong(grain, direction):
        with pytest.raises(RuntimeError) as caught:
            operator(**{**good, **changes})
        assert message in str(caught.value), (list(changes), str(caught.value))
    other = 128 if grain == "fine" else 64
    sizes = {"q_block_size": other, "kv_block_size": other}
    with pytest.raises(RuntimeError, match=f"q_block_size is {other}, allowed"):
        operator(**{**good, **sizes})
