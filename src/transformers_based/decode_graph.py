# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""A decoding step as a CUDA graph, so that `generate` does not wait for the CPU to launch hundreds of kernels.

The cache of a model is of fixed size, so one graph serves every position, prompt length and call with the same batch
size. A graph works on tensors at fixed addresses, its home; a cache moves in with its first step (one copy) and the one
that lived there moves out, if somebody still holds it. So any number of caches may take turns, at the price of a copy.

`generate` waits for the GPU after every token to ask whether to stop. By then the graph of the next step is on its way,
on a stream of its own (`run_ahead`): if there is no next step, its result is not asked for. The graph ends where the
logits begin: these are made anew for every step, which is cheaper than a copy of what the next replay would overwrite.

A graph repeats what was recorded. It is thrown away when anything that it depends on is no longer as it was then, and
models with parts that may act differently from call to call (adapters, hooks, quantized weights) are not recorded.
"""

import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from .backend import backend_wanted
from .cache_based import TaylorCacheLayer, WindowCacheLayer


# Batch sizes whose graphs are kept; each keeps the state of one batch.
MAX_GRAPHS = 4

# What can record.
_DEVICES = ("cuda",)

# Types of rotary whose angles depend on how far the text has come, so that the CPU would have to wait for the GPU.
_LOOKS_AT_POSITIONS = ("dynamic", "longrope")

# Modules of these Python packages do the same at every call.
_KNOWN = ("torch.nn.modules.", "transformers.activations", "transformers.models.llama.", f"{__package__}.")


# Of a cache that has lived in a graph's home, what keeps other threads from moving it out.
_LOCKS: weakref.WeakKeyDictionary[Cache, threading.RLock] = weakref.WeakKeyDictionary()


def stays_at_home(cache: Cache | None) -> AbstractContextManager:
    """While the model runs as usual on a cache that lives in a graph's home, nobody moves it out between two writes."""
    if not isinstance(cache, Cache) or torch.compiler.is_compiling():
        return nullcontext()
    return _LOCKS.get(cache) or nullcontext()


class RecordedStep(CausalLMOutputWithPast):
    """What a recorded step gives; the next one asks for no more than the last column of mask and positions."""


