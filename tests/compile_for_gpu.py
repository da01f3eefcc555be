# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""A program, not a test: compiles every kernel of one call, as the launchers launch it, on a machine without a GPU.

    python compile_for_gpu.py CAPABILITY FEATURE_DIM HEAD_DIM DTYPE

The interpreter accepts what the compiler refuses: pointers of mixed dtypes, too much shared memory. A stand-in for
Triton's driver says that there is a GPU, of that compute capability, and launches nothing. Prints a line a kernel: its
name, whether it has Hopper's asynchronous products, whether operands of its products are laid out for bytes, and what
of it torch.compile would not find.
"""

import builtins
import symtable
import sys

import torch
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from based_kernels import launch as taylor_launch


CAPABILITY, FEATURE_DIM, HEAD_DIM = (int(argument) for argument in sys.argv[1:4])
DTYPE = getattr(torch, sys.argv[4])
# Grid and arguments, constants included, of each launch.
LAUNCHES = []
SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448}


class Utils:
    @staticmethod
    def get_device_properties(device):
        return {"max_shared_mem": SHARED_MEMORY[CAPABILITY], "multiprocessor_count": 1, "warpSize": 32}

    @staticmethod
    def load_binary(name, kernel, shared, device):
        # module, function, registers, spilled registers, most threads
        return 0, 0, 0, 0, 1024


class NoGpu:
    utils = Utils

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    class launcher_cls:
        def __init__(self, *args):
            pass

        def __call__(self, grid_x, grid_y, grid_z, stream, function, metadata, launched, enter, exit, *args):
            LAUNCHES.append(((grid_x, grid_y, grid_z), args))


def names_not_copied(kernel) -> set[str]:
    """What a kernel and the functions that it calls name, and the text lacks that torch.compile copies of them."""
    copy = symtable.symtable(user_defined_triton_kernel_transitive_closure_source_code(kernel), "copy", "exec")
    named = {x.get_name() for function in copy.get_children() for x in function.get_symbols() if x.is_global()}
    return named - {x.get_name() for x in copy.get_symbols()} - {"tl", "triton", *dir(builtins)}


def compiled(key=None, repr=None, fn=None, compile=None, is_manual_warmup=None, already_compiled=None, **more):
    kernel = fn.jit_function.device_caches[0][0][key]
    is_async, is_of_bytes = (text in kernel.asm["ttgir"] for text in ("warp_group_dot", "kWidth = 4"))
    missing = ",".join(sorted(names_not_copied(fn.jit_function)))
    print(
        fn.name.rpartition(".")[2],
        "async" if is_async else "sync",
        "bytes" if is_of_bytes else "words",
        missing,
        flush=True,
    )


def assert_same_launches(call):
    """A second call goes to the compiled kernels by itself: addresses for tensors, and all else as Triton passed it."""
    call()
    LAUNCHES.clear()
    taylor_launch._compiled.clear()
    call()
    through_triton, kept = list(LAUNCHES), len(taylor_launch._compiled)
    LAUNCHES.clear()
    call()
    assert kept == len(taylor_launch._compiled) > 0
    assert len(LAUNCHES) == len(through_triton)
    tensors = 0
    for (grid, args), (grid_before, before) in zip(LAUNCHES, through_triton):
        assert grid == grid_before
        assert len(args) == len(before)
        tensors += sum(isinstance(x, torch.Tensor) for x in args)
        for x, y in zip(args, before):
            if is_pointer(y):
                assert is_pointer(x)
            else:
                assert x == y
    # but for the table of cuts, which is launched as usual
    assert tensors <= 4, "the second call went through Triton"


def is_pointer(x):
    return isinstance(x, torch.Tensor) or (isinstance(x, int) and x > 2**32 and x % 16 == 0)


def main():
    driver.set_active(NoGpu())
    knobs.runtime.jit_post_compile_hook = compiled
    from based_kernels import (
        checks,
        gated_short_conv,
        gated_short_conv_step,
        rms_norm,
        sliding_attention,
        sliding_attention_step,
        swiglu,
        taylor_attention,
        taylor_attention_chunk,
        taylor_attention_lazy_step,
        taylor_attention_step,
    )

    # CPU tensors pass, the kernels are those of a GPU, and documents are cut
    checks.interpreted = lambda: True
    taylor_attention_chunk.interpreted = lambda: False
    sys.modules[sliding_attention.__module__].interpreted = lambda: False
    taylor_attention_chunk._segment_length = lambda *args: 32
    features = -(-(FEATURE_DIM + 1) * (FEATURE_DIM + 2) // 16) * 8
    query, key = (torch.randn(1, 77, 2, FEATURE_DIM).to(DTYPE).requires_grad_() for _ in range(2))
    value = torch.randn(1, 77, 2, HEAD_DIM).to(DTYPE).requires_grad_()
    state = torch.zeros(2, 2, HEAD_DIM + 1, features, requires_grad=True)
    cu_seqlens = torch.tensor([0, 40, 77], dtype=torch.int32)
    for options in (
        {},
        {"mask": torch.ones(1, 77), "cu_seqlens": cu_seqlens, "initial_state": state, "output_final_state": True},
    ):

        def forward_and_backward(options=options):
            output, final = taylor_attention(query, key, value, **options)
            total = output.float().sum() + (final.sum() if final is not None else 0)
            torch.autograd.grad(total, [query, key, value] + [state] * bool(options))

        assert_same_launches(forward_and_backward)
    token = [x[:, :1].detach() for x in (query, key, value)]
    mask = torch.ones(1, 1, dtype=torch.bool)
    taylor_attention_step(*token, state[:1].detach().clone(), mask=mask)
    for K in (2, 8):
        projected, weight = torch.zeros(1, 1, 48, dtype=DTYPE), torch.zeros(24, K, dtype=DTYPE)
        inputs = torch.zeros(1, K - 1, 24, dtype=DTYPE)
        gated_short_conv_step(projected, weight, inputs, mask=mask)
        leaves = [x.clone().requires_grad_() for x in (projected, weight, inputs)]
        options = {"state": leaves[2], "mask": mask, "document_ids": mask.int(), "output_final_state": True}
        output, _ = gated_short_conv(*leaves[:2], **(options if K == 8 else {}))
        torch.autograd.grad(output.sum(), leaves if K == 8 else leaves[:2])
    angles = torch.zeros(1, 1, HEAD_DIM)
    for W in (5, 65):
        ring, count = torch.zeros(2, 1, 1, W, HEAD_DIM, dtype=DTYPE), torch.zeros(1, 1, dtype=torch.int64)
        one, group = (torch.zeros(1, 1, heads, HEAD_DIM, dtype=DTYPE) for heads in (1, 3))
        sliding_attention_step(group, one, one, angles, angles, *ring, count, mask=mask)
    angles = torch.zeros(1, 33, HEAD_DIM)
    leaves = [torch.zeros(1, 33, heads, HEAD_DIM, dtype=DTYPE, requires_grad=True) for heads in (2, 1, 1)]
    past = [torch.zeros(1, 1, 9, HEAD_DIM, dtype=DTYPE, requires_grad=True) for _ in range(2)]
    options = {"past_keys": past[0], "past_values": past[1], "mask": torch.ones(1, 42, dtype=torch.bool)}
    sliding_attention(*leaves, angles, angles, window=17, **options).sum().backward()
    for N in (1, 1024):
        both = torch.zeros(N, 48, dtype=DTYPE, requires_grad=True)
        swiglu(*both.chunk(2, dim=-1)).sum().backward()
    for C in (24, 16384):
        hidden_states, weight = (torch.ones(n, C, dtype=DTYPE, requires_grad=True) for n in (2, 1))
        for residual in (hidden_states, hidden_states.float()):
            normed, total = rms_norm(hidden_states, weight[0], 1e-5, residual=residual)
            torch.autograd.grad(normed.sum() + total.sum(), [hidden_states, weight])
    pending = [torch.zeros(1, 2, 64, size).to(DTYPE) for size in (FEATURE_DIM, HEAD_DIM)]
    num_pending = torch.zeros(1, 2, dtype=torch.int32)
    taylor_attention_lazy_step(*token, state[:1].detach().clone(), *pending, num_pending, mask=mask)


if __name__ == "__main__":
    main()
