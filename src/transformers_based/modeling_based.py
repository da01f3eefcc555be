# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Based: gated short convolution, Taylor linear attention and sliding-window attention, one mixer a layer.

    x = x + mixer_i(norm1(x));  x = x + mlp(norm2(x));  logits = lm_head(norm(x))

Hidden states are [B, T, C] throughout; the mixers work on [B, T, H, D], the attention interface of transformers on
[B, H, T, D]. Paper: arXiv 2402.18668; original code: github.com/HazyResearch/based, `based/models`.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from json import JSONDecodeError
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin, GenerationMode
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import (
    CONFIG_NAME,
    TransformersKwargs,
    auto_docstring,
    can_return_tuple,
    logging,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_based import DynamicWindowCacheLayer, TaylorCacheLayer, WindowCacheLayer, adopt_cache, check_shape
from .configuration_based import BasedConfig
from .decode_graph import (
    AheadOfTheStop,
    DecodeGraphs,
    RecordedStep,
    has_begun,
    obstacle_to_graphs,
    stays_at_home,
    step_masks,
)
from .integrations_based import register_integrations
from .kernel_builds import build_kernels
from .loss_based import causal_lm_loss, check_labels
from .ops import (
    Parts,
    at_least_fp32,
    can_attend_fused,
    can_convolve_fused,
    can_step_fused,
    conv_places,
    gated_short_conv,
    gated_short_conv_step,
    is_transformed,
    is_watched,
    lay_side_by_side,
    project,
    project_out,
    rms_norm,
    rotate,
    sliding_attention,
    sliding_attention_step,
    swiglu,
)
from .original_format import (
    UNREADABLE,
    config_from_original,
    find_file,
    find_weight_files,
    generation_config_values,
    is_original_config,
    read_weights,
    state_dict_from_original,
    strip_names,
)
from .taylor_attention import (
    is_lazy_step_faster,
    state_shape,
    taylor_attention,
    taylor_attention_lazy_step,
    taylor_attention_step,
    taylor_state,
)


# Below "transformers", so that its verbosity settings apply.
logger = logging.get_logger(f"transformers.{__name__}")


class PackedDocuments(NamedTuple):
    """Documents that share a row without seeing each other: `ids` [B, T], and their bounds `cu_seqlens` in [B * T]."""

    ids: torch.Tensor
    cu_seqlens: torch.Tensor


class WindowTokens(NamedTuple):
    """In place of a mask for the fused attention: which tokens exist `[B, past + T]`, and their documents `[B, T]`."""

    exist: torch.Tensor | None
    document_ids: torch.Tensor | None

    def contiguous(self) -> "WindowTokens":
        """Asked of every mask by the `generate` of transformers 5.23; these tensors are as the kernel wants them."""
        return self


class BasedRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(
        self, hidden_states: torch.Tensor | Parts, residual: torch.Tensor | None = None, in_place: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Of any dtype, in fp32 or better; the result has the weight's dtype, since the residual stream may be fp32. With
        a `residual`, which is added first, also the sum, over `residual` if `in_place`.
        """
        normed, total = rms_norm(hidden_states, self.weight, self.variance_epsilon, residual, in_place)
        return normed if residual is None else (normed, total)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class BasedMLP(nn.Module):
    shares_input = ("gate_proj", "up_proj")

    def __init__(self, config: BasedConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.writes_residual = True
        self.act_fn = ACT2FN[config.hidden_act]
        self.is_swiglu = config.hidden_act == "silu"

    def forward(self, hidden_states: torch.Tensor, may_be_parts: bool = False) -> torch.Tensor | Parts:
        gate, up = project(hidden_states, self.gate_proj, self.up_proj)
        hidden_states = swiglu(gate, up) if self.is_swiglu else self.act_fn(gate) * up
        del gate, up
        return project_out(hidden_states, self.down_proj, may_be_parts)


def _pads_first(exists: torch.Tensor) -> torch.Tensor:
    """The order `[B, N]` of the tokens of a row that brings those that do not exist to its front."""
    return exists.int().argsort(dim=1, stable=True)


def _reorder(x: torch.Tensor, order: torch.Tensor, dim: int) -> torch.Tensor:
    return x.gather(dim, _index(order, x, dim))


def _restore(x: torch.Tensor, order: torch.Tensor, dim: int) -> torch.Tensor:
    """Undoes `_reorder`."""
    return torch.empty_like(x).scatter(dim, _index(order, x, dim), x)


def _index(order: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    shape = [1] * x.ndim
    shape[0], shape[dim] = order.shape
    return order.view(shape).expand_as(x)


class BasedGatedConv1d(nn.Conv1d):
    """
    `silu(conv(u)) * g` of `[u, g]`, `[B, T, 2C]`: a causal depthwise convolution, a sum over its K taps accumulated in
    fp32; no bias. `weight` is `[C, 1, K]`, the last tap on the token itself.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, groups=channels, bias=False)

    def forward(
        self,
        projected: torch.Tensor,
        state: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        output_final_state: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            projected: `[B, T, 2C]`, the inputs and their gate side by side.
            state: `[B, K - 1, C]`, the last inputs before these; zeros at the start. A single token may change it in
                place.
            mask: `[B, T]`, bool. A token with False does not exist: its neighbours touch.
            document_ids: `[B, T]`; a tap never reaches into another document.
            places: what `conv_places` makes of the mask.
            output_final_state: whether the next state is needed.

        Returns:
            The output `[B, T, C]`, anything where the mask is False, and the next state if it is needed.
        """
        kernel_size = self.kernel_size[0]
        if state is not None and can_step_fused(projected, kernel_size, self.weight):
            return gated_short_conv_step(projected, self.weight.squeeze(1), state, mask), state
        if can_convolve_fused(projected, kernel_size, self.weight):
            return gated_short_conv(
                projected,
                self.weight.squeeze(1),
                state=state,
                mask=mask,
                places=places,
                document_ids=document_ids,
                output_final_state=output_final_state,
            )
        inputs, gate = projected.chunk(2, dim=-1)
        length, past = inputs.shape[1], kernel_size - 1
        inputs, order = _behind_state(past, state, inputs, mask)
        next_state = inputs[:, length:]
        if document_ids is not None:
            document_ids = nn.functional.pad(document_ids, (past, 0), value=-1)
            document_ids = document_ids if order is None else document_ids.gather(1, order)

        dtype = at_least_fp32(inputs.dtype)
        inputs, weight = inputs.to(dtype), self.weight.squeeze(1).to(dtype)
        output = inputs[:, past:] * weight[:, -1]
        for tap in range(past):
            shifted = inputs[:, tap : tap + length]
            if document_ids is not None:
                is_same = document_ids[:, tap : tap + length] == document_ids[:, past:]
                shifted = shifted.masked_fill(~is_same[..., None], 0)
            output = torch.addcmul(output, shifted, weight[:, tap])
        if order is not None:
            output = _restore(nn.functional.pad(output, (0, 0, past, 0)), order, dim=1)[:, past:]
        return (nn.functional.silu(output) * gate).to(gate.dtype), next_state


def _behind_state(past, state, inputs, mask):
    """
    `[B, past + T, C]`, the inputs behind the state. Tokens that do not exist move to the front, so that what exists is
    contiguous, the state included; then also the order `[B, past + T]` that did it.
    """
    if state is None:
        state = inputs.new_zeros(inputs.shape[0], past, inputs.shape[2])
    inputs = torch.cat([state, inputs], dim=1)
    if mask is None:
        return inputs, None
    exists = nn.functional.pad(mask, (past, 0), value=True)
    order = _pads_first(exists)
    return _reorder(inputs.masked_fill(~exists[..., None], 0), order, dim=1), order


def _conv_state(past, state, inputs, mask):
    """The state after these inputs, for the cache to redo recorded tokens."""
    return _behind_state(past, state, inputs, mask)[0][:, inputs.shape[1] :]


class BasedShortConv(nn.Module):
    """`out_proj(silu(conv(u)) * g)` with `u, g = in_proj(x)`; `BaseConv` in the original `mixers/convolution.py`."""

    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        channels = config.conv_intermediate_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * channels, bias=config.conv_bias)
        self.conv = BasedGatedConv1d(channels, config.conv_kernel_size)
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=config.conv_bias)
        self.out_proj.writes_residual = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        documents: PackedDocuments | None = None,
        conv_places: torch.Tensor | None = None,
        may_be_parts: bool = False,
        **kwargs,
    ) -> torch.Tensor | Parts:
        projected = self.in_proj(hidden_states)
        batch, length, channels = projected.shape[0], projected.shape[1], self.conv.in_channels
        past = self.conv.kernel_size[0] - 1
        layer: TaylorCacheLayer | None = None
        state = None
        if past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            layer.record(partial(_conv_state, past), projected[..., :channels], attention_mask)
            state = layer.read(batch, past, channels, dtype=projected.dtype)
            layer.count(length)
        output, next_state = self.conv(
            projected,
            state,
            mask=attention_mask,
            document_ids=documents.ids if documents is not None else None,
            places=conv_places,
            output_final_state=layer is not None,
        )
        if layer is not None and next_state is not state:
            layer.update_recurrent_state(next_state)
        del projected
        return project_out(output, self.out_proj, may_be_parts)


class BasedLinearAttention(nn.Module):
    """Linear attention, see taylor_attention.py; `LinearAttention` in the original `mixers/linear_attention.py`."""

    shares_input = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.feature_dim, self.head_dim, self.scaling = (
            config.linear_feature_dim,
            config.linear_head_dim,
            config.linear_scale,
        )
        key_size, value_size = (config.linear_num_heads * size for size in (self.feature_dim, self.head_dim))
        self.q_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, value_size, bias=False)
        self.o_proj = nn.Linear(value_size, config.hidden_size, bias=False)
        self.o_proj.writes_residual = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        documents: PackedDocuments | None = None,
        may_be_parts: bool = False,
        **kwargs,
    ) -> torch.Tensor | Parts:
        batch, length, _ = hidden_states.shape
        # [B, T, H, D] twice and [B, T, H, V]
        query, key, value = (
            x.view(batch, length, -1, size)
            for x, size in zip(
                project(hidden_states, self.q_proj, self.k_proj, self.v_proj),
                (self.feature_dim, self.feature_dim, self.head_dim),
            )
        )
        options = {"scale": self.scaling, "mask": attention_mask}
        if documents is not None:
            flat = [x.reshape(1, batch * length, *x.shape[2:]) for x in (query, key, value)]
            options["mask"] = attention_mask.reshape(1, -1) if attention_mask is not None else None
            output, _ = taylor_attention(*flat, cu_seqlens=documents.cu_seqlens, **options)
        elif past_key_values is None:
            output, _ = taylor_attention(query, key, value, **options)
        else:
            layer: TaylorCacheLayer = past_key_values.layers[self.layer_idx]
            layer.scale = self.scaling
            shape = state_shape(batch, query.shape[2], self.feature_dim, self.head_dim)
            goes_on = layer.has_previous_state[0] and not torch.is_grad_enabled()
            holds = goes_on and attention_mask is None and layer.can_hold(length)
            if not holds:
                layer.record(partial(taylor_state, scale=self.scaling), key, value, attention_mask)
            is_lazy = holds or (not layer.record_past and is_lazy_step_faster(query, value))
            if goes_on and length == 1 and is_lazy:
                lazy_state = layer.lazily(shape, key, value)
                output = taylor_attention_lazy_step(query, key, value, *lazy_state, **options)
            elif goes_on and length == 1:
                output = taylor_attention_step(query, key, value, layer.read(*shape), **options)
            else:
                state = layer.read(*shape)
                output, state = taylor_attention(
                    query, key, value, initial_state=state, output_final_state=not holds, **options
                )
                if holds:
                    layer.hold(shape, key, value)
                else:
                    layer.update_recurrent_state(state)
            layer.count(length)
        return project_out(output.reshape(batch, length, -1), self.o_proj, may_be_parts)


class BasedAttention(nn.Module):
    """Softmax attention in a window, with rotary; `SlidingAttention` in the original `mixers/slide_attention.py`."""

    shares_input = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.sliding_window = config.sliding_window
        self.is_causal = True
        query_size, key_size = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.o_proj.writes_residual = True

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        documents: PackedDocuments | None = None,
        key_order: torch.Tensor | None = None,
        exists: torch.Tensor | None = None,
        may_be_parts: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | Parts, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        # [B, T, H, D]
        query, key, value = (
            x.view(batch, length, -1, self.head_dim)
            for x in project(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        )
        layer = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        if layer is not None and layer.keys is not None and layer.keys.ndim == 4:
            check_shape(layer.keys, (batch, key.shape[2], layer.keys.shape[2], self.head_dim))
            if layer.keys.dtype != value.dtype:
                # Filled by a model of another dtype.
                layer.keys, layer.values = layer.keys.to(value.dtype), layer.values.to(value.dtype)
        is_ring = isinstance(layer, WindowCacheLayer)
        if is_ring and _is_step(attention_mask):
            output = self._step(query, key, value, position_embeddings, layer, attention_mask)
            return project_out(output.reshape(batch, 1, -1), self.o_proj, may_be_parts), None
        if isinstance(attention_mask, WindowTokens) and can_attend_fused(value, self.head_dim):
            past = (None, None)
            if layer is not None:
                past = self._remember(key, value, position_embeddings, past_key_values, exists)
            output = sliding_attention(
                query,
                key,
                value,
                *position_embeddings,
                window=self.sliding_window,
                scale=self.scaling,
                mask=attention_mask.exist,
                document_ids=attention_mask.document_ids,
                past_keys=past[0],
                past_values=past[1],
            )
            return project_out(output.reshape(batch, length, -1), self.o_proj, may_be_parts), None

        # [B, H, T, D]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        rotated_query, rotated_key = apply_rotary_pos_emb(query, key, *position_embeddings)
        query, key = rotated_query.to(value.dtype), rotated_key.to(value.dtype)
        if exists is not None:
            # What stands under padding may be NaN, which a weight of 0 lets through.
            key, value = (x.masked_fill(~exists[:, None, :, None], 0) for x in (key, value))
        if is_ring:
            key, value = layer.append(key, value, exists)
            layer.count(length)
        elif layer is not None:
            num_keys, _ = past_key_values.get_mask_sizes(length, self.layer_idx)
            key, value = past_key_values.update(key, value, self.layer_idx)
            # transformers 5.17 returns more than the mask covers after `reset` and while recording for `crop`.
            key, value = key[:, :, -num_keys:], value[:, :, -num_keys:]
        past_length = key.shape[2] - length
        if isinstance(layer, DynamicWindowCacheLayer) and (key_order is not None or layer.exists is not None):
            new = exists if exists is not None else torch.ones_like(key[:, 0, :length, 0], dtype=torch.bool)
            key, value = layer.put_padding_first(key, value, new)
        elif key_order is not None:
            key, value = (_reorder(x, key_order, dim=2) for x in (key, value))
        if key_order is not None:
            query = _reorder(nn.functional.pad(query, (0, 0, past_length, 0)), key_order, dim=2)[:, :, past_length:]

        if isinstance(attention_mask, WindowTokens):
            # The layer is elsewhere than the tokens: no kernel there.
            attention_mask = _block_mask(
                self.config,
                hidden_states,
                attention_mask.exist,
                past_length,
                0,
                attention_mask.document_ids,
                max(self.sliding_window, _MIN_BLOCK),
            )
        blocks = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 5:
            blocks = attention_mask.shape[1]
            query, key, value, attention_mask = _cut_in_blocks(query, key, value, attention_mask, self.sliding_window)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        if blocks is not None:
            output, weights = output.reshape(batch, -1, *output.shape[2:])[:, :length], None
        if key_order is not None:
            output = nn.functional.pad(output, (0, 0, 0, 0, past_length, 0))
            output = _restore(output, key_order, dim=1)[:, past_length:]
            if weights is not None:
                weights = _restore(nn.functional.pad(weights, (0, 0, past_length, 0)), key_order, dim=2)
                weights = _restore(weights[:, :, past_length:], key_order, dim=3)
        return project_out(output.reshape(batch, length, -1), self.o_proj, may_be_parts), weights

    def _step(self, query, key, value, position_embeddings, layer: WindowCacheLayer, mask):
        if not layer.is_initialized:
            layer.lazy_initialization(key.transpose(1, 2), value.transpose(1, 2))
        output = sliding_attention_step(
            query, key, value, *position_embeddings, layer.keys, layer.values, layer.seen, scale=self.scaling, mask=mask
        )
        layer.count(1)
        return output

    def _remember(self, key, value, position_embeddings, past_key_values, exists):
        """
        The keys (rotated) and values before these tokens, `[B, H, P, D]`, or `None` twice. Of these tokens, only those
        that the cache goes on to hold are rotated.
        """
        layer, length = past_key_values.layers[self.layer_idx], key.shape[1]
        past_length = past_key_values.get_mask_sizes(length, self.layer_idx)[0] - length
        held = length if getattr(layer, "record_past", False) else min(length, self.sliding_window)
        key, value, *angles = (x[:, -held:] for x in (key, value, *position_embeddings))
        key, value = rotate(key, *angles).to(value.dtype).transpose(1, 2), value.transpose(1, 2)
        if isinstance(layer, WindowCacheLayer):
            past = layer.window() if past_length else (None, None)
            if exists is None:
                layer.store(key, value, None, left_out=length - held)
            else:
                # Padding is on the left (else these tokens had another order): a row with some here has none before.
                left_out = exists[:, :-held].sum(dim=1, keepdim=True)
                layer.store(key, value, exists[:, -held:], left_out)
            layer.count(length)
            return past
        known = past_key_values.update(key, value, self.layer_idx)
        # To transformers' window, the others have been there too.
        layer.cumulative_length += length - held
        # transformers 5.17 returns more than the mask covers after `reset` and while recording for `crop`.
        return tuple(x[:, :, -held - past_length : -held] if past_length else None for x in known)


def _is_step(attention_mask: torch.Tensor | None) -> bool:
    """Whether this is the mask `[B, 1]` of `sliding_attention_step`."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] == 1


def _cut_in_blocks(query, key, value, mask, window):
    """
    Sliding attention as plain attention inside blocks of N queries, each with the N + W - 1 keys it can reach, so that
    its cost is linear in T. The blocks become rows of the batch: [B, H, T, D] -> [B * blocks, H, N, D].
    """
    batch, _, length, _ = query.shape
    blocks, block_size = mask.shape[1], mask.shape[3]
    tail = blocks * block_size - length
    head = window - 1 - (key.shape[2] - length)

    def cut(x, before, size):
        x = nn.functional.pad(x, (0, 0, before, tail)).unfold(2, size, block_size)  # [B, H, blocks, D, size]
        return x.permute(0, 2, 1, 4, 3).flatten(0, 1)

    query, key, value = cut(query, 0, block_size), *(cut(x, head, block_size + window - 1) for x in (key, value))
    return query, key, value, mask.expand(batch, -1, -1, -1, -1).flatten(0, 1)


# Blocks shorter than this cost more in launches than they save in arithmetic.
_MIN_BLOCK = 64


def _make_masks(
    config: BasedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    documents: PackedDocuments | None = None,
    output_attentions: bool = False,
) -> dict[str, torch.Tensor | None]:
    """
    What each layer type needs to know of padding, made once a forward from the `[B, past + T]` attention mask.

    Recurrent layers get a bool `[B, T]`, or `None` if every token exists; attention what its implementation takes, the
    mask of `_block_mask`, or `WindowTokens` for the fused one. Under "key_order": `[B, keys]`, which brings the keys of
    tokens that exist together, behind the padding; `None` if they are, or if padding behind them is in nobody's way.
    Under "conv_places": see `conv_places` of ops.py.
    """
    batch, length = inputs_embeds.shape[:2]
    layer = None
    if past_key_values is not None and "sliding_attention" in config.layer_types:
        layer = past_key_values.layers[config.layer_types.index("sliding_attention")]
    is_ring = isinstance(layer, WindowCacheLayer)
    # For single tokens on a GPU, waiting for the values would cost more than it is worth.
    looks = not torch.compiler.is_compiling() and (
        length > 1 or inputs_embeds.device.type == "cpu" or not (layer is None or is_ring)
    )
    is_given = attention_mask is not None
    attention_mask = _checked(attention_mask, inputs_embeds, past_key_values, looks)
    tokens = attention_mask[:, -length:] if attention_mask is not None else None
    if tokens is not None and looks and tokens.all():
        tokens = None
    masks = {"conv": tokens, "linear_attention": tokens, "key_order": None}
    if "conv" in config.layer_types and (length > 1 or torch.is_grad_enabled()):
        masks["conv_places"] = conv_places(tokens, inputs_embeds, config.conv_kernel_size)
    if "sliding_attention" not in config.layer_types:
        return masks

    document_ids = documents.ids if documents is not None else None
    # Other layers of a cache may hold the past, or fetch it, in ways of their own.
    fuses = (
        config._attn_implementation == "sdpa"
        and not output_attentions
        and (is_ring or layer is None or (type(layer) is DynamicWindowCacheLayer and layer.exists is None))
        and can_attend_fused(inputs_embeds, config.head_dim)
    )
    if is_ring:
        if is_given and looks and layer.is_initialized:
            past = (
                past_key_values.get_seq_length() if attention_mask is None else attention_mask[:, :-length].sum(dim=1)
            )
            if (layer.seen[:, 0] != past).any():
                raise ValueError(
                    "`attention_mask` hides more or fewer tokens of the past than `past_key_values` has seen hidden: "
                    "pass the mask of that time, followed by that of the new tokens."
                )
        new = tokens if tokens is not None else inputs_embeds.new_ones(batch, length, dtype=torch.bool)
        if length == 1 and not output_attentions and not torch.is_grad_enabled():
            masks["sliding_attention"] = new
            return masks
        past_length, offset = layer.past_length(), 0
        exists = new
        if past_length:
            is_kept = torch.arange(past_length, 0, -1, device=new.device) <= layer.seen[:, :1]
            exists = torch.cat([is_kept, new], dim=1)
        attention_mask = exists if past_length or tokens is not None else None
        moves = tokens is not None and (not looks or _has_padding_behind_tokens(exists))
    else:
        past_length, offset = 0, 0
        if isinstance(layer, DynamicWindowCacheLayer) and looks:
            if layer.has_padding and not is_given:
                raise ValueError(
                    "`past_key_values` has seen padding: pass its `attention_mask`, followed by that of the new tokens."
                )
            layer.has_padding = layer.has_padding or tokens is not None
        if past_key_values is not None:
            num_keys, offset = layer.get_mask_sizes(length)
            past_length = num_keys - length
        # A compiled graph cannot ask: training reorders in any case. What `generate` compiles has a static cache.
        moves = _has_padding_behind_tokens(attention_mask) if looks else layer is None and attention_mask is not None
        if moves and fuses and layer is None and looks:
            # Nothing is kept of these tokens: padding behind the last of them may stay where it is.
            moves = _has_padding_between_tokens(attention_mask)
        if moves:
            if layer is not None and not isinstance(layer, DynamicWindowCacheLayer):
                raise ValueError(
                    f"Padding behind tokens that exist moves tokens in the window, which a {type(layer).__name__} "
                    f"cannot with {config._attn_implementation}: use a dynamic cache, sdpa, or pad on the left."
                )
            seen = attention_mask[:, :-length].sum(dim=1, keepdim=True)
            is_kept = torch.arange(past_length, 0, -1, device=attention_mask.device) <= seen
            exists = torch.cat([is_kept, attention_mask[:, -length:]], dim=1)
    if moves:
        masks["key_order"] = _pads_first(exists)
        attention_mask = nn.functional.pad(exists.gather(1, masks["key_order"]), (offset, 0))
        document_ids = document_ids.gather(1, masks["key_order"]) if document_ids is not None else None

    if fuses and not moves:
        # A copy where a part is taken: a kernel wants addresses that are multiples of 16.
        exist = attention_mask[:, offset:].contiguous() if attention_mask is not None else None
        masks["sliding_attention"] = WindowTokens(exist, document_ids)
        return masks
    is_plain = config._attn_implementation in ("sdpa", "eager")
    block_size = max(config.sliding_window, _MIN_BLOCK)
    if is_plain and not output_attentions and length >= 4 * block_size:
        masks["sliding_attention"] = _block_mask(
            config, inputs_embeds, attention_mask, past_length, offset, document_ids, block_size
        )
    elif is_ring:
        mask = _block_mask(config, inputs_embeds, attention_mask, past_length, offset, document_ids, length)
        masks["sliding_attention"] = mask[:, 0, :, :, config.sliding_window - 1 - past_length :]
    else:
        masks["sliding_attention"] = create_sliding_window_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            and_mask_function=_same_document(document_ids) if document_ids is not None else None,
        )
    return masks


def _checked(
    attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, past_key_values: Cache | None, looks: bool
) -> torch.Tensor | None:
    """The attention mask as bool, `None` if it hides nothing. Its values are checked if it `looks` at them."""
    if attention_mask is None:
        return None
    past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
    expected = (inputs_embeds.shape[0], past_length + inputs_embeds.shape[1])
    if attention_mask.shape != expected:
        raise _wrong_mask(f"here {expected}", attention_mask)
    exists = attention_mask == 1
    if looks:
        if exists.all():
            return None
        if not (exists | (attention_mask == 0)).all():
            raise ValueError("`attention_mask` must hold 1 for tokens that exist and 0 for padding, nothing else.")
    return exists


def _wrong_mask(fits: str, attention_mask: torch.Tensor) -> ValueError:
    return ValueError(
        f"`attention_mask` must be [batch, past + new tokens], {fits}; got {tuple(attention_mask.shape)}. Recurrent "
        "layers cannot follow a mask with more dimensions."
    )


def _check_positions(position_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> None:
    if position_ids is None:
        return
    batch, length = inputs_embeds.shape[:2]
    if position_ids.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"`position_ids` must be [batch, tokens] = {(batch, length)}; got {tuple(position_ids.shape)}."
        )
    # For single tokens on a GPU, waiting for the answer would cost more than it is worth.
    is_cheap = length > 1 or position_ids.device.type == "cpu"
    if is_cheap and not torch.compiler.is_compiling() and (position_ids < 0).any():
        raise ValueError(f"`position_ids` must not be negative; got {int(position_ids.min())}.")


def _next_position(cache: Cache | None) -> int | torch.Tensor:
    """Of the first new token: a number, or `[B, 1]` from a ring, which knows how many tokens of each row exist."""
    for layer in cache.layers if cache is not None else ():
        if isinstance(layer, WindowCacheLayer) and layer.is_initialized:
            return layer.seen[:, :1]
    return cache.get_seq_length() if cache is not None else 0


def _has_padding_behind_tokens(attention_mask: torch.Tensor | None) -> bool:
    if attention_mask is None:
        return False
    return bool((attention_mask[:, :-1] & ~attention_mask[:, 1:]).any())


def _has_padding_between_tokens(attention_mask: torch.Tensor) -> bool:
    starts = attention_mask & ~nn.functional.pad(attention_mask, (1, 0))[:, :-1]
    return bool((starts.sum(dim=1) > 1).any())


def _block_mask(
    config: BasedConfig,
    like: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_length: int,
    offset: int,
    document_ids: torch.Tensor | None,
    block_size: int,
) -> torch.Tensor:
    """
    The mask for `_cut_in_blocks`, `[B or 1, blocks, 1, N, N + W - 1]`, for T new tokens behind `past_length` cached
    keys, the first of them token `offset` of the row.
    """
    length, window, device = like.shape[1], config.sliding_window, like.device
    blocks = -(-length // block_size)
    size, head, tail = block_size + window - 1, window - 1 - past_length, blocks * block_size - length
    exists = torch.ones(1, past_length + length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        exists = attention_mask[:, offset : offset + past_length + length]
    exists = nn.functional.pad(exists, (head, tail)).unfold(1, size, block_size)[:, :, None]  # [B, blocks, 1, size]
    distance = torch.arange(size, device=device) - torch.arange(block_size, device=device)[:, None]
    mask = (distance >= 0) & (distance < window) & exists
    if document_ids is not None:
        of_key = nn.functional.pad(document_ids, (head, tail), value=-1).unfold(1, size, block_size)
        of_query = nn.functional.pad(document_ids, (0, tail), value=-1).unflatten(1, (blocks, block_size))
        mask = mask & (of_query[..., None] == of_key[:, :, None])
    # A query sees its own key even if it is padding: a row that sees nothing would be NaN.
    mask = (mask | (distance == window - 1))[:, :, None]
    if config._attn_implementation == "eager":
        mask = torch.zeros((), dtype=like.dtype, device=device).where(mask, torch.finfo(like.dtype).min)
    return mask


def _same_document(document_ids: torch.Tensor) -> Callable:
    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        return document_ids[batch_idx, q_idx] == document_ids[batch_idx, kv_idx]

    return mask_function


def _checked_bounds(
    inputs_embeds: torch.Tensor, cu_seq_lens_q: torch.Tensor | None, cu_seq_lens_k: torch.Tensor | None
) -> torch.Tensor | None:
    """The bounds of the packed documents, `None` without."""
    if cu_seq_lens_q is None and cu_seq_lens_k is None:
        return None
    for name, x in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if x is not None and not isinstance(x, torch.Tensor):
            raise ValueError(f"`{name}` must be a tensor of integers; got {type(x).__name__}.")
    batch, length = inputs_embeds.shape[:2]
    bounds, of_keys = (x.tolist() if x is not None else None for x in (cu_seq_lens_q, cu_seq_lens_k))
    if bounds is not None:
        rises = cu_seq_lens_q.ndim == 1 and all(a < b for a, b in pairwise(bounds))
        if batch != 1 or not rises or bounds[:1] != [0] or bounds[-1:] != [length]:
            raise ValueError(
                f"`cu_seq_lens_q` must rise from 0 to the number of tokens ({length}) of a batch of one row; got "
                f"{bounds} and {batch} rows."
            )
    if of_keys not in (None, bounds):
        raise ValueError(
            "`cu_seq_lens_k` must be `cu_seq_lens_q`, since a document's keys are its own tokens; got "
            f"`cu_seq_lens_q` {bounds} and `cu_seq_lens_k` {of_keys}."
        )
    return cu_seq_lens_q


def _packed_documents(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
) -> PackedDocuments | None:
    """
    The documents that share rows, from `cu_seq_lens`, else `seq_idx`, else positions that do not go on from the last
    token that exists; `None` if each row is one document.

    Raises:
        ValueError: two of them tell of different documents, where no mask says which tokens exist.
    """
    (batch, length), device = inputs_embeds.shape[:2], inputs_embeds.device
    if attention_mask is not None and (
        attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length
    ):
        raise _wrong_mask(f"here {batch} rows of {length} or more", attention_mask)
    if seq_idx is not None and seq_idx.shape != (batch, length):
        raise ValueError(f"`seq_idx` must be [batch, tokens] = {(batch, length)}; got {tuple(seq_idx.shape)}.")
    hints = sum(x is not None for x in (position_ids, seq_idx, cu_seq_lens))
    if hints > 1 and attention_mask is not None and attention_mask.shape[1] == length and (attention_mask == 1).all():
        attention_mask = None
    found = {}
    if cu_seq_lens is not None:
        ids = torch.searchsorted(cu_seq_lens[1:], torch.arange(length, device=device), right=True)[None]
        found["cu_seq_lens_q"] = ids[:, 1:] != ids[:, :-1]
    if seq_idx is not None:
        found["seq_idx"] = seq_idx[:, 1:] != seq_idx[:, :-1]
    if position_ids is not None and length > 1 and (attention_mask is None or not found):
        before, apart = position_ids[:, :-1], 1
        if attention_mask is not None:
            # The last token that exists before each; where there is none, no document has begun.
            exists = attention_mask[:, -length:].bool()
            last = torch.where(exists, torch.arange(length, device=device), -1).cummax(dim=1).values[:, :-1]
            before = position_ids.expand(batch, -1).gather(1, last.clamp_min(0))
            # Positions may count padding too.
            apart = torch.arange(1, length, device=device) - last
        step = position_ids[:, 1:] - before
        starts = (step != 1) & (step != apart)
        if attention_mask is not None:
            starts = starts & exists[:, 1:] & (last >= 0)
        found["position_ids"] = starts
    if not found:
        return None
    (name, starts), *others = found.items()
    if attention_mask is None:
        for other, its_starts in others:
            if not _agree(starts, its_starts, position_ids if other == "position_ids" else None):
                raise ValueError(f"`{name}` and `{other}` tell of different documents: leave one of them out.")
    if not starts.any():
        return None
    starts = nn.functional.pad(starts.expand(batch, -1), (1, 0), value=True)
    bounds = starts.flatten().nonzero().flatten()
    cu_seqlens = nn.functional.pad(bounds, (0, 1), value=batch * length).to(torch.int32)
    return PackedDocuments(ids=starts.int().cumsum(dim=1), cu_seqlens=cu_seqlens)


def _agree(starts: torch.Tensor, other: torch.Tensor, position_ids: torch.Tensor | None) -> bool:
    """Whether documents start where `other`, that of `position_ids` if these are given, has them start."""
    if position_ids is None:
        return not (starts != other).any()
    # Positions may as well count on through all documents, stand still on padding, or leave some out.
    step = position_ids.diff(dim=1)
    return not ((step < 0) & ~starts | starts & ~other & (step <= 0).any()).any()


class BasedDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: BasedConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == "conv":
            self.conv = BasedShortConv(config, layer_idx)
        elif self.layer_type == "linear_attention":
            self.linear_attn = BasedLinearAttention(config, layer_idx)
        else:
            self.self_attn = BasedAttention(config, layer_idx)
        self.mlp = BasedMLP(config)
        self.input_layernorm = BasedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = BasedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        update: torch.Tensor | Parts | None = None,
        defers_sums: bool = False,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | Parts]:
        """
        If it `defers_sums`, it returns its input after the mixer and the `update` of its MLP, for the next layer to add
        them in one kernel with its norm.
        """
        parts = {"may_be_parts": True} if defers_sums and self._may_make_parts() else {}
        residual = hidden_states
        # Then `residual` is a sum that the layer before made, and nobody else looks at it any more.
        in_place = update is not None and not torch.is_grad_enabled() and not _are_all_watched()
        if update is None:
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(update, residual, in_place=in_place)
        if self.layer_type == "conv":
            hidden_states = self.conv(hidden_states, **kwargs, **parts)
        elif self.layer_type == "linear_attention":
            hidden_states = self.linear_attn(hidden_states, **kwargs, **parts)
        else:
            hidden_states, _ = self.self_attn(hidden_states, **kwargs, **parts)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual, in_place=in_place)
        update = self.mlp(hidden_states, **parts)
        return (residual, update) if defers_sums else residual + update

    def _may_make_parts(self) -> bool:
        """Whether only the norms see what mixer and MLP make, and these are ours: a user may have put others there."""
        if torch.is_grad_enabled() or _are_all_watched():
            return False
        ours = (BasedShortConv, BasedLinearAttention, BasedAttention, BasedMLP)
        inner = [module for name, module in self.named_children() if not name.endswith("layernorm")]
        return all(type(module) in ours and not is_watched(module) for module in inner)


def _can_defer_sums(layers: nn.ModuleList, norm: nn.Module) -> bool:
    """
    Whether each layer may leave its last sum to the next one's norm: nobody else sees what goes from layer to layer
    (hooks, such as those of `output_hidden_states`, and wrappers expect the residual stream in one tensor), and nobody
    keeps it, as checkpointing does, which would then keep two.
    """
    for layer in layers:
        if type(layer) is not BasedDecoderLayer or (layer.gradient_checkpointing and layer.training):
            return False
        if any(map(is_watched, (layer, layer.input_layernorm, layer.post_attention_layernorm))):
            return False
    return not is_watched(norm)


def _are_all_watched() -> bool:
    """By a compiler, `torch.func`, or hooks for all modules at once: any of them may keep what it sees."""
    return torch.compiler.is_compiling() or is_transformed() or nn.modules.module._has_any_global_hook()


# Each asks `from_pretrained` for other weights than those in the usual files.
OPTIONS_FOR_OTHER_WEIGHTS = {"ignore_mismatched_sizes", "state_dict", "use_safetensors", "variant"}


@auto_docstring
class BasedPreTrainedModel(PreTrainedModel):
    config: BasedConfig
    config_class = BasedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BasedDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The state rolls back exactly (cache_based.py), so assisted decoding works.
    _is_stateful = False
    _can_record_outputs = {"hidden_states": BasedDecoderLayer, "attentions": BasedAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the original `special_initializer`: what writes into the residual stream starts smaller with depth."""
        super()._init_weights(module)
        if getattr(module, "writes_residual", False):
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        As everywhere in transformers; a folder or Hub repository in the original layout loads as well.

        Raises:
            ValueError: a checkpoint that is truncated, or an original one that is incomplete or not for its config; a
                config that is damaged, or asks for far more weights than the files hold. The message says which file
                or field.
        """
        hub = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        hub_kwargs = {name: kwargs[name] for name in hub if kwargs.get(name) is not None}
        source, config_dict = str(pretrained_model_name_or_path), {}
        has_config = pretrained_model_name_or_path is not None and kwargs.get("gguf_file") is None
        if has_config:
            config_dict, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
        if not is_original_config(config_dict):
            base = _original_base(source, hub_kwargs) if has_config and "model_type" not in config_dict else None
            if base is not None:
                return cls._from_adapters(source, base, hub_kwargs, *model_args, config=config, **kwargs)
            if has_config and config is None and "model_type" not in config_dict:
                # Of an empty config transformers would build a whole based-360m.
                if find_file(source, CONFIG_NAME, **hub_kwargs):
                    raise ValueError(f"The config.json of {source} has no `model_type`.")
            elif has_config and not kwargs.keys() & OPTIONS_FOR_OTHER_WEIGHTS:
                given = isinstance(config, PreTrainedConfig)
                _check_size(source, config if given else BasedConfig.from_dict(dict(config_dict)), hub_kwargs)
            try:
                return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            except OSError:
                # transformers' own, which name the file.
                raise
            except UNREADABLE as error:
                raise ValueError(f"The weights of {source} are truncated or no checkpoint: {error}") from error
            except (AttributeError, IndexError, KeyError, JSONDecodeError) as error:
                raise ValueError(f"{source} cannot be loaded: {error!r}") from error

        weights, dropped, files = {}, [], find_weight_files(source, **hub_kwargs)
        for path in files:
            part, junk = strip_names(read_weights(path))
            weights.update(part)
            dropped += junk
        source = files[0] if len(files) == 1 else source
        if dropped:
            logger.warning(f"{source}: dropped {', '.join(sorted(dropped))}: no weights of the model.")
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        if not isinstance(config, PreTrainedConfig):
            kwargs = {name: value for name, value in kwargs.items() if name not in hub}
            config, kwargs = BasedConfig.from_dict(
                {"model_type": "based", **config_from_original(config_dict, shapes)},
                return_unused_kwargs=True,
                **kwargs,
            )
        state_dict = state_dict_from_original(weights, config, _weight_shapes(config), source)
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=state_dict, **kwargs)
        model, info = loaded if isinstance(loaded, tuple) else (loaded, None)
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        if model.can_generate() and kwargs.get("generation_config") is None:
            model.generation_config.update(**generation_config_values(config))
        if info is None:
            return model
        info["unexpected_keys"] = set(info["unexpected_keys"]) | set(dropped)
        return model, info

    @classmethod
    def _from_adapters(cls, source: str, base: str, hub_kwargs: dict, *model_args, **kwargs):
        """transformers would look in `base`, which is in the original layout, for weights by the names of its own."""
        of_adapters = hub_kwargs | (kwargs.pop("adapter_kwargs", None) or {})
        name, wants_info = kwargs.pop("adapter_name", "default"), kwargs.pop("output_loading_info", False)
        of_base = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
        model = cls.from_pretrained(base, *model_args, **of_base)
        info = model.load_adapter(source, adapter_name=name, adapter_kwargs=of_adapters)
        return (model, info.to_dict()) if wants_info else model

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, *args, **kwargs):
        """Called by transformers between building the model and reading its weights."""
        if distributed_config is not None:
            sizes = (getattr(distributed_config, name, None) or 1 for name in ("tp_size", "pp_size"))
            model.config.check_parallel_plan(*sizes, distributed_config.tp_plan)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """As everywhere in transformers; the config also tells where each head is in the model code that goes along."""
        if self._auto_class is not None:
            self.config.auto_map = {
                "AutoConfig": "configuration_based.BasedConfig",
                **{auto: f"modeling_based.{model_class.__name__}" for auto, model_class in AUTO_CLASSES.items()},
            }
        # transformers saves the file where the class is made.
        own_class = type(self)
        self.__class__ = _made_here(own_class)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.__class__ = own_class

    def _get_name(self) -> str:
        """By which Trainer finds out whether it is to shift labels that it smooths."""
        return _made_here(type(self)).__name__


