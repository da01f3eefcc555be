# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""A program, not a test: which tensors the backward pass of a compiled model keeps, with kernels in its graph.

    TRANSFORMERS_BASED_BACKEND=triton python kept_without_gpu.py 90 8 16 bfloat16

Prints how many of each width there are. No GPU is needed: the graph is traced, cut in forward and backward as Inductor
cuts it, and not compiled.
"""

import torch.utils._triton


# What Dynamo asks before it takes a kernel into its graph.
torch.utils._triton.has_triton = lambda *arguments: True

import sys  # noqa: E402
from collections import Counter  # noqa: E402

from launches_without_gpu import pretend, small_config  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from triton import knobs  # noqa: E402

from transformers_based import BasedForCausalLM  # noqa: E402


BATCH, LENGTH = 2, 96


def cut(joint, inputs, *, num_fwd_outputs, **options):
    options["compiler"] = "inductor"
    forward, _ = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)
    (outputs,) = next(iter(reversed(forward.graph.nodes))).args
    kept = Counter()
    for node in outputs[num_fwd_outputs:]:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[:-1].numel() == BATCH * LENGTH:
            kept[value.shape[-1]] += 1
    print("kernels", sum("triton_kernel_wrapper" in str(node.target) for node in forward.graph.nodes))
    for width, count in sorted(kept.items()):
        print(width, count)
    # The rest would run on a GPU.
    sys.exit()


def main():
    pretend()
    knobs.runtime.jit_cache_hook = None
    model = BasedForCausalLM(small_config(intermediate_size=56, conv_intermediate_size=40)).to(torch.bfloat16).train()
    compiler = aot_autograd(fw_compiler=None, partition_fn=cut, decompositions=select_decomp_table())
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    ids = torch.full((BATCH, LENGTH), 5)
    compiled(ids, labels=ids, use_cache=False)


if __name__ == "__main__":
    main()
