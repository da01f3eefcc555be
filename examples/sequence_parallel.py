# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Trains on one very long document, every process on its part of it.

    torchrun --nproc-per-node 2 examples/sequence_parallel.py --tokens 8192 --verify

What a Based layer needs to know of the text before its part is small, whatever its length, and goes from rank to rank:

    conv                the K - 1 inputs before, from the left neighbour
    sliding_attention   the W - 1 keys and values before, from the left neighbour
    linear_attention    the sum of the states of all ranks before: each sums up its own part, all at once, then one
                        state goes down the line and every rank adds its own

The model does not know of it: it believes to go on from a cache, whose layers fetch these instead of remembering them.
Gradients go the same ways back. `--verify` compares the loss and all gradients with those of one process.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from transformers_based import BasedConfig, BasedForCausalLM, TaylorCacheLayer


ROOT = Path(__file__).resolve().parent.parent
SMALL_MODEL = ROOT / "tests" / "reference" / "based-tiny"


def exchange(sent: torch.Tensor | None, to: int, received: torch.Tensor | None, source: int, group) -> None:
    """Sends and receives at once; `None` for where the line of ranks ends."""
    operations = []
    if sent is not None:
        operations.append(dist.P2POp(dist.isend, sent.contiguous(), group=group, group_peer=to))
    if received is not None:
        operations.append(dist.P2POp(dist.irecv, received, group=group, group_peer=source))
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()


class _FromLeft(torch.autograd.Function):
    """`x` of the left neighbour, zeros on the first rank; the gradient goes back to it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _shift(x, group, step=1)

    @staticmethod
    def backward(ctx, gradient):
        return _shift(gradient, ctx.group, step=-1), None


def _shift(x: torch.Tensor, group, step: int) -> torch.Tensor:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    to, source = rank + step, rank - step
    received = torch.zeros_like(x, memory_format=torch.contiguous_format)
    exchange(x if 0 <= to < size else None, to, received if 0 <= source < size else None, source, group)
    return received


class _SumBefore(torch.autograd.Function):
    """The sum of `x` over all ranks before this one; its gradient is the sum of the gradients of all ranks behind."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _sum_along(x, group, step=1)

    @staticmethod
    def backward(ctx, gradient):
        return _sum_along(gradient, ctx.group, step=-1), None


def _sum_along(x: torch.Tensor, group, step: int) -> torch.Tensor:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    to, source = rank + step, rank - step
    total = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if 0 <= source < size:
        exchange(None, to, total, source, group)
    if 0 <= to < size:
        exchange(total + x, to, None, source, group)
    return total


