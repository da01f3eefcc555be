# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels of Based: Taylor linear attention and the gated short convolution for whole sequences, and
a decoding step of every mixer.

Importing works everywhere; on a machine without Triton the ops raise an ImportError when they are called.
"""

try:
    from .gated_short_conv import conv_places, gated_short_conv
    from .gated_short_conv_step import gated_short_conv_step
    from .layers import TaylorAttention
    from .rms_norm import rms_norm, rms_norm_of_parts
    from .sliding_attention import sliding_attention
    from .sliding_attention_step import sliding_attention_step
    from .swiglu import swiglu
    from .taylor_attention_chunk import taylor_attention
    from .taylor_attention_lazy_step import taylor_attention_lazy_step
    from .taylor_attention_step import taylor_attention_step

    _missing = None
except ImportError as error:
    if (error.name or "").partition(".")[0] != "triton":
        raise
    _missing = error

    def _unavailable(name):
        def op(*args, **kwargs):
            raise ImportError(
                f"based_kernels.{name} needs Triton, which is not installed here: {_missing}", name="triton"
            )

        op.__name__ = op.__qualname__ = name
        return op

    conv_places = _unavailable("conv_places")
    gated_short_conv = _unavailable("gated_short_conv")
    gated_short_conv_step = _unavailable("gated_short_conv_step")
    rms_norm = _unavailable("rms_norm")
    rms_norm_of_parts = _unavailable("rms_norm_of_parts")
    sliding_attention = _unavailable("sliding_attention")
    sliding_attention_step = _unavailable("sliding_attention_step")
    swiglu = _unavailable("swiglu")
    taylor_attention = _unavailable("taylor_attention")
    taylor_attention_lazy_step = _unavailable("taylor_attention_lazy_step")
    taylor_attention_step = _unavailable("taylor_attention_step")
    TaylorAttention = _unavailable("TaylorAttention")


def is_available() -> bool:
    """Whether Triton is installed, so that the ops can run (on CUDA tensors)."""
    return _missing is None


__all__ = [
    "TaylorAttention",
    "conv_places",
    "gated_short_conv",
    "gated_short_conv_step",
    "is_available",
    "rms_norm",
    "rms_norm_of_parts",
    "sliding_attention",
    "sliding_attention_step",
    "swiglu",
    "taylor_attention",
    "taylor_attention_lazy_step",
    "taylor_attention_step",
]
