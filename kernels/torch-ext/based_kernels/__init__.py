# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels of Based: Taylor linear attention for whole sequences and for one decoding step.

Importing works everywhere; on a machine without Triton the ops raise an ImportError when they are called.
"""

try:
    from .layers import TaylorAttention
    from .taylor_attention_chunk import taylor_attention
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

    taylor_attention = _unavailable("taylor_attention")
    taylor_attention_step = _unavailable("taylor_attention_step")
    TaylorAttention = _unavailable("TaylorAttention")


def is_available() -> bool:
    """Whether Triton is installed, so that the ops can run (on CUDA tensors)."""
    return _missing is None


# The Triton that the gpu tests passed with. It builds neighbouring launch settings wrongly (README), so the code that
# another version makes of these kernels counts as unproven until those tests have run with it.
PROVEN_TRITON = "3.6"


def unproven(feature_dim: int) -> str | None:
    """Why the kernels are not known to be right here, for queries of this size; `None` if the gpu tests cover them."""
    import triton

    if not triton.__version__.startswith(f"{PROVEN_TRITON}."):
        return f"the kernels are proven with Triton {PROVEN_TRITON}, not with {triton.__version__}"
    if feature_dim > 16:
        return f"the kernels are proven for a feature_dim of 8 and 16, not of {feature_dim}"
    return None


__all__ = ["PROVEN_TRITON", "TaylorAttention", "is_available", "taylor_attention", "taylor_attention_step", "unproven"]