class RecurrentPart(TaylorCacheLayer):
    """Layer of a convolution or a linear attention: hears its tokens, then is asked for the state before them."""

    def __init__(self, layer_type: str, group):
        super().__init__()
        self.group = group
        self.fetch = _FromLeft if layer_type == "conv" else _SumBefore

    def record(self, fold: Callable, *tokens: torch.Tensor | None) -> None:
        if self.fetch is _SumBefore and torch.is_grad_enabled():
            # The features of all keys would take more memory than all else: they are made again in backward.
            state = checkpoint(fold, None, *tokens, use_reentrant=False, preserve_rng_state=False)
        else:
            state = fold(None, *tokens)
        self.before = self.fetch.apply(state, self.group)

    def read(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.before

    def update_recurrent_state(self, recurrent_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.before = None
        return recurrent_states


class AttentionPart(DynamicLayer):
    """Layer of a sliding attention whose queries are those from `start` on; the keys before are the neighbour's."""

    def __init__(self, start: int, window: int, group):
        super().__init__()
        self.start, self.past, self.group = start, window - 1, group

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.past == 0:
            return key_states, value_states
        states = torch.stack([key_states, value_states])  # [2, B, H, T, D]
        before = _FromLeft.apply(states[..., -self.past :, :], self.group)
        states = torch.cat([before, states], dim=-2)
        # The first rank has none before, but must be there for the gradient of its last keys, which others use.
        return tuple(states if self.start else states[..., self.past :, :])

    def get_seq_length(self) -> int:
        return self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = self.past if self.start else 0
        return past + query_length, self.start - past


def part_of(length: int, config: BasedConfig, group=None) -> slice:
    """
    This rank's tokens of a document of `length`.

    Raises:
        ValueError: the parts would be shorter than the window or the convolution, which reach one neighbour.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    reach = max(config.sliding_window, config.conv_kernel_size) - 1
    if length // size < max(reach, 1):
        raise ValueError(
            f"{length} tokens on {size} ranks are {length // size} each: the `sliding_window` and `conv_kernel_size` "
            f"of this model need {max(reach, 1)}. Use fewer ranks or a longer document."
        )
    return slice(rank * length // size, (rank + 1) * length // size)


def sequence_parallel_cache(model: BasedForCausalLM, part: slice, group=None) -> Cache:
    """
    The `past_key_values` for one forward on the tokens `part`, by all ranks of the group at once.

    Raises:
        ValueError: the model checkpoints activations, which in transformers means that it drops its cache.
    """
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("With `gradient_checkpointing` transformers drops the cache: use more ranks instead.")
    config = model.config
    return Cache(
        layers=[
            AttentionPart(part.start, config.sliding_window, group)
            if layer_type == "sliding_attention"
            else RecurrentPart(layer_type, group)
            for layer_type in config.layer_types
        ]
    )


def loss_of(model: BasedForCausalLM, ids: torch.Tensor, group=None) -> torch.Tensor:
    """
    This rank's share of the loss of `ids` `[B, T]`, the whole document on every rank; the shares add up to it. After
    `backward`, the gradients of all ranks add up to those of one process: see `sum_gradients`.
    """
    part = part_of(ids.shape[1], model.config, group)
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    cache = sequence_parallel_cache(model, part, group)
    logits = model(input_ids=ids[:, part], past_key_values=cache).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, labels[:, part].flatten(), reduction="sum")
    return losses / (labels != -100).sum()


def sum_gradients(model: torch.nn.Module, group=None) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)


def verify(model: BasedForCausalLM, ids: torch.Tensor, loss: torch.Tensor) -> None:
    """Compares loss and gradients with those of this process alone on the whole document, and leaves the gradients."""
    gradients = {name: x.grad for name, x in model.named_parameters()}
    model.zero_grad()
    alone = model(input_ids=ids, labels=ids, use_cache=False).loss
    alone.backward()
    alone = alone.item()
    differences = []
    for name, x in model.named_parameters():
        difference, size = (gradients[name] - x.grad).norm(), x.grad.norm()
        differences.append(difference if size == 0 else difference / size)
        x.grad = gradients[name]
    # Unlike that of Python, torch's max of what is no number is none.
    worst = float(torch.stack(differences).max())
    print(f"One process: loss {alone:.6f}; largest relative difference of a gradient {worst:.1e}", flush=True)
    if not (abs(alone - float(loss)) <= 1e-5 * alone and worst <= 1e-5):
        sys.exit("Not the same as one process.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sequence parallelism for one very long document.")
    parser.add_argument("--model", default=str(SMALL_MODEL), help="folder or Hub id, in either layout")
    parser.add_argument("--tokens", type=int, default=8192, help="length of the document, of random tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--verify", action="store_true", help="compare the first step with one process")
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        sys.exit("Start it with torchrun, as examples/sequence_parallel.py says in its first lines.")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    rank = dist.get_rank()

    model = BasedForCausalLM.from_pretrained(args.model).to(device).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.unpadded_vocab_size, (1, args.tokens), generator=generator).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(args.steps):
        start = time.perf_counter()
        model.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        sum_gradients(model)
        dist.all_reduce(loss.detach_())
        if rank == 0:
            print(f"Step {step}: loss {loss:.6f}, {time.perf_counter() - start:.2f} s", flush=True)
        if args.verify and step == 0 and rank == 0:
            verify(model, ids, loss)
        optimizer.step()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