class DecodeGraphs:
    """
    Called in place of a model: replays a graph for a decoding step, and calls the model for everything else. Where
    there is no graph of a batch size yet, the first step of a cache runs as usual, and makes what a step may have to
    make; the next one is recorded.
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self._graphs: OrderedDict[int, _Graph] = OrderedDict()
        # The caches that have made a step as usual, and what their layers hold since.
        self._has_stepped: weakref.WeakKeyDictionary[Cache, list] = weakref.WeakKeyDictionary()
        self._fingerprint = None
        self._lock = threading.RLock()
        # The graph and the cache of the last step; whether the one after it is on its way; and what such steps gave to
        # caches that have not come for it yet.
        self._last: tuple[_Graph, weakref.ref] | None = None
        self._is_ahead = False
        self._ready: weakref.WeakKeyDictionary[Cache, torch.Tensor] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo):
        # A copy of the model makes its own.
        return None

    def __reduce__(self):
        return type(None), ()

    def refresh(self) -> None:
        """Throws the graphs away if the model, or what decides how it runs, has changed. Called once a `generate`."""
        with self._lock:
            self.settle()
            fingerprint = _fingerprint(self._model())
            if fingerprint != self._fingerprint:
                self._graphs.clear()
                self._has_stepped.clear()
                self._last = None
                self._fingerprint = fingerprint

    def __call__(self, **inputs) -> CausalLMOutputWithPast:
        with self._lock:
            self.settle()
            step = _Step.of(inputs)
            cache = inputs.get("past_key_values")
            if cache is not None and cache in self._ready:
                if step is None:
                    raise RuntimeError("The next step of this cache has been made ahead, for one token a row alone.")
                return RecordedStep(logits=self._ready.pop(cache), past_key_values=cache)
            self._last = None
            if step is None:
                return self._model()(**inputs)
            batch = step.input_ids.shape[0]
            if batch not in self._graphs:
                # What a recorded step makes, it would make again with every replay: room for tokens, always empty.
                if self._has_stepped.get(cache) != _names(cache):
                    output = self._model()(**inputs)
                    self._has_stepped[cache] = _names(cache)
                    return output
                # What is made in `torch.inference_mode` cannot be changed outside of it, and this outlives it.
                with torch.inference_mode(False), torch.no_grad():
                    self._graphs[batch] = _Graph(self._model(), step)
                if len(self._graphs) > MAX_GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(batch)
            _LOCKS[cache] = self._lock
            output = self._graphs[batch].run(step)
            self._last = self._graphs[batch], weakref.ref(cache)
            return output

    def run_ahead(self, cache: Cache, tokens: torch.Tensor) -> None:
        """Starts the step of `tokens` `[B, 1]`, if `cache` made the last one; the caller will ask for no other next."""
        with self._lock:
            self.settle()
            if self._last is not None and self._last[1]() is cache:
                self._last[0].start_next(tokens)
                self._is_ahead = True

    def settle(self) -> None:
        """The current stream waits for the step that is on its way, whose result is put by for its cache."""
        with self._lock:
            if self._is_ahead:
                self._is_ahead = False
                graph, cache = self._last[0], self._last[1]()
                logits = graph.finish_next(cache)
                if cache is not None:
                    self._ready[cache] = logits


class AheadOfTheStop(StoppingCriteriaList):
    """The criteria of one call of `generate`; while the GPU decides by them, it is given the next step."""

    def __init__(self, criteria: StoppingCriteriaList, model: nn.Module, cache: Cache):
        super().__init__(criteria)
        self._model, self._cache = model, cache

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        graphs, max_length = self._model._decode_graphs, self.max_length
        if graphs is not None and (max_length is None or input_ids.shape[1] < max_length):
            graphs.run_ahead(self._cache, input_ids[:, -1:])
        return super().__call__(input_ids, scores, **kwargs)


class _Step:
    """The inputs of a step that a graph can do: one token a row, on a cache whose layers have begun."""

    def __init__(self, input_ids, position_ids, exists, cache):
        self.input_ids, self.position_ids, self.exists, self.cache = input_ids, position_ids, exists, cache

    @classmethod
    def of(cls, inputs: dict) -> "_Step | None":
        inputs = {name: value for name, value in inputs.items() if value is not None}
        input_ids, position_ids = inputs.pop("input_ids", None), inputs.pop("position_ids", None)
        cache, masks = inputs.pop("past_key_values", None), inputs.pop("attention_mask", None)
        # What changes nothing here; anything else asks for more than logits.
        harmless = {"use_cache": (True,), "return_dict": (True,), "logits_to_keep": (0, 1)}
        if any(name not in harmless or value not in harmless[name] for name, value in inputs.items()):
            return None
        if input_ids is None or position_ids is None or input_ids.shape[1] != 1 or not isinstance(cache, Cache):
            return None
        if not all(has_begun(layer) for layer in cache.layers):
            return None
        # [B, 1], made by `create_masks_for_generate`; None if every row exists
        exists = masks["conv"] if isinstance(masks, dict) else None
        if exists is None:
            exists = torch.ones_like(input_ids, dtype=torch.bool)
        return cls(input_ids, position_ids.expand_as(input_ids), exists, cache)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.input_ids, self.position_ids, self.exists


class _Graph:
    def __init__(self, model: nn.Module, step: _Step):
        self._inputs = [x.clone() for x in step.tensors]
        # The cache that brings the first step is the first to live there. What it held may be another graph's home.
        self._home = []
        for layer in step.cache.layers:
            self._home.append({name: x.detach().clone() for name, x in _tensors(layer).items()})
            _move(layer, self._home[-1])
        self._tenant = weakref.ref(step.cache)
        self._head = model.lm_head
        input_ids, position_ids, exists = self._inputs

        def forward():
            return model.model(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=step_masks(exists),
                past_key_values=step.cache,
            ).last_hidden_state

        self._replay, self._hidden_states = record(forward, model.device)
        if _names(step.cache) != [tuple(home) for home in self._home]:
            raise RuntimeError(
                "A recorded decoding step has made tensors for its cache, which every replay would empty."
            )
        self._aside = Aside(model.device)
        # Recording told the layers of a token, but did not do it.
        for layer in step.cache.layers:
            layer.count(-1)

    def run(self, step: _Step) -> RecordedStep:
        self._move_in(step.cache)
        for held, new in zip(self._inputs, step.tensors):
            held.copy_(new)
        self._replay()
        for layer in step.cache.layers:
            layer.count(1)
        return RecordedStep(logits=self._make_logits(), past_key_values=step.cache)

    def start_next(self, tokens: torch.Tensor) -> None:
        """Begins a step like the last one, on the tokens that follow, beside the current stream."""
        input_ids, position_ids, exists = self._inputs
        input_ids.copy_(tokens)
        position_ids.add_(1)
        exists.fill_(True)
        self._aside.run(self._replay)

    def finish_next(self, cache: Cache | None) -> torch.Tensor:
        self._aside.join()
        for layer in cache.layers if cache is not None else ():
            layer.count(1)
        return self._make_logits()

    def _make_logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self._head(self._hidden_states)

    def _move_in(self, cache: Cache) -> None:
        if all(map(_lives_at, cache.layers, self._home)):
            return
        # A forward with gradients, or in `torch.inference_mode`, must leave nothing of that behind.
        with torch.inference_mode(False), torch.no_grad():
            tenant = self._tenant()
            if tenant is not None:
                for layer, home in zip(tenant.layers, self._home):
                    # Of a cache that was reset only a part may still be here.
                    held = _tensors(layer)
                    if any(held.get(name) is x for name, x in home.items()):
                        _move(layer, {name: x.clone() if x is home.get(name) else x for name, x in held.items()})
            for layer, home in zip(cache.layers, self._home):
                tensors = _tensors(layer)
                for name, x in home.items():
                    x.detach_()
                    # A cache that has made no step yet has no tokens waiting.
                    x.copy_(tensors[name]) if name in tensors else x.zero_()
                _move(layer, home)
            self._tenant = weakref.ref(cache)


def step_masks(exists: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """What the layers need to know of padding where there is one token `[B, 1]` a row, on a cache of ours."""
    return {"conv": exists, "linear_attention": exists, "sliding_attention": exists, "key_order": None}


def record(forward: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    """A function that does what `forward` does, and the tensor where it leaves the result."""
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    # Other threads (a server's, a streamer's) may go on using the GPU meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = forward()
    return graph.replay, output


class Aside:
    """A stream beside the current one of a GPU; elsewhere things are done in order."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, work: Callable[[], None]) -> None:
        """After all that the current stream has been given so far."""
        if self._stream is None:
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()

    def join(self) -> None:
        """What the current stream is given from now on comes after the `work`."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def has_begun(layer) -> bool:
    """Whether a layer of a cache is one of ours that holds tokens and need not remember how to give them back."""
    if isinstance(layer, TaylorCacheLayer):
        return layer.has_previous_state[0] and not layer.record_past
    return isinstance(layer, WindowCacheLayer) and layer.is_initialized


def _tensors(layer) -> dict[str, torch.Tensor]:
    if isinstance(layer, TaylorCacheLayer):
        return {"state": layer.recurrent_states[0], **layer.pending}
    return {"keys": layer.keys, "values": layer.values, "seen": layer.seen}


def _names(cache: Cache) -> list[tuple[str, ...]]:
    return [tuple(_tensors(layer)) for layer in cache.layers]


def _lives_at(layer, home: dict[str, torch.Tensor]) -> bool:
    # The GPU waits for this at every step.
    if isinstance(layer, TaylorCacheLayer):
        pending = layer.pending
        return layer.recurrent_states[0] is home["state"] and all(
            pending.get(x) is home[x] for x in home if x != "state"
        )
    return layer.keys is home["keys"] and layer.values is home["values"] and layer.seen is home["seen"]


def _move(layer, tensors: dict[str, torch.Tensor]) -> None:
    if isinstance(layer, TaylorCacheLayer):
        layer.recurrent_states[0] = tensors["state"]
        layer.pending = {name: x for name, x in tensors.items() if name != "state"}
    else:
        layer.keys, layer.values, layer.seen = tensors["keys"], tensors["values"], tensors["seen"]


def obstacle_to_graphs(model: nn.Module) -> str | None:
    """Why a step of this model cannot be recorded, if so."""
    if model.device.type not in _DEVICES:
        return f"the model is on {model.device.type}"
    if nn.modules.module._has_any_global_hook():
        return "there are hooks for all modules"
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(_KNOWN):
            return f"{name or 'the model'} is a {type(module).__module__}.{type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has hooks"
        if getattr(module, "rope_type", "default") in _LOOKS_AT_POSITIONS:
            return f"{name} has rotary of type {module.rope_type}, which looks at the positions"
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.device != model.device:
            return f"{name} is a {type(parameter).__name__} on {parameter.device}"
    return None


def _fingerprint(model: nn.Module) -> tuple:
    """What a recorded step depends on, beside the values of the weights."""
    return (
        tuple((x.data_ptr(), x.dtype, x.shape) for x in (*model.parameters(), *model.buffers())),
        tuple((type(module), module.training) for module in model.modules()),
        repr(model.config),
        backend_wanted(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )
