"""All pairs of head dims on a GPU: attention and its gradients by Triton, against torch in fp32.

    PYTHONPATH=python python tests/head_dims_gpu.py [--workers 12] [--every 1] [--out FILE.jsonl]

D and DV from 1 to 256, each pair once, in bf16 on 150 queries and 130 keys in blocks of 64 with
valid lengths. Where 8 divides both and 5 their sum, the tensors start at an address that 16 does
not divide. The pairs that one kernel serves go to one worker, so that it compiles little; a worker
that a CUDA error has poisoned is replaced and goes on behind that pair. Exit status 1 if any pair
is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from video_attn import BlockMask, attention

QUERIES, KEYS, HEADS, BLOCK = 150, 130, 2, 64
LIMIT = 1.5e-2  # relative L2 error; bf16 inputs and weights give 2e-3 to 6e-3


def pairs(every: int) -> list[tuple[int, int]]:
    """(D, DV), those that one kernel serves next to each other."""
    sizes = range(1, 257, every)
    found = [(d, dv) for d in sizes for dv in sizes]
    return sorted(found, key=lambda x: (*map(_padded, x), _vector(*x), _is_offset(*x), x))


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _vector(d: int, dv: int) -> int:
    return min(8, (d | dv) & -(d | dv))


def _is_offset(d: int, dv: int) -> bool:
    return _vector(d, dv) == 8 and (d + dv) % 5 == 0


def block_mask(device: torch.device) -> BlockMask:
    """Lists of 3 x 3 blocks, a row without any, full and partial blocks."""
    keep = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    lens = [torch.tensor([x], dtype=torch.int32) for x in ([64, 40, 22], [64, 33, 2])]
    mask = BlockMask.from_dense(keep[None, None], BLOCK, BLOCK, *lens, q_len=QUERIES, kv_len=KEYS)
    return mask.to(device)


def errors(d: int, dv: int, mask: BlockMask, seen: Tensor) -> list[float]:
    """Relative errors of out, dq, dk and dv of a pair."""
    generator = torch.Generator(device="cuda").manual_seed(1000 * d + dv)

    def make(tokens: int, dim: int) -> Tensor:
        count = HEADS * tokens * dim
        x = torch.randn(count + 3, generator=generator, device="cuda").bfloat16()
        x = x[3:] if _is_offset(d, dv) else x[:-3]
        return x.view(1, HEADS, tokens, dim)

    q, k, v, grad = make(QUERIES, d), make(KEYS, d), make(KEYS, dv), make(QUERIES, dv)
    got = _with_gradients(
        [q, k, v], grad, lambda q, k, v: attention(q, k, v, mask, backend="triton")
    )

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * d**-0.5).masked_fill(~seen, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)  # rows that see nothing
        return weights @ v

    expected = _with_gradients([x.float() for x in (q, k, v)], grad.float(), exact)
    pieces = [(a.float() - b).norm() / b.norm() for a, b in zip(got, expected, strict=True)]
    return torch.stack(pieces).tolist()


def _with_gradients(inputs: Sequence[Tensor], grad: Tensor, run) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def work(first: int, step: int, every: int, out: Path, start: int) -> None:
    """Part ``first`` of ``step`` parts of the pairs, from ``start``; writes the wrong ones."""
    torch.backends.cuda.matmul.allow_tf32 = False
    mine = pairs(every)
    chunk = -(-len(mine) // step)
    mine = mine[first * chunk : (first + 1) * chunk]
    mask = block_mask(torch.device("cuda"))
    seen = mask.to_token_mask()
    with out.open("a") as file:
        for position in range(start, len(mine)):
            try:
                found = errors(*mine[position], mask, seen)
                reason = "" if all(x <= LIMIT for x in found) else str(found)
            except RuntimeError as error:
                reason = str(error)[:300]
            if reason:
                file.write(json.dumps({"pair": mine[position], "wrong": reason}) + "\n")
                file.flush()
            if "CUDA" in reason:
                again = [
                    "--worker",
                    str(first),
                    str(step),
                    str(position + 1),
                    "--every",
                    str(every),
                ]
                command = [sys.executable, __file__, *again, "--out", str(out)]
                os.execv(sys.executable, command)
        file.write(json.dumps({"done": len(mine)}) + "\n")


def rows(out: Path) -> Iterator[dict]:
    for line in out.read_text().splitlines():
        yield json.loads(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--every", type=int, default=1, help="take every n-th size only")
    parser.add_argument("--out", type=Path, default=Path("head_dims.jsonl"))
    parser.add_argument("--worker", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        first, step, start = options.worker
        work(first, step, options.every, options.out, start)
        return 0
    options.out.write_text("")
    command = [sys.executable, __file__, "--every", str(options.every), "--out", str(options.out)]
    running = [
        subprocess.Popen([*command, "--worker", str(i), str(options.workers), "0"])
        for i in range(options.workers)
    ]
    for process in running:
        process.wait()
    found = list(rows(options.out))
    wrong = [row for row in found if "wrong" in row]
    for row in wrong[:20]:
        print(row["pair"], row["wrong"])
    done = sum(row.get("done", 0) for row in found)
    total = len(pairs(options.every))
    print(f"{done} of {total} pairs of head dims ran, {len(wrong)} are wrong")
    return int(bool(wrong) or done != total)


if __name__ == "__main__":
    raise SystemExit(main())
