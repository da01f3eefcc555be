# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What the tests of the small kernels share: how a result is judged, NaN outputs, gradients, graphs, compilations."""

import pytest
import torch


GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative to the root mean square of the oracle, on top of what plain PyTorch does in the same dtype. Half types round
# the output once, by 2e-4 and 1.7e-3: what is allowed beside that is a tenth. But the interpreter cuts bf16 off where a
# GPU rounds: a whole unit in the last place.
TOLERANCE = {torch.float32: 5e-7, torch.float16: 2e-5, torch.bfloat16: 1.7e-4 if GPU else 2**-7}


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")(test))


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rms_error(x, oracle):
    return ((x.double() - oracle).square().mean() / oracle.square().mean()).sqrt().item()


def assert_exact(ours, plain, oracle, luck=1):
    """Ours is as near to the float64 oracle as plain PyTorch in the same dtype, `luck` times, and a tolerance."""
    assert ours.shape == oracle.shape
    assert ours.dtype == plain.dtype
    assert oracle.dtype == torch.float64
    assert torch.isfinite(ours).all()
    error, allowed = rms_error(ours, oracle), luck * rms_error(plain, oracle) + TOLERANCE[ours.dtype]
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
    assert allowed < 0.1, "zeros would pass"


def gradients(op, inputs, d_outputs):
    """Of the outputs of `op` in those of its `inputs` that are floating-point tensors."""
    leaves = [x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    outputs = op(*leaves)
    wanted = [x for x in leaves if torch.is_tensor(x) and x.requires_grad]
    return torch.autograd.grad(outputs, wanted, d_outputs)


def poison_outputs(monkeypatch):
    """Buffers that kernels write start as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)


def assert_graph_replays(call, *changed):
    """Three replays of `call`, which changes the tensors `changed` in place, give the bits of three eager calls."""
    start = [x.clone() for x in changed]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    results = []
    for run in ("eager", "graph"):
        for x, first in zip(changed, start):
            x.copy_(first)
        outputs = []
        for _ in range(3):
            if run == "eager":
                result = call()
            else:
                graph.replay()
                result = captured
            outputs += [x.clone() for x in (result if isinstance(result, tuple) else (result,))]
        results.append(outputs + [x.clone() for x in changed])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def assert_compiles_whole(call, *inputs, changed=()):
    """torch.compile takes `call` as one graph; its outputs and what is changed in place are the same bits."""
    start = [x.clone() for x in changed]
    want = call(*inputs)
    ended = [x.clone() for x in changed]
    for x, first in zip(changed, start):
        x.copy_(first)
    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True)(*inputs)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want))):
        assert torch.equal(a, b)
    assert all(torch.equal(x, last) for x, last in zip(changed, ended))


def assert_gradients_compile_whole(call, inputs, d_outputs):
    """torch.compile takes `call` as one graph, forward and backward; the gradients are the same bits."""
    want = gradients(call, inputs, d_outputs)
    torch._dynamo.reset()
    got = gradients(torch.compile(call, fullgraph=True), inputs, d_outputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def assert_compiles_nothing_new(call, sizes):
    """After the first size no other compiles a kernel."""
    from triton import knobs

    call(sizes[0])
    compiled = []
    hook = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **details: compiled.append(details["repr"])
    try:
        for size in sizes[1:]:
            call(size)
    finally:
        knobs.runtime.jit_post_compile_hook = hook
    assert compiled == []


def assert_refuses_gradients(call, name, x):
    """The op is forward only and says so, by the name of the tensor; without gradients it runs."""
    x.requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name}: got a tensor that requires gradients, .* fit"):
        call()
    with torch.no_grad():
        call()
