# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The loss of a causal language model, some tokens at a time.

    logits [B, T, vocabulary] in any dtype; labels [B, T], of each the token before it is asked
    loss of a token = log(sum(exp(logits))) - logits[label],                in fp32
    its gradient    = softmax(logits) - one_hot(label),                     in the dtype of the logits

transformers' own loss makes all logits fp32 and holds three tensors of their size on top of them: with the layers
checkpointed that is the peak of a training step. Here only `PIECE` elements are fp32 at any time.
"""

import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from .ops import at_least_fp32, is_transformed


PIECE = 2**26


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    What transformers' `ForCausalLMLoss` computes, with its arguments: the mean over the labels that are not
    `ignore_index`, or their sum over `num_items_in_batch`. `shift_labels` stand where the logits are that predict them.
    """
    if torch.compiler.is_compiling() or type(logits) is not torch.Tensor or is_transformed():
        # Inductor fuses it itself; sharded logits know their own way, and `torch.func` the way of plain operations.
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    check_vocabulary(shift_labels, vocab_size, ignore_index)
    wanted = shift_labels.reshape(-1).to(logits.device)
    is_asked = wanted != ignore_index
    losses = _TokenLosses.apply(logits.view(-1, vocab_size), wanted.masked_fill(~is_asked, 0))
    total = torch.where(is_asked, losses, 0).sum()
    if num_items_in_batch is None:
        return total / is_asked.sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class _TokenLosses(torch.autograd.Function):
    """logits [N, V], labels [N] -> losses [N]."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, labels)
        losses = logits.new_empty(len(labels), dtype=at_least_fp32(logits.dtype))
        for rows in _pieces(logits):
            log_probabilities = torch.log_softmax(logits[rows], dim=-1, dtype=losses.dtype)
            losses[rows] = -log_probabilities.gather(1, labels[rows, None])[:, 0]
        return losses

    @staticmethod
    def backward(ctx, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, labels = ctx.saved_tensors
        if torch.is_grad_enabled():
            # For gradients of gradients only what autograd can follow.
            probabilities = torch.softmax(logits, dim=-1, dtype=slope.dtype)
            gradient = (probabilities - F.one_hot(labels, logits.shape[1])) * slope[:, None]
            return gradient.to(logits.dtype), None
        gradient = torch.empty_like(logits)
        for rows in _pieces(logits):
            probabilities = torch.softmax(logits[rows], dim=-1, dtype=slope.dtype)
            places = labels[rows, None]
            probabilities.scatter_(1, places, probabilities.gather(1, places) - 1)
            gradient[rows] = probabilities.mul_(slope[rows, None])
        return gradient, None


def check_labels(kept: tuple[int, ...], **labels: torch.Tensor | None) -> None:
    """
    Raises:
        ValueError: labels, by their names, that are not `[B, T]`, one for each of the tokens that are kept.
    """
    for name, x in labels.items():
        if x is not None and x.shape != kept:
            raise ValueError(
                f"`{name}` must be [batch, tokens] = {tuple(kept)}, one for each of the logits; got {tuple(x.shape)}."
            )


def check_vocabulary(labels: torch.Tensor, vocab_size: int, ignore_index: int = -100) -> None:
    """
    Looks at labels on a CPU only: a GPU would be waited for.

    Raises:
        ValueError: labels that are neither tokens of the vocabulary nor `ignore_index`.
    """
    # What is no plain tensor, as those of a `FakeTensorMode`, may have no values.
    if labels.device.type != "cpu" or type(labels) is not torch.Tensor:
        return
    outside = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))]
    if len(outside):
        raise ValueError(
            f"A label is {int(outside[0])}, which is neither in the vocabulary of {vocab_size} nor {ignore_index}, the "
            "one that asks for nothing."
        )


def _pieces(logits: torch.Tensor) -> list[slice]:
    """Rows of `[N, V]`, as many at a time as `PIECE` elements hold."""
    size = max(1, PIECE // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]
