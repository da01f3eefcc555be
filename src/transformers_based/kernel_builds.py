# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Builds the Triton kernels of a prefill and of a decoding step side by side, before the first `generate` needs them.

Triton builds a kernel when it is first launched, and the launch waits: one core works, for seconds. Its compiler gives
up Python's lock nearly all the time, so every op of the model is called here once, on tensors of a token or two, in a
few threads. What is built does not depend on the length, but for what a long prompt of few rows takes in addition,
where the Taylor attention cuts it: that is built when it is launched.

An op that fails here fails again where the model calls it, and there it is raised.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch

from .backend import choose_backend
from .cache_based import TaylorCacheLayer, WindowCacheLayer
from .configuration_based import BasedConfig
from .ops import (
    Parts,
    can_attend_fused,
    conv_places,
    gated_short_conv,
    gated_short_conv_step,
    num_parts,
    rms_norm,
    sliding_attention,
    sliding_attention_step,
    swiglu,
)
from .taylor_attention import state_shape, taylor_attention, taylor_attention_lazy_step


# The longest build takes longer than all others do in three threads; on fewer cores it is not to wait for them.
_NUM_THREADS = min(4, os.cpu_count() or 1)


def build_kernels(
    config: BasedConfig, dtype: torch.dtype, device: torch.device, batch: int, attention_mask: torch.Tensor | None
) -> None:
    """
    Builds what `generate` with a static cache is going to launch on a GPU, if kernels are fused there.

    Args:
        batch: B, of the prompt; products are made in fewer parts, or in one, where there are more rows.
        attention_mask: `[B, T]`, of the prompt; kernels differ where there is padding.
    """
    if device.type != "cuda" or torch.is_autocast_enabled("cuda"):
        return
    if choose_backend("RMSNorm", device.type, str(dtype)) == "torch":
        return
    is_padded = isinstance(attention_mask, torch.Tensor) and not bool((attention_mask == 1).all())
    stream = torch.cuda.current_stream(device)
    # The threads are in no `torch.inference_mode`.
    with torch.inference_mode(False):
        first, *others = ops_of(config, dtype, device, batch, is_padded)
    # What all builds share is made once: Triton's driver, and a hash of Triton itself.
    _call(first, stream)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for op in others:
            pool.submit(_call, op, stream)


def _call(op: Callable[[], object], stream: torch.cuda.Stream) -> None:
    # Gradients are asked for in every new thread.
    with suppress(Exception), torch.cuda.stream(stream), torch.no_grad():
        op()


def ops_of(
    config: BasedConfig, dtype: torch.dtype, device: torch.device, batch: int, is_padded: bool
) -> list[Callable[[], object]]:
    """
    Calls of the ops as a model makes them in a prefill and a step, but for their numbers of tokens. No two launch the
    same kernel, which Triton would build twice. One that is built soon comes first, then those that take longest.
    """

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    # A row that does not exist: the steps write nothing.
    step = {"mask": zeros(1, 1, dtype=torch.bool)}
    prefill = {"mask": ~zeros(1, 2, dtype=torch.bool) if is_padded else None}
    hidden_states, weight = zeros(1, 2, config.hidden_size), zeros(config.hidden_size)
    residual = hidden_states.float() if config.residual_in_fp32 else hidden_states
    ops = [partial(rms_norm, residual, weight, config.rms_norm_eps)]
    # The products before a norm, by how many numbers they make a number of; and whether there is a bias.
    products = {(config.intermediate_size, False)}

    if "linear_attention" in config.layer_types:
        feature_dim, head_dim = config.linear_feature_dim, config.linear_head_dim
        tokens = [zeros(1, 2, config.linear_num_heads, size) for size in (feature_dim, feature_dim, head_dim)]
        token = [x[:, :1] for x in tokens]
        shape = state_shape(1, config.linear_num_heads, feature_dim, head_dim)
        cache = TaylorCacheLayer()
        cache.update_recurrent_state(zeros(*shape, dtype=torch.float32))
        lazy_state, scale = cache.lazily(shape, *token[1:]), config.linear_scale
        ops.append(partial(taylor_attention, *tokens, scale=scale, output_final_state=True, **prefill))
        ops.append(partial(taylor_attention_lazy_step, *token, *lazy_state, scale=scale, **step))
        products.add((config.linear_num_heads * head_dim, False))

    if "sliding_attention" in config.layer_types:
        heads, window = (config.num_attention_heads, *[config.num_key_value_heads] * 2), config.sliding_window
        tokens = [zeros(1, 2, num_heads, config.head_dim) for num_heads in heads]
        tokens += [zeros(1, 2, config.head_dim, dtype=torch.float32) for _ in ("cos", "sin")]
        token = [x[:, :1] for x in tokens]
        ring, scale = WindowCacheLayer(window), config.head_dim**-0.5
        ring.lazy_initialization(token[1].transpose(1, 2), token[2].transpose(1, 2))
        if config._attn_implementation == "sdpa" and can_attend_fused(hidden_states, config.head_dim):
            ops.append(partial(sliding_attention, *tokens, window=window, scale=scale, **prefill))
        ops.append(partial(sliding_attention_step, *token, ring.keys, ring.values, ring.seen, scale=scale, **step))
        products.add((config.num_attention_heads * config.head_dim, False))

    if "conv" in config.layer_types:
        channels, kernel_size = config.conv_intermediate_size, config.conv_kernel_size
        projected, taps = zeros(1, 2, 2 * channels), zeros(channels, kernel_size)
        state, places = zeros(1, kernel_size - 1, channels), conv_places(prefill["mask"], hidden_states, kernel_size)
        ops.append(partial(gated_short_conv, projected, taps, places=places, output_final_state=True, **prefill))
        ops.append(partial(gated_short_conv_step, projected[:, :1], taps, state, **step))
        products.add((channels, config.conv_bias))

    if config.hidden_act == "silu":
        # Its tiles depend on whether there are rows enough.
        both = zeros(1, 1024, 2 * config.intermediate_size)
        ops.append(lambda: [swiglu(*both[:, :rows].chunk(2, dim=-1)) for rows in (1, 1024)])
    ops.append(partial(rms_norm, hidden_states, weight, config.rms_norm_eps, residual))
    with torch.no_grad():
        in_parts = {(num_parts(zeros(1, 1, size).expand(batch, -1, -1)), has_bias) for size, has_bias in products}
    for parts, has_bias in sorted(in_parts):
        if parts > 1:
            made = Parts(zeros(parts, 1, 2, config.hidden_size, dtype=torch.float32), weight if has_bias else None)
            ops.append(partial(rms_norm, made, weight, config.rms_norm_eps, residual))
    return ops