def _made_here(model_class: type) -> type:
    """FSDP2 gives a model a class of its own making."""
    return next(x for x in model_class.__mro__ if not x.__name__.startswith("FSDP"))


def _original_base(source: str, hub_kwargs: dict) -> str | None:
    """The base model that a folder or repository of adapters names, where that is in the original layout."""
    path = find_file(source, "adapter_config.json", **hub_kwargs)
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            base = json.load(file).get("base_model_name_or_path")
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    if not base:
        return None
    of_base = {key: value for key, value in hub_kwargs.items() if key not in ("revision", "subfolder")}
    return base if is_original_config(PreTrainedConfig.get_config_dict(base, **of_base)[0]) else None


def _check_size(source: str, config: BasedConfig, hub_kwargs: dict) -> None:
    """
    Refuses a config that asks for far more weights than the files hold (four a byte): transformers makes room for
    weights that are missing or of another size before it complains, and a damaged config could ask for any number.
    """
    try:
        files = find_weight_files(source, **hub_kwargs)
    except OSError:
        # transformers knows more names of files, and says which it misses.
        return
    attention = config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    linear = config.linear_num_heads * (config.linear_feature_dim + config.linear_head_dim)
    columns = {
        "conv": 3 * config.conv_intermediate_size,
        "linear_attention": 2 * linear,
        "sliding_attention": 2 * attention,
    }
    rows = config.vocab_size + sum(3 * config.intermediate_size + columns[kind] for kind in config.layer_types)
    kernels = config.layer_types.count("conv") * config.conv_intermediate_size * config.conv_kernel_size
    weights, size = config.hidden_size * rows + kernels, sum(os.path.getsize(path) for path in files)
    if weights > 4 * size + 2**24:
        raise ValueError(
            f"The config of {source} asks for {weights:,} weights, its files hold {size:,} bytes: {files[0]} ..."
        )


