# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""A program, not a test: every kernel of Taylor attention over a sequence, once, as small as shows all of its loops.

    compute-sanitizer --tool racecheck --target-processes application-only python sanitize_taylor_attention.py cut

`plain`: one row; `packed`: documents with a mask and initial states; `cut`: the same, each in segments of 64 tokens.
"""

import sys

import torch

from based_kernels import taylor_attention, taylor_attention_chunk


TOKENS, FEATURE_DIM, HEAD_DIM = 150, 16, 64
WAYS = ("plain", "packed", "cut")


def leaf(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def main(way):
    if way not in WAYS:
        sys.exit(f"{way} is none of {', '.join(WAYS)}.")
    torch.manual_seed(0)
    arguments = {}
    query, key = (leaf(1, TOKENS, 1, FEATURE_DIM) for _ in range(2))
    value = leaf(1, TOKENS, 1, HEAD_DIM)
    if way != "plain":
        before = (x.detach()[:, :30].reshape(3, 10, 1, -1) for x in (query, key, value))
        arguments = {
            "initial_state": taylor_attention(*before, output_final_state=True)[1].requires_grad_(),
            "cu_seqlens": torch.tensor([0, 1, 20, TOKENS], dtype=torch.int32, device="cuda"),
            "mask": torch.arange(TOKENS, device="cuda")[None] % 7 != 3,
        }
    if way == "cut":
        taylor_attention_chunk._segment_length = lambda *arguments: 64
    output, state = taylor_attention(query, key, value, output_final_state=True, **arguments)
    (output.float().sum() + state.sum()).backward()
    print(f"{way}: output {output.float().norm():.3f}, gradient of the query {query.grad.float().norm():.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
