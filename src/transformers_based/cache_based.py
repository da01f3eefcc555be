# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The recurrent state of one mixer as a layer of a transformers `Cache`: fixed size, in place, exact to roll back.

    linear_attention   state [B, H, V + 1, F]   fp32, see taylor_attention.py
    conv               state [B, K - 1, C]      the last inputs of the convolution, in the model's dtype

transformers builds its own `LinearAttentionLayer` for both; `adopt_cache` swaps this one in when a cache is first used.
A state is a function of the tokens it has seen, so the tokens since a snapshot are enough to take some of them back.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)


class TaylorCacheLayer(LinearAttentionLayer):
    """
    Holds `state` (batch first) for one layer. The mixer reads it, computes the next one and hands that to
    `update_recurrent_state`, or changes it in place.
    """

    # A property in the base class, where a recurrent state cannot be rolled back; ours can.
    is_croppable = True

    def __init__(self, **kwargs):
        super().__init__()
        # For `crop`: the state before the recorded tokens, those tokens, and how to fold them into a state.
        self.snapshot: torch.Tensor | None = None
        self.recorded: list[tuple[torch.Tensor | None, ...]] = []
        self.fold: Callable | None = None

    @property
    def state(self) -> torch.Tensor | None:
        """The state, or `None` before the first token."""
        return self.recurrent_states[0] if self.has_previous_state[0] else None

    def read(self, *shape: int) -> torch.Tensor | None:
        """The state, or `None` before the first token. Raises `ValueError` if the mixer needs one of another shape."""
        if self.state is not None:
            check_shape(self.state, shape)
        return self.state

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        """Stores the state after this forward's tokens, at the same address as the one before."""
        stored = self.recurrent_states[0]
        if stored is not None and stored.shape != recurrent_states.shape:
            # A cache that was reset may start again with another batch size; `read` keeps a mismatch from coming here.
            self.is_recurrent_states_initialized[0] = False
        if recurrent_states.requires_grad:
            # Copying in place would break the graph of the step that made the old state.
            self.recurrent_states[0] = recurrent_states
            self.is_recurrent_states_initialized[0] = True
        else:
            super().update_recurrent_state(recurrent_states)
        self.device, self.dtype = recurrent_states.device, recurrent_states.dtype
        self.has_previous_state[0] = True
        return self.recurrent_states[0]

    def count(self, num_tokens: int) -> None:
        """Told the length of each forward; only `CountingTaylorCacheLayer` keeps it."""

    def record(self, fold: Callable, *tokens: torch.Tensor | None) -> None:
        """Keeps this forward's `tokens` (each `[B, T, ...]` or `None`) so that `fold(state, *tokens)` can redo them."""
        if self.record_past:
            self.fold = fold
            self.recorded.append(tokens)

    def activate_past_recording(self):
        super().activate_past_recording()
        self.snapshot = None if self.state is None else self.state.clone()
        self.recorded = []

    def crop(self, tokens_to_remove: int) -> None:
        """
        Removes the last `-tokens_to_remove` tokens, exactly. `crop(0)` removes none and only frees what was recorded.

        Raises:
            ValueError: a positive number.
            RuntimeError: more tokens than were recorded since `activate_past_recording` or the last `crop`.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes minus the number of tokens to remove; got {tokens_to_remove}.")
        if self.state is None:
            return
        if tokens_to_remove and not self.record_past:
            raise RuntimeError("`crop` needs the tokens: call `activate_past_recording` on the cache before they come.")
        if tokens_to_remove:
            keep = sum(tokens[0].shape[1] for tokens in self.recorded) + tokens_to_remove
            if keep < 0:
                raise RuntimeError(
                    f"Cannot remove {-tokens_to_remove} tokens: only {keep - tokens_to_remove} recorded."
                )
            self.count(tokens_to_remove)
            if keep == 0 and self.snapshot is None:
                self.reset()
            else:
                tokens = (None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*self.recorded))
                kept = [None if token is None else token[:, :keep] for token in tokens]
                self.recurrent_states[0].copy_(self.fold(self.snapshot, *kept) if keep else self.snapshot)
        self.recorded = []
        self.snapshot = None if self.state is None or not self.record_past else self.state.clone()

    def reset(self) -> None:
        super().reset()
        self.snapshot, self.recorded = None, []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])

    def _select(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.state is None:
            return
        selected = rows(self.recurrent_states[0])
        if selected.shape == self.recurrent_states[0].shape:
            self.recurrent_states[0].copy_(selected)  # same address, for captured graphs
        else:
            self.recurrent_states[0] = selected
        self.snapshot = None if self.snapshot is None else rows(self.snapshot)
        self.recorded = [tuple(None if x is None else rows(x) for x in tokens) for tokens in self.recorded]


class CountingTaylorCacheLayer(TaylorCacheLayer, CacheLayerMixin):
    """First layer of a model without attention: knows the length, which transformers asks of an attention layer."""

    def __init__(self, **kwargs):
        CacheLayerMixin.__init__(self)
        TaylorCacheLayer.__init__(self)
        self.cumulative_length = 0

    def count(self, num_tokens: int) -> None:
        self.cumulative_length += num_tokens

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def update(self, key_states, value_states, *args, **kwargs):
        raise NotImplementedError("A recurrent layer keeps no keys and values.")

    def reset(self) -> None:
        TaylorCacheLayer.reset(self)
        self.cumulative_length = 0


def check_shape(held: torch.Tensor, needed: tuple[int, ...]) -> None:
    """Raises `ValueError` if what a cache holds is not what the mixer needs."""
    if tuple(held.shape) != needed:
        raise ValueError(
            f"This cache holds {tuple(held.shape)} where {needed} is needed: it belongs to another model or batch "
            "size. Use a new cache."
        )


def adopt_cache(cache: Cache, config, batch_size: int | None = None, new_tokens: int = 0) -> Cache:
    """
    Makes `cache` fit a Based model, in place, and returns it. From the second call on it only checks.

    Raises (and then leaves the cache as it is):
        TypeError: not a transformers `Cache`, or one that cannot hold a recurrent state.
        ValueError: a cache built, or already used, for another model or batch size; one that offloads; or one whose
            attention layers would lose tokens of the window with the `new_tokens` to come.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(f"`past_key_values` must be a transformers Cache for a decoder; got {type(cache).__name__}.")
    if cache.offloading:
        raise ValueError(
            "An offloading cache has no use here: the state has a fixed size and is needed at every step. Use a cache "
            "without `offloading`."
        )
    layers = cache.layers
    if not layers and cache.layer_class_to_replicate is not None:
        # `DynamicCache()` without a config: it would make every layer an attention layer.
        layers = DynamicCache(config=config).layers
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"This cache has {len(layers)} layers, the model {config.num_hidden_layers}: it belongs to another model. "
            "Pass the model's config to the cache."
        )
    for i, (layer, layer_type) in enumerate(zip(layers, config.layer_types)):
        is_recurrent = isinstance(layer, LinearAttentionCacheLayerMixin)
        if is_recurrent == (layer_type == "sliding_attention"):
            raise ValueError(
                f"Layer {i} of this cache is a {type(layer).__name__}, the model's is {layer_type}: it belongs to "
                "another model. Pass the model's config to the cache."
            )
        if is_recurrent and not isinstance(layer, TaylorCacheLayer):
            if layer.is_conv_states_initialized[0] or layer.is_recurrent_states_initialized[0]:
                raise ValueError(f"Layer {i} of this cache already holds another model's state. Use a new cache.")
            continue
        held = layer.state if is_recurrent else layer.keys if layer.is_initialized else None
        if batch_size is not None and held is not None and held.numel() and held.shape[0] != batch_size:
            raise ValueError(
                f"This cache holds a batch of {held.shape[0]}, the input has a batch size of {batch_size}. Use a new "
                "cache, or `batch_repeat_interleave` or `batch_select_indices` of this one."
            )
        room = -1 if is_recurrent else layer.get_max_length()
        if 0 < room < config.sliding_window and layer.get_seq_length() + new_tokens > room:
            raise ValueError(
                f"Layer {i} of this cache keeps {room} tokens, fewer than the sliding_window of "
                f"{config.sliding_window}, and more are to come. Use a new cache with this model's config and a longer "
                "`max_cache_len`."
            )

    if layers is not cache.layers:
        cache.layers, cache.layer_class_to_replicate = layers, None
    has_attention = "sliding_attention" in config.layer_types
    for i, layer in enumerate(layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, TaylorCacheLayer):
            layers[i] = TaylorCacheLayer() if has_attention or i else CountingTaylorCacheLayer()
            layers[i].record_past = layer.record_past
    return cache


