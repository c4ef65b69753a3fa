"""Video sparse attention for any video model: ``sparsify(model, config)``.

::

    import video_attn.sparsity as mtsa
    from video_attn.sparsity.config import VSA_DEFAULT

    model = mtsa.sparsify(model, config=VSA_DEFAULT)

docs/sparsify.md is the guide.
"""

from __future__ import annotations

from .attributes import (
    DenseAttributeConfig,
    RadialAttributeConfig,
    ScheduleConfig,
    SlidingTileAttributeConfig,
    VSAAttributeConfig,
)
from .config import VSA_DEFAULT, SparseAttentionConfig, VSAConfig
from .conversion import (
    disable_sparse_attention,
    enable_sparse_attention,
    get_named_sparse_attention_modules,
    is_attn_sparsified,
    set_sparse_attention_attribute,
    sparsify,
    unsparsify,
)
from .gates import add_gates, load_gates
from .modelopt import register_with_modelopt
from .module import SparseAttentionModule
from .persist import (
    export_sparse_attention_config,
    load,
    restore_sparse_attention_model,
    save,
)
from .roots import video_shape
from .summary import print_sparse_attention_summary

__all__ = [
    "VSA_DEFAULT",
    "DenseAttributeConfig",
    "RadialAttributeConfig",
    "ScheduleConfig",
    "SlidingTileAttributeConfig",
    "SparseAttentionConfig",
    "SparseAttentionModule",
    "VSAAttributeConfig",
    "VSAConfig",
    "add_gates",
    "disable_sparse_attention",
    "enable_sparse_attention",
    "export_sparse_attention_config",
    "get_named_sparse_attention_modules",
    "is_attn_sparsified",
    "load",
    "load_gates",
    "print_sparse_attention_summary",
    "register_with_modelopt",
    "restore_sparse_attention_model",
    "save",
    "set_sparse_attention_attribute",
    "sparsify",
    "unsparsify",
    "video_shape",
]
