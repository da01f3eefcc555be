# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What each mixer keeps of the past, as layers of a transformers `Cache`: of fixed size, changed in place.

    linear_attention    state [B, H, V + 1, F]         fp32, see taylor_attention.py; the last tokens may wait beside it
    conv                state [B, K - 1, C]            the last inputs of the convolution, in the model's dtype
    sliding_attention   keys, values [B, H, W, D]      in a static cache: a ring, token r of a row at slot r % W

transformers builds its own layers; `adopt_cache` swaps these in when a cache is first used. The window of a dynamic
cache stays transformers', but for the place of padding. A recurrent state is a function of the tokens it has seen:
those that still wait beside it are taken back by not counting them, others by redoing what was kept since a snapshot.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticSlidingWindowLayer,
)

from .taylor_attention import fold_pending


_RING_GIVES_NOTHING_BACK = (
    "The window of a static cache holds no token that it has moved past, so none can be taken back"
)

# Tokens that wait beside a state. More of them save writes of the state and cost reads of the tokens.
NUM_PENDING = 32


class _RowsOfTheBatch:
    """What `Cache` does with the rows of a batch, by means of `_select`."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])


class TaylorCacheLayer(_RowsOfTheBatch, LinearAttentionLayer):
    """
    Holds `state` (batch first) for one layer. The mixer reads it, computes the next one and hands that to
    `update_recurrent_state`, or changes it in place.
    """

    # A property in the base class, where a recurrent state cannot be rolled back; ours can.
    is_croppable = True

    def __init__(self, **kwargs):
        super().__init__()
        # For `crop`: the state before the recorded tokens, those tokens, and how to fold them into a state; or, instead
        # of these, how many of the tokens that wait beside the state may be taken back.
        self.snapshot: torch.Tensor | None = None
        self.recorded: list[tuple[torch.Tensor | None, ...]] = []
        self.fold: Callable | None = None
        self.held = 0
        # What `taylor_attention_lazy_step` has not folded into the state yet: its keys, values and their number; and
        # the scale of the mixer, which folds them.
        self.pending: dict[str, torch.Tensor] = {}
        self.scale: float | None = None

    @property
    def state(self) -> torch.Tensor | None:
        """The state, or `None` before the first token."""
        if not self.has_previous_state[0]:
            return None
        state, pending = self.recurrent_states[0], self.pending.values()
        if self.held:
            # They may be taken back from where they wait.
            state, pending = state.clone(), [x.clone() for x in pending]
        if self.pending:
            fold_pending(state, *pending, scale=self.scale)
        return state

    def read(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """
        The state, or `None` before the first token, from now on in this `dtype` if one is given. Raises `ValueError` if
        the mixer needs one of another shape.
        """
        if self.has_previous_state[0]:
            check_shape(self.recurrent_states[0], shape)
            self.recurrent_states[0] = self.recurrent_states[0].to(dtype or self.recurrent_states[0].dtype)
        return self.state

    def lazily(self, shape: tuple[int, ...], key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        The state of this `shape`, and room for tokens `[B, T, H, D]` that wait, as `taylor_attention_lazy_step` takes
        them. While recording, those that come now can be taken back.
        """
        check_shape(self.recurrent_states[0], shape)
        if self.record_past:
            if not self.held and self.pending:
                fold_pending(self.recurrent_states[0], *self.pending.values(), scale=self.scale)
            self.held += key.shape[1]
        for name in ("pending_keys", "pending_values") if self.pending else ():
            self.pending[name] = self.pending[name].to(key.dtype)
        if not self.pending:
            batch, _, heads, _ = key.shape
            self.pending = {
                "pending_keys": key.new_empty(batch, heads, NUM_PENDING, key.shape[-1]),
                "pending_values": value.new_empty(batch, heads, NUM_PENDING, value.shape[-1]),
                "num_pending": torch.zeros(batch, heads, dtype=torch.int32, device=key.device),
            }
        return self.recurrent_states[0], *self.pending.values()

    def can_hold(self, num_tokens: int) -> bool:
        """While recording: whether so many more tokens may wait beside the state, to be taken back from there."""
        fits = self.held + num_tokens < NUM_PENDING and (num_tokens == 1 or not self.held)
        return self.record_past and not self.recorded and fits

    def hold(self, shape: tuple[int, ...], key: torch.Tensor, value: torch.Tensor) -> None:
        """Lets all tokens `[B, T, H, D]` of a forward wait beside the state of this `shape`, which has been `read`."""
        _, pending_keys, pending_values, num_pending = self.lazily(shape, key, value)
        length = key.shape[1]
        pending_keys[:, :, :length].copy_(key.transpose(1, 2))
        pending_values[:, :, :length].copy_(value.transpose(1, 2))
        num_pending.fill_(length)

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
        """
        Told this forward's `tokens` (each `[B, T, ...]` or `None`) before `read`, and how `fold(state, *tokens)` makes
        them part of a state; kept so that `crop` can redo them.
        """
        if not self.record_past:
            return
        self.fold = fold
        if self.held:
            held = (
                self.pending[name][:, :, : self.held].transpose(1, 2) for name in ("pending_keys", "pending_values")
            )
            self.snapshot = self.recurrent_states[0].clone()
            self.recorded = [(*(x.clone() for x in held), None)]
            self.held = 0
        elif not self.recorded:
            self.snapshot = None if self.state is None else self.state.clone()
        self.recorded.append(tokens)

    def activate_past_recording(self):
        super().activate_past_recording()
        self._forget()

    def _forget(self) -> None:
        self.snapshot, self.recorded, self.held = None, [], 0

    def crop(self, tokens_to_remove: int) -> None:
        """
        Removes the last `-tokens_to_remove` tokens, exactly. `crop(0)` removes none and only frees what was recorded.

        Raises:
            ValueError: a positive number.
            RuntimeError: more tokens than were recorded since `activate_past_recording` or the last `crop`.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes minus the number of tokens to remove; got {tokens_to_remove}.")
        if not self.has_previous_state[0]:
            return
        if tokens_to_remove and not self.record_past:
            raise RuntimeError("`crop` needs the tokens: call `activate_past_recording` on the cache before they come.")
        if tokens_to_remove:
            keep = (self.held or sum(tokens[0].shape[1] for tokens in self.recorded)) + tokens_to_remove
            if keep < 0:
                raise RuntimeError(
                    f"Cannot remove {-tokens_to_remove} tokens: only {keep - tokens_to_remove} recorded."
                )
            self.count(tokens_to_remove)
            if self.held:
                self.pending["num_pending"].add_(tokens_to_remove)
            elif keep == 0 and self.snapshot is None:
                self.reset()
            else:
                kept = [_joined(self.recorded, i, keep) for i in range(len(self.recorded[0]))]
                self.state.copy_(self.fold(self.snapshot, *kept) if keep else self.snapshot)
        self._forget()

    def reset(self) -> None:
        super().reset()
        self.pending = {}
        self._forget()

    def _select(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.has_previous_state[0]:
            return
        self.pending = {name: _put(rows(x), x) for name, x in self.pending.items()}
        self.recurrent_states[0] = _put(rows(self.recurrent_states[0]), self.recurrent_states[0])
        self.snapshot = None if self.snapshot is None else rows(self.snapshot)
        self.recorded = [tuple(None if x is None else rows(x) for x in tokens) for tokens in self.recorded]


def _joined(recorded: list[tuple[torch.Tensor | None, ...]], i: int, keep: int) -> torch.Tensor | None:
    """The first `keep` tokens of what was given as number `i`, `[B, T, ...]`; a mask may have been left out."""
    if all(tokens[i] is None for tokens in recorded):
        return None
    all_exist = (tokens[0].new_ones(tokens[0].shape[:2], dtype=torch.bool) for tokens in recorded)
    parts = [ones if tokens[i] is None else tokens[i] for tokens, ones in zip(recorded, all_exist)]
    return torch.cat(parts, dim=1)[:, :keep]


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


class WindowCacheLayer(_RowsOfTheBatch, StaticSlidingWindowLayer):
    """
    The keys (rotated) and values of the last W tokens of each row, as a ring: a decoding step writes one slot and moves
    nothing. Tokens that do not exist never enter it, so each row has its own place in the ring.

    keys, values: `[B, H, W, D]`. seen: int64 `[B, H]`, the tokens of the row so far (per head, so that whoever owns a
    head may count without asking the others).
    """

    def __init__(self, sliding_window: int):
        super().__init__(max_cache_len=sliding_window, sliding_window=sliding_window)
        self.seen: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.seen = torch.zeros(key_states.shape[:2], dtype=torch.long, device=self.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.seen)

    def count(self, num_tokens: int) -> None:
        """Told the length of each forward, padding included."""
        self.cumulative_length_int += num_tokens

    def past_length(self) -> int:
        """How many past keys `append` puts in front of the new ones."""
        return self.max_cache_len - 1 if self.cumulative_length_int else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.past_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        raise RuntimeError(f"{_RING_GIVES_NOTHING_BACK}: use a `DynamicCache` for `crop`.")

    def window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The last W - 1 keys and values, oldest first, behind anything where there are fewer."""
        slots = self.seen[:, :1, None] + torch.arange(-self.past_length(), 0, device=self.device)  # [B, 1, W - 1]
        return tuple(_at_slots(x, slots % self.max_cache_len) for x in (self.keys, self.values))

    def append(
        self, key: torch.Tensor, value: torch.Tensor, exists: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`store`. Returns the `window` before these tokens, followed by them."""
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        past = self.window()
        self.store(key, value, exists)
        return torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        exists: torch.Tensor | None,
        left_out: int | torch.Tensor = 0,
    ) -> None:
        """
        Adds the tokens `[B, H, T, D]` that exist (`[B, T]`, `None` for all). Before them came others that the window
        has left behind, `left_out` in number (or `[B, 1]`): then these are W, or all that a row has.
        """
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self.seen.add_(left_out)
        length = key.shape[2]
        arrived = length if exists is None else exists.sum(dim=1)[:, None]
        last = self.seen + arrived - 1
        # [B, 1, W]: the newest token that belongs in each slot, counted from the first new one
        newest = last[:, :1, None] - (last[:, :1, None] - torch.arange(self.max_cache_len, device=self.device)) % (
            self.max_cache_len
        )
        arrival = newest - self.seen[:, :1, None]
        token = arrival.clamp(0, length - 1)
        if exists is not None:
            order = exists.int().argsort(dim=1, stable=True)[:, None]
            token = order.gather(2, (token + length - exists.sum(dim=1)[:, None, None]).clamp(max=length - 1))
        for held, new in ((self.keys, key), (self.values, value)):
            held.copy_(torch.where(arrival[..., None] >= 0, _at_slots(new, token), held))
        self.seen.add_(arrived)

    def update(self, key_states, value_states, *args, **kwargs):
        raise NotImplementedError("The window needs to know which tokens exist: use `append`.")

    def reset(self) -> None:
        super().reset()
        if self.seen is not None:
            self.seen.zero_()

    def _select(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values, self.seen = (_put(rows(x), x) for x in (self.keys, self.values, self.seen))


class DynamicWindowCacheLayer(_RowsOfTheBatch, DynamicSlidingWindowLayer):
    """transformers' window, in which padding stands before all tokens of its row, wherever it came."""

    def __init__(self, layer: DynamicSlidingWindowLayer):
        super().__init__(layer.sliding_window)
        vars(self).update(vars(layer))
        # Once padding came behind tokens: which of the last ones exist, `[B, N]`.
        self.exists: torch.Tensor | None = None
        self.has_padding = False

    def put_padding_first(
        self, keys: torch.Tensor, values: torch.Tensor, exists: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `update` returned for tokens of which some do not exist (`[B, T]`), and what it keeps, in this order."""
        num_visible, num_held = keys.shape[2], self.keys.shape[2]
        if num_held > num_visible:
            # While recording it keeps more than it returns.
            keys, values = self.keys, self.values
        old = keys.shape[2] - exists.shape[1]
        order = torch.nn.functional.pad(exists, (old, 0), value=True).int().argsort(dim=1, stable=True)[:, None]
        keys, values = (_at_slots(x, order) for x in (keys, values))
        self.keys, self.values = (x[:, :, -num_held:] for x in (keys, values))
        known = exists if self.exists is None else torch.cat([self.exists, exists], dim=1)
        self.exists = known[:, -num_held:]
        return keys[:, :, -num_visible:], values[:, :, -num_visible:]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0 and self.exists is not None:
            # transformers takes from the end, where padding that is to go has to be too.
            padding = (~self.exists[:, tokens_to_remove:]).sum(dim=1)[:, None, None]
            slots = (torch.arange(self.keys.shape[2], device=padding.device) + padding) % self.keys.shape[2]
            self.keys, self.values = (_at_slots(x, slots) for x in (self.keys, self.values))
            self.exists = self.exists[:, :tokens_to_remove]
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.exists, self.has_padding = None, False

    def _select(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.get_seq_length() > 0:
            self.keys, self.values = rows(self.keys), rows(self.values)
            self.exists = None if self.exists is None else rows(self.exists)


def _at_slots(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The entries of `[B, H, N, D]` at `slots` `[B, 1, M]`."""
    return x.gather(2, slots[..., None].expand(-1, x.shape[1], -1, x.shape[3]))


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
        # Not `layer.state`, which would fold what waits beside it, at every step.
        recurrent = layer.recurrent_states[0] if is_recurrent and layer.has_previous_state[0] else None
        held = recurrent if is_recurrent else layer.keys if layer.is_initialized else None
        if batch_size is not None and held is not None and held.numel() and held.shape[0] != batch_size:
            raise ValueError(
                f"This cache holds a batch of {held.shape[0]}, the input has a batch size of {batch_size}. Use a new "
                "cache, or `batch_repeat_interleave` or `batch_select_indices` of this one."
            )
        room = -1 if is_recurrent or _becomes_ring(layer, config) else layer.get_max_length()
        if 0 < room < config.sliding_window and layer.get_seq_length() + new_tokens > room:
            raise ValueError(
                f"Layer {i} of this cache keeps {room} tokens, fewer than the sliding_window of "
                f"{config.sliding_window}, and more are to come. Use a new cache with this model's config and a longer "
                "`max_cache_len`."
            )
    has_ring = any(isinstance(layer, WindowCacheLayer) or _becomes_ring(layer, config) for layer in layers)
    if has_ring and any(getattr(layer, "record_past", False) for layer in layers):
        raise ValueError(f"{_RING_GIVES_NOTHING_BACK}: use a `DynamicCache` for `crop`.")

    if layers is not cache.layers:
        cache.layers, cache.layer_class_to_replicate = layers, None
    has_attention = "sliding_attention" in config.layer_types
    for i, layer in enumerate(layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, TaylorCacheLayer):
            layers[i] = TaylorCacheLayer() if has_attention or i else CountingTaylorCacheLayer()
            layers[i].record_past = layer.record_past
        elif _becomes_ring(layer, config):
            layers[i] = WindowCacheLayer(config.sliding_window)
        elif type(layer) is DynamicSlidingWindowLayer:
            layers[i] = DynamicWindowCacheLayer(layer)
    return cache


def _becomes_ring(layer, config) -> bool:
    """Whether transformers' static window gives way to ours; other attention implementations want it as it is."""
    is_plain = config._attn_implementation in ("sdpa", "eager")
    return is_plain and type(layer) is StaticSlidingWindowLayer and layer.get_seq_length() == 0


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
                setattr(layer, name, _put(value, getattr(layer, name)))


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def _put(value, current):
    """A copy of `value`, at the address of `current` where it fits, so that captured graphs stay valid."""
    if isinstance(value, torch.Tensor) and isinstance(current, torch.Tensor) and current.shape == value.shape:
        return current.copy_(value)
    if isinstance(value, dict) and isinstance(current, dict):
        return {name: _put(item, current.get(name)) for name, item in value.items()}
    return _copied(value)
