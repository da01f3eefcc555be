# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""A program, not a test: compares what `kernel_builds.ops_of` launches with what the first `generate` on a GPU does.

    python launches_without_gpu.py 90 8 16 bfloat16

Nothing is compiled, and no GPU needed: a stand-in says that there is one, and Triton is told that others are building.
"""

import sys

import torch
from compile_for_gpu import NoGpu
from transformers import StaticCache
from transformers.generation import GenerationMixin
from triton import knobs
from triton.runtime import driver

from based_kernels import checks, sliding_attention, taylor_attention_chunk
from transformers_based import BasedConfig, BasedForCausalLM, backend, decode_graph
from transformers_based.kernel_builds import ops_of


LAUNCHES = []


def note(key=None, fn=None, **details):
    # the kernel, with dtypes, alignment, constants and options
    LAUNCHES.append((fn.name, key))
    return True


def launched(function, *arguments, **options):
    LAUNCHES.clear()
    taylor_attention_chunk._fixed_by_kind.clear()
    with torch.no_grad():
        function(*arguments, **options)
    return set(LAUNCHES)


def pretend():
    """CPU tensors pass for those of a GPU, and a recorded step is one that ran."""
    driver.set_active(NoGpu())
    knobs.runtime.jit_cache_hook = note
    checks.interpreted = lambda: True
    taylor_attention_chunk.interpreted = lambda: False
    sys.modules[sliding_attention.__module__].interpreted = lambda: False
    backend.INTERPRETS_ALL = True
    backend._obstacle_to_triton = lambda *arguments: None
    decode_graph._DEVICES = ("cpu",)
    decode_graph.record = lambda forward, device: (lambda: None, forward())
    GenerationMixin._valid_auto_compile_criteria = lambda self, inputs, config: isinstance(
        inputs.get("past_key_values"), StaticCache
    )


def small_config(**sizes):
    """All three mixers, one of them twice."""
    options = {"layer_types": ["conv", "linear_attention", "sliding_attention", "conv"], "num_hidden_layers": 4}
    options |= {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    options |= {"linear_num_heads": 2, "linear_feature_dim": 8, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return BasedConfig(**{**options, **sizes})


def main():
    pretend()
    config = small_config()
    model = BasedForCausalLM(config).to(torch.bfloat16).eval()
    # rows enough that a gate of as many has other tiles than that of a step
    ids = torch.full((2, 512), 5)
    for padding in (0, 7):
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        model._decode_graphs = None
        parts = [launched(op) for op in ops_of(config, model.dtype, model.device, len(ids), padding > 0)]
        built = set().union(*parts)
        assert len(built) == sum(map(len, parts)), "two ops launch the same kernel"
        needed = launched(model.generate, ids, attention_mask=mask, do_sample=False, min_new_tokens=4, max_new_tokens=4)
        assert needed == built, f"only needed: {needed - built}, only built: {built - needed}"
        print(len(built))


if __name__ == "__main__":
    main()