class CacheSnapshot:
    """
    The content of a cache at one moment, to come back to any number of times: a prefix that several prompts share is
    computed once. Cheaper than `copy.deepcopy`, and `restore` works in place, so captured graphs stay valid.

    ```python
    snapshot = CacheSnapshot(cache)
    model.generate(first_question, past_key_values=cache)
    snapshot.restore(cache)
    model.generate(second_question, past_key_values=cache)
    ```
    """

    def __init__(self, cache: Cache):
        self._layers = [(type(layer), _copied(vars(layer))) for layer in cache.layers]

    def restore(self, cache: Cache) -> None:
        """Puts `cache`, the one of the snapshot or another of the same model, back into that moment."""
        if [type(layer) for layer in cache.layers] != [kind for kind, _ in self._layers]:
            raise ValueError("This snapshot was taken of a cache with other layers.")
        for layer, (_, content) in zip(cache.layers, self._layers):
            for name, value in content.items():
                current = getattr(layer, name)
                if isinstance(value, dict) and isinstance(value.get(0), torch.Tensor):
                    current[0] = _put(value[0], current[0])
                else:
                    setattr(layer, name, _put(value, current))


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def _put(value, current):
    """A copy of `value`, at the address of `current` where it fits."""
    if isinstance(value, torch.Tensor) and isinstance(current, torch.Tensor) and current.shape == value.shape:
        return current.copy_(value)
    return _copied(value)
