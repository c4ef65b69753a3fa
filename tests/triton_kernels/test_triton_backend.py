"""What is special to the Triton backend: launch rows, lists of steps, what it refuses.

The kernels run in Triton's interpreter where there is no GPU. Random problems are in
``test_attention.py``; here every way of cutting slots into tiles and steps is forced once.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from video_attn import BlockMask, attention
from video_attn.backends import triton as triton_backend
from video_attn.backends.triton import backward_launches, forward_launches
from video_attn.kernels import launch_tables
from video_attn.kernels import launch_tables_nvidia as nvidia
from video_attn.kernels.launch import Lists, Saved, Side, padded, run_launches, wide_rows
from video_attn.kernels.launch_tables import LaunchRow
from video_attn.registry import Problem, why_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE)


def random_mask(q_len, kv_len, q_size, kv_size, *, heads=2, lens=False, seed=0) -> BlockMask:
    generator = torch.Generator().manual_seed(seed)
    q_blocks, kv_blocks = -(-q_len // q_size), -(-kv_len // kv_size)
    keep = torch.rand(1, heads, q_blocks, kv_blocks, generator=generator) < 0.6
    keep[0, 0, 0] = False  # an empty row
    q_lens = kv_lens = None
    if lens:
        q_lens, kv_lens = (
            torch.randint(0, size + 1, (2, blocks), dtype=torch.int32, generator=generator)
            for size, blocks in ((q_size, q_blocks), (kv_size, kv_blocks))
        )
    mask = BlockMask.from_dense(keep, q_size, kv_size, q_lens, kv_lens, q_len=q_len, kv_len=kv_len)
    return mask.to(DEVICE)


def run_with_row(q, k, v, mask, row, *, is_causal=False, grad_out, grad_lse):
    """(out, lse, dq, dk, dv) of the kernels with these launch options."""
    out, lse = torch.full_like(grad_out, torch.nan), torch.full_like(grad_lse, torch.nan)
    options = {"scale": 0.3, "is_causal": is_causal}
    run_launches(forward_launches(q, k, v, out, lse, mask, row=row, **options), DEVICE)
    grads = tuple(torch.full_like(x, torch.nan) for x in (q, k, v))
    saved = Saved(q, k, v, out, lse, grad_out, grad_lse)
    rows = {"dq_row": row, "dkv_row": row}
    run_launches(backward_launches(saved, grads, mask, **options, **rows), DEVICE)
    return out, lse, *grads


def check_row(row, mask, q_len, kv_len, *, is_causal=False, head_dim=24, head_dim_v=16):
    batch = 1 if mask is None else mask.batch
    q = rand(batch, 2, q_len, head_dim, seed=1)
    k, v = (rand(batch, 1, kv_len, d, seed=2) for d in (head_dim, head_dim_v))
    grad_out, grad_lse = rand(batch, 2, q_len, head_dim_v, seed=4), rand(batch, 2, q_len, seed=5)
    got = run_with_row(
        q, k, v, mask, row, is_causal=is_causal, grad_out=grad_out, grad_lse=grad_lse
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = attention(
        q, k, v, mask, scale=0.3, is_causal=is_causal, return_lse=True, backend="reference"
    )
    loss = (out * grad_out).sum() + (lse.masked_fill(lse.isinf(), 0) * grad_lse).sum()
    expected = out, lse, *torch.autograd.grad(loss, (q, k, v))
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-5), (name, (a - b).abs().max())
        assert torch.equal(a == 0, b == 0) or name == "lse", name  # zeros are exact


# -- tiles and steps ------------------------------------------------------------------------------

CUTS = [
    # slot of queries, of keys, own tile, step
    (32, 32, 32, 32),  # slots are tiles and steps
    (64, 64, 32, 16),  # slots of several tiles and steps
    (32, 64, 64, 32),  # the tile is larger than the slot
    (48, 48, 32, 16),  # tiles that do not fill their slot
    (64, 16, 32, 32),  # steps halved to the slot of keys, gathered queries in dkv
    (20, 20, 16, 16),  # gathered on both sides
    (8, 8, 16, 32),
]


@pytest.mark.parametrize("lens", [False, True], ids=["whole", "lens"])
@pytest.mark.parametrize("cut", [False, True], ids=["even", "cut"])
@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_every_way_to_cut_slots(sizes, cut, lens):
    q_size, kv_size, own, step = sizes
    q_len, kv_len = (2 * size if size > 20 else 3 * size for size in (q_size, kv_size))
    if cut:
        q_len, kv_len = q_len - q_size // 3, kv_len - kv_size // 2
    mask = random_mask(q_len, kv_len, q_size, kv_size, lens=lens)
    check_row(LaunchRow(own, step, 4, 1), mask, q_len, kv_len)


@pytest.mark.parametrize("lengths", [(64, 64), (50, 70), (70, 50), (33, 1)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("row", [(32, 16), (16, 32)], ids=str)
def test_dense(row, is_causal, lengths):
    check_row(LaunchRow(*row, 4, 1), None, *lengths, is_causal=is_causal)


@pytest.mark.parametrize("dims", [(1, 1), (16, 64), (130, 3)], ids=str)
def test_padded_head_dims(dims):
    mask = random_mask(64, 64, 32, 32, heads=1, lens=True)  # one list for all heads
    check_row(LaunchRow(32, 32, 4, 1), mask, 64, 64, head_dim=dims[0], head_dim_v=dims[1])


def test_lists_in_any_memory_order():
    mask = random_mask(96, 96, 32, 32)
    wide = mask.kv_indices.repeat_interleave(2, -1)[..., ::2]
    counts = mask.kv_num_blocks.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert wide.stride(3) == 2 and counts.stride(2) == 2
    strided = BlockMask(counts, wide, 32, 32, 96, 96)
    check_row(LaunchRow(32, 32, 4, 1), strided, 96, 96)
    check_row(LaunchRow(32, 16, 4, 1), strided, 96, 96)


def test_lists_without_any_entry():
    lists = torch.empty(1, 1, 2, 0, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(1, 1, 2, dtype=torch.int32, device=DEVICE)
    mask = BlockMask(counts, lists, 32, 32, q_len=64, kv_len=64)
    check_row(LaunchRow(32, 32, 4, 1), mask, 64, 64)


def test_row_offsets_that_need_64_bits():
    """A tile of 64 rows whose last one starts past 2**31 elements; only touched pages are real."""
    stride = 2**25 + 2**21
    storage = torch.empty(63 * stride + 16, dtype=torch.float16, device=DEVICE)
    near = rand(1, 1, 64, 16).half()
    far = storage.as_strided((1, 1, 64, 16), (0, 0, stride, 1)).copy_(near)
    assert wide_rows(64, {"q": far}) and not wide_rows(64, {"q": near})
    for tensors in ((far, near, near), (near, far, near), (near, near, far)):
        q, k, v = (x.detach().requires_grad_() for x in tensors)
        out = attention(q, k, v, backend="triton")
        plain = [near.detach().requires_grad_() for _ in range(3)]
        expected = attention(*plain, backend="triton")
        assert torch.equal(out, expected)
        grads = torch.autograd.grad(out, (q, k, v), near)
        expected_grads = torch.autograd.grad(expected, plain, near)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_nan_in_a_visible_key_is_not_hidden():
    q, k, v = (rand(1, 1, 64, 16, seed=n) for n in range(3))
    k[0, 0, 40] = torch.nan
    keep = torch.tensor([[True, False], [True, True]], device=DEVICE)[None, None]
    mask = BlockMask.from_dense(keep, 32, 32)
    out, lse = attention(q, k, v, mask, return_lse=True, backend="triton")
    assert out[:, :, :32].isfinite().all() and lse[:, :, :32].isfinite().all()
    assert out[:, :, 32:].isnan().all() and lse[:, :, 32:].isnan().all()


# -- lists of steps -------------------------------------------------------------------------------


def steps_by_definition(mask: BlockMask, step: int, b: int, h: int, row: int) -> list[list[int]]:
    """[full steps, other steps] of a query slot."""
    lens = mask.kv_lens()
    lens = lens[min(b, lens.shape[0] - 1)].tolist()
    count = int(mask.kv_num_blocks[0, h, row])
    full, partial = [], []
    for slot in mask.kv_indices[0, h, row, :count].tolist():
        for part in range(mask.kv_block_size // step):
            rows = lens[slot] - part * step
            number = slot * (mask.kv_block_size // step) + part
            if rows >= step:
                full.append(number)
            elif rows > 0:
                partial.append(number)
    return [full, partial]


@pytest.mark.parametrize("step", [8, 32, 96])
@pytest.mark.parametrize("lens", [False, True])
def test_step_lists(step, lens):
    from video_attn.kernels import step_lists

    # More slots than the kernel reads at a time.
    mask = random_mask(2, 200 * 96 - 50, 1, 96, lens=lens, seed=3)
    side = Side(96, mask.kv_len, mask.kv_block_lens)
    args, launch = step_lists.split_slots(mask.kv_num_blocks, mask.kv_indices, side, step)
    run_launches([launch], DEVICE)
    full, counts, lists = args["full"], args["counts"], args["lists"]
    assert args["HAS_PARTIAL"] and args["MODE"] == "steps"
    assert full.shape == counts.shape == ((2 if lens else 1), 2, 2)
    for b in range(full.shape[0]):
        for h in range(2):
            for row in range(2):
                expected_full, expected_partial = steps_by_definition(mask, step, b, h, row)
                n_full, n_steps = int(full[b, h, row]), int(counts[b, h, row])
                assert lists[b, h, row, :n_full].tolist() == expected_full
                assert lists[b, h, row, n_full:n_steps].tolist() == expected_partial


def test_only_what_needs_a_mask_is_masked():
    from video_attn.kernels.step_lists import plan_steps

    lists = Lists(*(torch.zeros(shape, dtype=torch.int32) for shape in ((1, 1, 3), (1, 1, 3, 2))))
    own, row = Side(64, 192), LaunchRow(64, 64, 4, 1)
    lens = torch.zeros(1, 3, dtype=torch.int32)

    def plan(other: Side, lists: Lists | None = lists, is_causal: bool = False) -> tuple:
        steps = plan_steps(lists, own, other, is_causal, row)
        return steps.args["MODE"], steps.args["HAS_PARTIAL"], len(steps.before)

    assert plan(Side(64, 192)) == ("steps", False, 0)  # the mask's own lists are the steps
    assert plan(Side(128, 384)) == ("steps", False, 1)
    assert plan(Side(128, 320)) == ("steps", False, 1)  # the cut falls between two steps
    assert plan(Side(64, 190)) == ("steps", True, 1)
    assert plan(Side(64, 192, lens)) == ("steps", True, 1)
    assert plan(Side(100, 300)) == ("gather", True, 0)
    assert plan(Side(1, 192), None) == ("dense", False, 0)
    assert plan(Side(1, 190), None) == ("dense", True, 0)
    assert plan(Side(1, 192), None, True) == ("dense", True, 0)


# -- launch tables --------------------------------------------------------------------------------


def test_tables_are_complete():
    assert set(launch_tables.SHARED_MEMORY) >= {
        "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120",
        "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201",
    }  # fmt: skip
    keys = {
        (kernel, itemsize, head_dim)
        for kernel in launch_tables.KERNELS
        for itemsize in launch_tables.ITEMSIZES
        for head_dim in launch_tables.HEAD_DIMS
    }
    for name, table in launch_tables.TABLES.items():
        chips = [x for x in launch_tables.SHARED_MEMORY if launch_tables.family(x) == name]
        precisions = {
            precision
            for precision in launch_tables.CODE_KERNELS
            if name == "interpreter"
            or any(launch_tables.unsupported_precision(x, precision) is None for x in chips)
        }
        codes = {(x, 1, head_dim) for x in precisions for head_dim in launch_tables.HEAD_DIMS}
        assert "sage_fp16" in precisions and set(table) == keys | codes, name
        for key, rows in table.items():
            for grain, row in zip(launch_tables.GRAINS, rows, strict=True):
                assert {row.own, row.step} <= {16, 32, 64, 128}, (name, key, row)
                assert max(row.own, row.step) <= grain, (name, key, row)
                assert row.num_warps in (1, 2, 4, 8) and 1 <= row.num_stages <= 4, (name, key, row)


def test_tensor_cores_multiply_fp32_where_the_table_of_products_says():
    for name, table in launch_tables.TABLES.items():
        for (kernel, itemsize, head_dim), rows in table.items():
            products = nvidia.FP32_PRODUCTS.get(name, {}).get(head_dim, "ieee")
            expected = products if itemsize == 4 else "ieee"
            assert {row.products for row in rows} == {expected}, (name, kernel, head_dim)
    assert launch_tables.TABLES["sm_90"]["forward", 4, 128][0].products == "bf16x6"


def test_vendor_options_stay_with_their_vendor():
    for name, table in launch_tables.TABLES.items():
        vendor = {option for rows in table.values() for row in rows for option, _ in row.vendor}
        allowed = {"waves_per_eu", "matrix_instr_nonkdim"} if "dna" in name else set()
        assert vendor <= allowed, name


def test_choice_of_a_row():
    table = launch_tables.TABLES["sm_90"]
    choose = launch_tables.launch_row
    for head_dim, bucket in ((1, 64), (64, 64), (65, 128), (128, 128), (129, 256), (256, 256)):
        for grain, index in ((8, 0), (64, 0), (127, 0), (128, 1), (384, 1), (None, 1)):
            row = choose("sm_90", "dq", head_dim, 2, grain)
            assert row is table["dq", 2, bucket][index]
    assert choose("sm_89", "forward", 64, 2, 64) == choose("sm_120", "forward", 64, 2, 64)


def test_tensors_that_are_not_read_in_vectors_use_no_descriptors():
    """ptxas 12.8 miscompiles wgmma descriptors of tiles that come through registers."""
    storage = torch.zeros(2 * 100 * 40 + 8, dtype=torch.bfloat16)
    aligned, offset = storage[:-8].view(1, 2, 100, 40), storage[3:-5].view(1, 2, 100, 40)
    odd = torch.zeros(1, 2, 100, 41, dtype=torch.bfloat16)  # rows of 82 bytes
    for arch in ("sm_90", "sm_100", "sm_80"):
        for kernel in launch_tables.KERNELS:
            table = launch_tables.launch_row(arch, kernel, 40, 2, None)
            choose = partial(triton_backend.chosen_row, kernel, None, arch=arch)
            assert choose(aligned, aligned, aligned) == table
            for tensors in ((aligned, aligned, offset), (offset, aligned), (odd, odd, odd)):
                row = choose(*tensors)
                # Fewer than 64 rows go to mma.sync, whatever the number of warps.
                assert row.own <= 32 and row.step <= 32 if arch != "sm_80" else row == table
    wide = [x.float() for x in (aligned, offset)]  # fp32 products know no descriptors
    for x in wide:
        assert triton_backend.chosen_row("dq", None, x, arch="sm_90") == launch_tables.launch_row(
            "sm_90", "dq", 40, 4, None
        )


def test_the_tuner_knows_every_row(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from compile_cases import Case
    from tune_triton import candidates

    for arch in launch_tables.SHARED_MEMORY:
        for key, rows in launch_tables.TABLES[launch_tables.family(arch)].items():
            for grain, row in zip(launch_tables.GRAINS, rows, strict=True):
                tried = list(candidates(Case(arch, *key, grain)))
                assert row in tried, (arch, key, grain)
                assert all(max(x.own, x.step) <= grain for x in tried)


@pytest.mark.parametrize(
    ("own_slot", "step_slot", "own", "step", "warps"),
    [
        (128, 128, 128, 64, 8),
        (384, 384, 128, 64, 8),
        (100, 100, 128, 64, 8),  # gathered
        (64, 64, 64, 64, 4),
        (64, 32, 64, 32, 4),
        (16, 16, 16, 64, 2),  # gathered
        (8, 96, 16, 32, 2),
        (33, None, 64, 64, 4),
    ],
)
def test_row_fitted_to_slots(own_slot, step_slot, own, step, warps):
    row = LaunchRow(128, 64, 8, 3).fitted(own_slot, step_slot)
    assert (row.own, row.step, row.num_warps, row.num_stages) == (own, step, warps, 3)


def test_padded_sizes():
    assert [padded(x) for x in (1, 16, 17, 64, 65, 96, 200, 256)] == [
        16, 16, 32, 64, 128, 128, 256, 256,
    ]  # fmt: skip


# -- what it refuses ------------------------------------------------------------------------------

GOOD = Problem("forward", "cuda", "sm_90", torch.bfloat16, 128, 128, 64, 64)


def refusal(monkeypatch, interpret: str | None, **changes) -> str | None:
    if interpret is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    problem = Problem(**{**vars(GOOD), **changes})
    return triton_backend._supports(problem)


@pytest.mark.parametrize("arch", sorted(launch_tables.SHARED_MEMORY))
def test_serves_every_chip(arch, monkeypatch):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert refusal(monkeypatch, None, arch=arch, dtype=dtype) is None
    assert refusal(monkeypatch, None, arch=arch, head_dim=1, head_dim_v=256) is None


@pytest.mark.parametrize(
    ("interpret", "changes", "reason"),
    [
        (None, {"dtype": torch.float64}, "dtype torch.float64 is not float16"),
        (None, {"head_dim": 257}, "head_dim 257 is larger than 256"),
        (None, {"head_dim_v": 300}, "head_dim of v 300 is larger than 256"),
        (None, {"arch": "sm_75"}, "sm_75 is not one of sm_80, "),
        (None, {"arch": "gfx906"}, "gfx906 is not one of "),
        (None, {"device_type": "cpu", "arch": "cpu"}, "CPU tensors run only in the Triton interp"),
        ("0", {"device_type": "cpu", "arch": "cpu"}, "CPU tensors run only in the Triton interp"),
        ("1", {"device_type": "cpu", "arch": "cpu"}, "bfloat16 arithmetic is wrong in the Triton"),
        ("1", {}, "bfloat16 arithmetic is wrong in the Triton"),
    ],
)
def test_refusals(interpret, changes, reason, monkeypatch):
    assert reason in refusal(monkeypatch, interpret, **changes)


def test_cpu_tensors_in_the_interpreter(monkeypatch):
    changes = {"device_type": "cpu", "arch": "cpu", "dtype": torch.float32}
    for value in ("1", "true", "ON"):
        assert refusal(monkeypatch, value, **changes) is None


def test_without_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: None)
    triton_backend._available.cache_clear()
    try:
        verdict = next(x for x in why_not(GOOD) if x.backend == "triton")
        assert verdict.reason == "triton is not installed (pip install triton)"
    finally:
        triton_backend._available.cache_clear()


def test_importing_the_package_does_not_import_triton():
    code = "import sys, video_attn, video_attn.block_ops; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.gpu
def test_head_dims_of_all_kinds_on_a_gpu(tmp_path, gpu):
    """A few hundred pairs of the plane of head dims, odd addresses too."""
    script = Path(__file__).parents[1] / "head_dims_gpu.py"
    options = ["--every", "13", "--workers", "4", "--out", str(tmp_path / "pairs.jsonl")]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
