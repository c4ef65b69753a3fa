"""Attention over sequences that many GPUs share, on torch.distributed."""

from .agreement import PeerError
from .plan import SequencePlan, sequence_parallel_plan
from .sequence_parallel import sequence_parallel_attention
from .shards import Shards, balanced_shards, striped_shards
from .team import Traffic, record_traffic

__all__ = [
    "PeerError",
    "SequencePlan",
    "Shards",
    "Traffic",
    "balanced_shards",
    "record_traffic",
    "sequence_parallel_attention",
    "sequence_parallel_plan",
    "striped_shards",
]
