# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The ops as stateless modules, the form in which the Hub's kernels library replaces a layer's forward."""

import torch
from torch import nn

from .taylor_attention_chunk import taylor_attention
from .taylor_attention_step import taylor_attention_step


class TaylorAttention(nn.Module):
    """`taylor_attention`, or `taylor_attention_step` where there is one token and a state to update in place."""

    can_torch_compile: bool = True
    has_backward: bool = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        state: torch.Tensor | None = None,
        scale: float | None = None,
        mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query, key [B, T, H, D], value [B, T, H, V] -> output [B, T, H, V] and a state or None.

        With `state` (T = 1) the state is updated in place and returned; otherwise see `taylor_attention`.
        """
        if state is not None:
            return taylor_attention_step(query, key, value, state, scale=scale, mask=mask), state
        return taylor_attention(
            query,
            key,
            value,
            scale=scale,
            mask=mask,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            output_final_state=output_final_state,
        )