def _weight_shapes(config: BasedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in BasedForCausalLM(config).state_dict().items()}


@auto_docstring
class BasedModel(BasedPreTrainedModel):
    def __init__(self, config: BasedConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(BasedDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = BasedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        seq_idx (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            The document of each token where several share a row. `cu_seq_lens_q` or `position_ids` that restart say the
            same. Documents do not see each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        length = inputs_embeds.shape[1]
        _check_positions(position_ids, inputs_embeds)
        masks = attention_mask if isinstance(attention_mask, dict) else None
        documents = None
        if masks is None:
            bounds = _checked_bounds(inputs_embeds, kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"))
            documents = _packed_documents(inputs_embeds, attention_mask, position_ids, seq_idx, bounds)
        if documents is not None and past_key_values is not None:
            raise ValueError(
                "Packed documents (`cu_seq_lens_q`, `seq_idx` or restarting `position_ids`) leave no one state to go "
                "on from: call the model without `past_key_values`, or with one document a row."
            )
        if past_key_values is not None and self.training and self.gradient_checkpointing:
            raise ValueError(
                "Gradient checkpointing runs each layer twice, which `past_key_values` cannot follow: train without a "
                "cache, or call `model.gradient_checkpointing_disable()`."
            )
        if use_cache and past_key_values is None and documents is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            adopt_cache(past_key_values, self.config, batch_size=inputs_embeds.shape[0], new_tokens=length)
            tells_of_documents = seq_idx is not None or kwargs.get("cu_seq_lens_q") is not None
            if tells_of_documents and past_key_values.get_seq_length() > 0:
                raise ValueError(
                    "`seq_idx` and `cu_seq_lens_q` do not say whether the first document goes on from "
                    "`past_key_values`: leave them out if it does, and the cache if it does not."
                )

        if masks is None:
            masks = _make_masks(
                self.config,
                inputs_embeds,
                attention_mask,
                past_key_values,
                documents,
                output_attentions=kwargs.get("output_attentions", self.config.output_attentions),
            )
        position_embeddings = None
        if "sliding_attention" in self.config.layer_types:
            if position_ids is None and isinstance(attention_mask, torch.Tensor):
                position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -length:]
            elif position_ids is None:
                position_ids = torch.arange(length, device=inputs_embeds.device)[None] + _next_position(past_key_values)
            # fp32 whatever the model's dtype: positions in the thousands have no exact angle in bf16.
            like = inputs_embeds.new_empty(0, dtype=at_least_fp32(inputs_embeds.dtype))
            position_embeddings = self.rotary_emb(like, position_ids)
            kwargs.update(_flash_arguments(self.config, documents, inputs_embeds.shape[0]))

        hidden_states = inputs_embeds
        if self.config.residual_in_fp32:
            hidden_states = hidden_states.to(at_least_fp32(hidden_states.dtype))
        del inputs_embeds
        update, defers_sums = None, _can_defer_sums(self.layers, self.norm)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                update=update,
                defers_sums=defers_sums,
                attention_mask=masks[layer.layer_type],
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                documents=documents,
                key_order=masks.get("key_order"),
                conv_places=masks.get("conv_places"),
                exists=masks["conv"],
                **kwargs,
            )
            if defers_sums:
                hidden_states, update = hidden_states
        hidden_states = self.norm(hidden_states) if update is None else self.norm(update, hidden_states)[0]
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


def _flash_arguments(config: BasedConfig, documents: PackedDocuments | None, batch: int) -> dict:
    """Flash attention takes no mask for documents but their bounds."""
    if documents is None or "flash" not in config._attn_implementation:
        return {}
    if batch != 1:
        raise ValueError("Flash attention takes packed documents in one row: flatten the batch, or use sdpa.")
    longest = int(documents.cu_seqlens.diff().max())
    bounds = documents.cu_seqlens
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


# The ways to generate in which transformers asks for a compiled step.
_STEPWISE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@auto_docstring
class BasedForCausalLM(BasedPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # Which `loss_function` gives, unless another one is set.
    _loss_function = staticmethod(causal_lm_loss)

    def __init__(self, config: BasedConfig):
        super().__init__(config)
        self.model = BasedModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._decode_graphs: DecodeGraphs | None = None
        self._has_built_kernels = False
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        seq_idx (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            As in [`BasedModel`]. Named here too: Trainer drops the columns of a dataset that the forward does not name.

        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from transformers_based import BasedForCausalLM

        >>> model = BasedForCausalLM.from_pretrained("hazyresearch/based-360m")
        >>> tokenizer = AutoTokenizer.from_pretrained("gpt2")
        >>> inputs = tokenizer("Linear attention is", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
        ```"""
        with stays_at_home(past_key_values):
            outputs: BaseModelOutputWithPast = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                seq_idx=seq_idx,
                **kwargs,
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss, shift_labels = None, kwargs.get("shift_labels")
        if labels is not None or shift_labels is not None:
            check_labels(logits.shape[:2], labels=labels, shift_labels=shift_labels)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        """`generate` asks the new cache for its length before the first forward; an attention-free one has none."""
        wanted = generation_config.cache_implementation or ""
        if wanted == "quantized" or wanted.startswith("offloaded"):
            reason = "is a running sum, which must stay fp32" if wanted == "quantized" else "has a fixed size"
            raise ValueError(
                f'Based has no use for `cache_implementation="{wanted}"`: its state {reason}, and is needed at every '
                'step. Leave it out, or use "static".'
            )
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "`assistant_early_exit` drafts with the first layers alone, which in Based are no language model. Use "
                "`assistant_model` or `prompt_lookup_num_tokens`."
            )
        obstacle = obstacle_to_graphs(self)
        if generation_config.prefill_chunk_size is not None and (obstacle or generation_config.compile_config):
            # transformers would compile the forward of a piece; on CUDA, torch 2.11 crashed in the launcher of that.
            generation_config.disable_compile = True
        is_new = model_kwargs.get("past_key_values") is None
        is_default = is_new and generation_config.cache_implementation is None
        if is_default and self._can_step_by_graph(generation_config, generation_mode) and not obstacle:
            # Of fixed size like every state of ours, so it costs nothing.
            model_kwargs["past_key_values"] = StaticCache(self.config, max_cache_len=self.config.sliding_window)
        else:
            if is_default and obstacle:
                logger.info_once(f"Decoding steps are not recorded as a CUDA graph: {obstacle}.")
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            return
        adopt_cache(cache, self.config)
        # Nobody will see whether it has read a token more than it gave.
        cache.is_private = is_new and not generation_config.return_dict_in_generate
        if generation_mode == GenerationMode.ASSISTED_GENERATION and cache.get_seq_length() > 0:
            raise ValueError(
                "Assisted and prompt-lookup decoding read the whole text, also the part that this cache has seen: it "
                "would count twice. Leave out `past_key_values`, or decode without a draft."
            )

    def _can_step_by_graph(self, generation_config, generation_mode) -> bool:
        """Whether this call of `generate` decodes by steps that `DecodeGraphs` can record."""
        return (
            generation_mode in _STEPWISE
            and generation_config.use_cache is not False
            and not generation_config.is_assistant
            and not generation_config.disable_compile
            and not generation_config.output_attentions
            and not generation_config.output_hidden_states
            and self.config._attn_implementation in ("sdpa", "eager")
        )

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        """Called by `generate` for greedy search and sampling."""
        cache = kwargs.get("past_key_values")
        is_first = isinstance(cache, StaticCache) and cache.get_seq_length() == 0 and not self._has_built_kernels
        if is_first and not obstacle_to_graphs(self):
            self._has_built_kernels = True
            build_kernels(self.config, self.dtype, self.device, input_ids.shape[0], kwargs.get("attention_mask"))
        if isinstance(cache, StaticCache) and cache.is_private:
            stopping_criteria = AheadOfTheStop(stopping_criteria, self, cache)
        try:
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        finally:
            if self._decode_graphs is not None:
                self._decode_graphs.settle()

    def get_compiled_call(self, compile_config):
        """
        Called by `generate` with a static cache, the default on CUDA: the decoding step, recorded as a CUDA graph. An
        explicit `compile_config` gets what it asks for; `disable_compile=True` turns either off.
        """
        if compile_config is not None or obstacle_to_graphs(self):
            return super().get_compiled_call(compile_config)
        lay_side_by_side(self)
        if self._decode_graphs is None:
            self._decode_graphs = DecodeGraphs(self)
        self._decode_graphs.refresh()
        return self._decode_graphs

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, inputs_embeds=None, **kwargs):
        """Called by `generate` before every forward."""
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError(
                "`past_key_values` has seen all tokens that `generate` was given, or more: none is left to go on from. "
                "Pass the whole text, of which the cache has seen the beginning, or the new tokens alone with an "
                "`attention_mask` for the whole."
            )
        if next_sequence_length == 1 and self._decode_graphs is not None:
            inputs = self._step_inputs(input_ids, **kwargs)
            if inputs is not None:
                return inputs
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )

    def _step_inputs(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        position_ids=None,
        is_first_iteration=False,
        **kwargs,
    ) -> dict | None:
        """
        The inputs for `DecodeGraphs`: of all that has been generated, the last token and what belongs to it. The GPU
        waits for this at every step.
        """
        if is_first_iteration or position_ids is None or kwargs.keys() - {"use_cache", "logits_to_keep"}:
            return None
        if not isinstance(past_key_values, StaticCache) or not all(map(has_begun, past_key_values.layers)):
            return None
        input_ids = input_ids[:, -1:]
        exists = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -1:]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids[:, -1:],
            "attention_mask": step_masks(exists == 1),
            "past_key_values": past_key_values,
            **kwargs,
        }

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        """Called by `generate` after every forward. The GPU waits for this at every step."""
        if not isinstance(outputs, RecordedStep):
            return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] > 1:
            model_kwargs["attention_mask"] = torch.ones_like(mask[:, -1:])
        model_kwargs["position_ids"] = model_kwargs["position_ids"][:, -1:] + 1
        return model_kwargs

    def init_continuous_batching(self, *args, **kwargs):
        """Refused before it changes the model: its pages hold keys and values, not a recurrent state."""
        raise NotImplementedError(
            "Continuous batching keeps keys and values in pages, which a recurrent state does not have. Use `generate` "
            "with a padded batch instead."
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        """Called by `generate` outside of the compiled forward; see `_make_masks`."""
        if past_key_values is not None:
            adopt_cache(past_key_values, config, batch_size=inputs_embeds.shape[0])
        return _make_masks(config, inputs_embeds, attention_mask, past_key_values)


class _BuiltThroughAutoModel:
    """The generic heads ask AutoModel for their model; as remote code, nobody has told it which that is."""

    # Their losses are means over a batch, which Trainer then divides where it accumulates several.
    accepts_loss_kwargs = False

    def __init__(self, config: BasedConfig):
        AutoModel.register(type(config), BasedModel, exist_ok=True)
        super().__init__(config)


class BasedForSequenceClassification(_BuiltThroughAutoModel, GenericForSequenceClassification, BasedPreTrainedModel):
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        r"""
        labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            The class of each row, or its value.

        A row is told by its last token: the last that exists by `attention_mask`, else the last that is not
        `config.pad_token_id`.
        """
        arguments = {"position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache, **kwargs}
        _check_one_text_a_row(self, input_ids, inputs_embeds, attention_mask, position_ids, kwargs)
        if attention_mask is None:
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, labels=labels, **arguments)
        outputs = self.model(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **arguments
        )
        hidden_states = outputs.last_hidden_state
        batch, length, _ = hidden_states.shape
        exists = attention_mask[:, -length:] == 1
        if attention_mask.shape[1] > length and not exists.any(dim=1).all():
            raise ValueError("A row has no token among the new ones: the one that tells its class is in the past.")
        last = (torch.arange(length, device=exists.device) * exists).argmax(dim=1)
        logits = self.score(hidden_states)
        pooled_logits = logits[torch.arange(batch, device=logits.device), last.to(logits.device)]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled_logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled_logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _check_one_text_a_row(model, input_ids, inputs_embeds, attention_mask, position_ids, kwargs) -> None:
    tokens = input_ids if input_ids is not None else inputs_embeds
    if tokens is None:
        return
    bounds = _checked_bounds(tokens, kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"))
    if _packed_documents(tokens, attention_mask, position_ids, kwargs.get("seq_idx"), bounds) is not None:
        raise ValueError(
            f"{type(model).__name__} gives one answer a row, and documents are packed here: give each a row of its own."
        )


class BasedForTokenClassification(_BuiltThroughAutoModel, GenericForTokenClassification, BasedPreTrainedModel):
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            The class of each token; -100 for none.
        seq_idx (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            As in [`BasedModel`]. Named here too: Trainer drops the columns of a dataset that the forward does not name.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if labels is not None and tokens is not None:
            check_labels(tokens.shape[:2], labels=labels)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            seq_idx=seq_idx,
            **kwargs,
        )


class BasedForQuestionAnswering(_BuiltThroughAutoModel, GenericForQuestionAnswering, BasedPreTrainedModel):
    pass


AUTO_CLASSES = {
    "AutoModel": BasedModel,
    "AutoModelForCausalLM": BasedForCausalLM,
    "AutoModelForSequenceClassification": BasedForSequenceClassification,
    "AutoModelForTokenClassification": BasedForTokenClassification,
    "AutoModelForQuestionAnswering": BasedForQuestionAnswering,
}
# Trainer's label smoothing shifts labels for the classes it finds here; all others it would train to copy their input.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[BasedConfig.model_type] = BasedForCausalLM.__name__

register_integrations()

__all__ = ["BasedPreTrainedModel", *(model_class.__name__ for model_class in AUTO_CLASSES.values())]
