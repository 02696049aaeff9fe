"""The operations of the model, and their plain torch references."""

from ember_pp.kernels.ops import (
    add_rms_norm,
    embedding,
    linear,
    paged_attention,
    qk_norm_rope,
    rms_norm,
    store_kv,
    swiglu,
)

__all__ = [
    "add_rms_norm",
    "embedding",
    "linear",
    "paged_attention",
    "qk_norm_rope",
    "rms_norm",
    "store_kv",
    "swiglu",
]
