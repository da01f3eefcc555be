# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What the model does beside Taylor attention, in training: fused or merged, it is what PyTorch computes in fp64."""

import copy
import importlib.util
from collections import Counter

import pytest
import torch
from kernel_checks import rms_error
from programs import run_python
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from transformers_based import backend, modeling_based, ops


@pytest.fixture
def everywhere(monkeypatch):
    """What is for GPUs happens on the CPU too: kernels, if Triton is there, in its interpreter."""
    monkeypatch.setattr(backend, "INTERPRETS_ALL", True)


def make_projections(dtype=torch.float32, sizes=(8, 8, 24)):
    torch.manual_seed(0)
    holder = nn.Module()
    holder.shares_input = tuple(f"proj_{i}" for i in range(len(sizes)))
    for name, size in zip(holder.shares_input, sizes):
        setattr(holder, name, nn.Linear(16, size, bias=False, dtype=dtype))
    return holder, [getattr(holder, name) for name in holder.shares_input]


def gradients_of(outputs, x, projections, d_outputs):
    inputs = [y for y in (x, *(projection.weight for projection in projections)) if y.requires_grad]
    return torch.autograd.grad(outputs, inputs, d_outputs)


def cases():
    """Weights side by side or not, the gradients of the outputs too."""
    return pytest.mark.parametrize(("laid", "together"), [(False, False), (True, False), (True, True), (False, True)])


@cases()
@pytest.mark.parametrize("shape", [(2, 5, 16), (1, 1, 16), (3, 16)])
def test_projections(everywhere, laid, together, shape):
    holder, projections = make_projections()
    if laid:
        ops.lay_side_by_side(holder)
    x = torch.randn(shape, requires_grad=True)
    d_outputs = torch.randn(*shape[:-1], 40).split((8, 8, 24), -1)
    d_outputs = d_outputs if together else [d.clone() for d in d_outputs]
    exact, exact_x = copy.deepcopy(holder).double(), x.detach().double().requires_grad_()
    exact = [getattr(exact, name) for name in holder.shares_input]
    want = tuple(projection(exact_x) for projection in exact)
    outputs = ops.project(x, *projections)
    assert all(type(y.grad_fn).__name__ == "_ProjectionsBackward" for y in outputs)
    is_one = outputs[0].untyped_storage().data_ptr() == outputs[1].untyped_storage().data_ptr()
    assert is_one == laid
    got_d = gradients_of(outputs, x, projections, d_outputs)
    want_d = gradients_of(want, exact_x, exact, [d.double() for d in d_outputs])
    for a, b in zip((*outputs, *got_d), (*want, *want_d), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@cases()
def test_projections_of_which_some_are_frozen(everywhere, laid, together):
    holder, projections = make_projections()
    if laid:
        ops.lay_side_by_side(holder)
    x = torch.randn(3, 16, requires_grad=True)
    d_outputs = torch.randn(3, 40).split((8, 8, 24), -1)
    d_outputs = d_outputs if together else [d.clone() for d in d_outputs]
    with FlopCounterMode(display=False) as all_flops:
        want = gradients_of(ops.project(x, *projections), x, projections, d_outputs)
    projections[1].weight.requires_grad_(False)
    with FlopCounterMode(display=False) as flops:
        got = gradients_of(ops.project(x, *projections), x, projections, d_outputs)
    assert flops.get_total_flops() == all_flops.get_total_flops() - 2 * 3 * 16 * 8
    torch.testing.assert_close(got, (*want[:2], want[3]))
    # the inputs of the first layer over frozen embeddings
    outputs = ops.project(x.detach(), *projections)
    torch.testing.assert_close(gradients_of(outputs, x.detach(), projections, d_outputs), (want[1], want[3]))


def test_projections_twice_differentiable(everywhere):
    """These are no kernels: gradients of gradients are those of plain PyTorch."""
    torch.manual_seed(0)
    x, *weights = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 1, 4))
    outputs = ops._Projections.apply(x, *weights)
    d_outputs = [torch.ones_like(y) for y in outputs]
    first = torch.autograd.grad(outputs, [x, *weights], d_outputs, create_graph=True)
    want = torch.autograd.grad([x @ weight.t() for weight in weights], [x, *weights], d_outputs)
    torch.testing.assert_close(first, want)
    assert torch.autograd.gradgradcheck(ops._Projections.apply, (x, *weights))


@pytest.mark.parametrize("why", ["adapter", "bias", "hook", "backward hook", "autocast", "torch", "CPU", "no gradient"])
def test_projections_that_stay_plain(monkeypatch, why):
    monkeypatch.setattr(backend, "INTERPRETS_ALL", why != "CPU")
    holder, projections = make_projections()
    ops.lay_side_by_side(holder)
    calls = []
    if why == "adapter":
        projections[0] = nn.Sequential(projections[0])
    elif why == "bias":
        projections[0].bias = nn.Parameter(torch.ones(8))
    elif why == "hook":
        projections[0].register_forward_hook(lambda *x: calls.append("hook"))
    elif why == "backward hook":
        projections[0].register_full_backward_hook(lambda *x: calls.append("hook"))
    elif why == "torch":
        monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "torch")
    x = torch.randn(2, 16, requires_grad=True)
    want = [projection(x) for projection in projections]
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"), torch.set_grad_enabled(why != "no gradient"):
        outputs = ops.project(x, *projections)
        assert all(type(y.grad_fn).__name__ != "_ProjectionsBackward" for y in outputs)
    for a, b in zip(outputs, want):
        torch.testing.assert_close(a.float(), b, rtol=2e-2 if why == "autocast" else 1e-5, atol=2e-2)
    if why == "backward hook":
        outputs[0].sum().backward()
    assert calls == ["hook"] * ("hook" in why)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "parts"), [((1, 1, 32), 4), ((64, 1, 96), 4), ((65, 1, 48), 2), ((2, 128, 32), 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_in_parts(everywhere, monkeypatch, dtype, shape, parts, bias):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "triton")
    torch.manual_seed(0)
    projection = nn.Linear(shape[-1], 24, bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    made = ops.project_out(x, projection, may_be_parts=True)
    assert made.sums.shape == (parts, *shape[:-1], 24)
    assert made.sums.dtype == torch.float32
    assert made.bias is projection.bias
    exact, plain = copy.deepcopy(projection).double()(x.double()), projection(x)
    total = made.sums.double().sum(0) + (0 if made.bias is None else made.bias.double())
    assert rms_error(total, exact) <= min(rms_error(plain, exact), 1e-6)
    torch.testing.assert_close(made.added_up(dtype), plain)
    assert isinstance(ops.project_out(x, projection), torch.Tensor)


@pytest.mark.parametrize(
    "why", ["adapter", "hook", "fp32", "weights in fp32", "autocast", "torch", "CPU", "gradients", "tokens", "size"]
)
def test_products_that_stay_in_one(monkeypatch, why):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(backend, "INTERPRETS_ALL", why != "CPU")
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "torch" if why == "torch" else "triton")
    dtype = torch.float32 if why == "fp32" else torch.bfloat16
    projection = nn.Linear(40 if why == "size" else 32, 8, dtype=torch.float32 if "weights" in why else dtype)
    x = torch.randn(257 if why == "tokens" else 2, 1, projection.in_features, dtype=dtype)
    if why == "adapter":
        projection = nn.Sequential(projection)
    calls = []
    if why == "hook":
        projection.register_forward_hook(lambda *arguments: calls.append(1))
    if why == "weights in fp32":
        # as Liger and FSDP leave it to the module, so it is left to the module here
        monkeypatch.setattr(
            nn.Linear, "forward", lambda self, x: nn.functional.linear(x.float(), self.weight, self.bias)
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"), torch.set_grad_enabled(why == "gradients"):
        made = ops.project_out(x, projection, may_be_parts=True)
    assert isinstance(made, torch.Tensor)
    assert calls == [1] * (why == "hook")


@torch.no_grad()
def test_parts_that_meet_plain_pytorch(monkeypatch):
    """The norm adds them up itself where its kernel does not run."""
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "torch")
    torch.manual_seed(0)
    sums, bias, weight = torch.randn(4, 2, 1, 24), torch.randn(24).bfloat16(), torch.randn(24).bfloat16()
    residual = torch.randn(2, 1, 24)
    want_normed, want_total = ops.rms_norm((sums.sum(0) + bias).bfloat16(), weight, 1e-5, residual)
    normed, total = ops.rms_norm(ops.Parts(sums, bias), weight, 1e-5, residual.clone(), in_place=True)
    torch.testing.assert_close(total, want_total)
    torch.testing.assert_close(normed, want_normed)


def test_weights_inside_of_something_larger_stay_there():
    """ZeRO 1 and 2 and FSDP keep the weights as parts of a tensor of theirs, and change them there."""
    holder, projections = make_projections()
    flat = torch.cat([projection.weight.detach().flatten() for projection in projections[::-1]])
    parts = flat.split([projection.weight.numel() for projection in projections[::-1]])[::-1]
    for projection, part in zip(projections, parts):
        projection.weight.data = part.view_as(projection.weight)
    ops.lay_side_by_side(holder)
    flat.zero_()
    assert not any(projection.weight.any() for projection in projections)


def labels_of(ids, attention_mask=None, **inputs):
    """What stands where no token exists is nobody's concern, nor what is foretold there: the first token of a row."""
    if attention_mask is None:
        return ids
    follows = attention_mask * nn.functional.pad(attention_mask[:, :-1], (1, 0), value=1)
    return ids.masked_fill(follows == 0, -100)


def loss_and_gradients(model, ids, **inputs):
    model.zero_grad(set_to_none=True)
    output = model(ids, labels=labels_of(ids, **inputs), use_cache=False, **inputs)
    output.loss.backward()
    return output.logits.detach(), {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def paddings(ids):
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {
        "padded": {"attention_mask": mask},
        "packed": {"seq_idx": (torch.arange(ids.shape[1], device=ids.device) // 3).expand(2, -1)},
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is no interpreter")
@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("laid", "padded"),
        ("laid", "packed"),
        ("frozen", "packed"),
        ("checkpointed", "padded"),
        ("stream in bf16", "padded"),
        ("autocast", "packed"),
    ],
)
def test_a_training_step_with_every_kernel(monkeypatch, everywhere, tiny_model, use_backend, way, kind):
    """In the interpreter: logits and the gradients of all parameters against plain PyTorch in fp64."""
    half = way in ("stream in bf16", "autocast")
    # Taylor attention takes the interpreter longest
    first = "linear_attention" if (way, kind) == ("laid", "packed") else "conv"
    model = tiny_model(residual_in_fp32=way != "stream in bf16", layer_types=[first, "sliding_attention"]).train()
    model = model.bfloat16() if way == "stream in bf16" else model
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = paddings(ids)[kind]
    exact = copy.deepcopy(model).double()
    if way == "laid":
        ops.lay_side_by_side(model)
    if way == "frozen":
        for name, parameter in (*model.named_parameters(), *exact.named_parameters()):
            parameter.requires_grad_("norm" not in name and "up_proj" not in name)
    if way == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    use_backend("torch")
    logits, want = loss_and_gradients(exact, ids, **inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        plain_logits, plain = loss_and_gradients(model, ids, **inputs)
    use_backend("triton")
    seen = set()
    for op in ("rms_norm", "swiglu"):
        fused = getattr(backend.based_kernels, op)
        monkeypatch.setattr(
            backend.based_kernels, op, lambda *x, op=op, fused=fused, **more: seen.add(op) or fused(*x, **more)
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        got_logits, got = loss_and_gradients(model, ids, **inputs)
    assert seen == {"rms_norm", "swiglu"}
    exists = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    assert got.keys() == want.keys() == plain.keys()
    pairs = {name: (got[name], plain[name], want[name]) for name in want}
    pairs["logits"] = (got_logits[exists], plain_logits[exists], logits[exists])
    # the interpreter cuts bf16 off where plain PyTorch rounds it
    times, tolerance = (3, 2e-2) if half else (1, 2e-5)
    for name, (ours, near, exact) in pairs.items():
        scale = exact.square().mean().sqrt()
        error, allowed = ((x.double() - exact).square().mean().sqrt() / scale for x in (ours, near))
        assert error <= times * allowed + tolerance, name
        assert times * allowed + tolerance < 0.5, name


def test_sums_are_left_to_the_next_norm_unless_somebody_looks(tiny_model):
    """With the same bits, whoever sees the layers sees the residual stream."""
    model = tiny_model()
    ids = torch.arange(1, 9)[None]

    def kinds_between_layers(**options):
        """What the layers return, seen without a hook; and the logits."""
        kinds, forward = set(), modeling_based.BasedDecoderLayer.forward
        with pytest.MonkeyPatch.context() as patch:

            def spy(self, *args, **kwargs):
                output = forward(self, *args, **kwargs)
                kinds.add(type(output))
                return output

            patch.setattr(modeling_based.BasedDecoderLayer, "forward", spy)
            return kinds, model(ids, **options)

    kinds, plain = kinds_between_layers()
    assert kinds == {tuple}
    layer, norms = model.model.layers[2], (model.model.layers[1].input_layernorm, model.model.norm)
    for module in (layer, *norms):
        outputs = []
        for register, hook in (
            (module.register_forward_hook, lambda module, args, output, outputs=outputs: outputs.append(output)),
            (module.register_forward_pre_hook, lambda module, args, outputs=outputs: outputs.append(args[0])),
            (module.register_full_backward_hook, lambda *gradients: None),
        ):
            handle = register(hook)
            kinds, output = kinds_between_layers()
            handle.remove()
            assert kinds == {torch.Tensor}
            assert torch.equal(output.logits, plain.logits)
        assert [type(x) for x in outputs] == [torch.Tensor] * 2
    model.train().gradient_checkpointing_enable()
    assert kinds_between_layers(use_cache=False)[0] == {torch.Tensor}
    model.eval()
    assert kinds_between_layers()[0] == {tuple}
    kinds, output = kinds_between_layers(output_hidden_states=True)
    assert kinds == {torch.Tensor}
    assert torch.equal(output.logits, plain.logits)
    # what each layer returns is what its successor, called by itself, goes on from
    layer, stream = model.model.layers[3], output.hidden_states[3]
    assert layer.layer_type == "conv"
    norm = model.model.norm(layer(stream))
    torch.testing.assert_close(norm, output.hidden_states[4], rtol=0, atol=0)


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_sums_are_taken_in_place_where_nobody_keeps_them(
    tiny_model, everywhere, use_backend, monkeypatch, backend_name
):
    """With the same bits; what the caller passed, and what hooks have seen, stays as it was."""
    use_backend(backend_name)
    model = tiny_model()
    embeds = torch.randn(1, 8, 32)
    before, places, forward = embeds.clone(), [], modeling_based.BasedDecoderLayer.forward

    def spy(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        places.append(output[0])
        return output

    monkeypatch.setattr(modeling_based.BasedDecoderLayer, "forward", spy)

    def streams() -> int:
        """How many tensors the residual stream went through; those of the layers are kept here."""
        return len({x.data_ptr() for x in places})

    wanted = model(inputs_embeds=embeds).logits.detach()
    assert streams() == 4
    places.clear()
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, wanted)
        assert streams() == 1
        assert torch.equal(embeds, before)
        for register in (model.model.layers[1].post_attention_layernorm.register_forward_hook, register_for_all):
            places.clear()
            seen = []
            handle = register(lambda module, args, output, seen=seen: seen.append((output, copy.deepcopy(output))))
            assert torch.equal(model(inputs_embeds=embeds).logits, wanted)
            handle.remove()
            assert streams() == 4
            for kept, copied in seen:
                torch.testing.assert_close(kept, copied, rtol=0, atol=0)


def test_sums_under_vmap_of_one_weight(tiny_model):
    """Above the layer of that weight the stream has more dimensions than what it is added to."""
    model, ids, name = tiny_model(), torch.arange(1, 9)[None], "model.layers.1.mlp.down_proj.weight"
    weight = model.get_parameter(name).detach()
    with torch.no_grad():
        logits = torch.func.vmap(
            lambda x: torch.func.functional_call(model, {name: x}, (ids,), {"use_cache": False}).logits
        )(torch.stack([weight, 2 * weight]))
        assert not torch.equal(*logits)
        torch.testing.assert_close(logits[0], model(ids).logits)


def register_for_all(hook):
    def of_norms(module, args, output):
        if isinstance(module, modeling_based.BasedRMSNorm):
            hook(module, args, output)

    return nn.modules.module.register_module_forward_hook(of_norms)


def test_a_compiled_model_leaves_its_sums_too(tiny_model):
    model = tiny_model(layer_types=["conv", "conv"])
    ids = torch.arange(1, 9)[None]
    torch._dynamo.reset()
    compiled = torch.compile(model.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        got = compiled(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(got, model.model(ids, use_cache=False).last_hidden_state)


def kept_by_compiled_training(model, ids, compiler):
    """How many tensors of each width, `[B, T, width]` or `[B * T, width]`, the backward pass of a loss waits with."""
    kept = Counter()

    def pack(x):
        if x.is_floating_point() and x.dim() > 1 and x.shape[:-1].numel() == ids.numel():
            kept[x.shape[-1]] += 1
        return x

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = compiled(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return kept


def check_gradients(model, want):
    for name, x in model.named_parameters():
        torch.testing.assert_close(x.grad.double(), want[name], rtol=1e-3, atol=1e-4 * want[name].abs().max().item())


def check_kept_by_compiled_training(model, compiler):
    """Gradients are those of fp64; no product keeps what is cheap to make anew from what is there in any case."""
    config, ids = model.config, torch.randint(1, 97, (2, 48), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    _, want = loss_and_gradients(copy.deepcopy(model).double(), ids)
    model.zero_grad(set_to_none=True)
    kept = kept_by_compiled_training(model, ids, compiler)
    check_gradients(model, want)
    assert kept[config.intermediate_size] == 2 * config.num_hidden_layers
    assert kept[config.hidden_size] == 2 * config.num_hidden_layers + 1
    return kept


CONVOLUTIONS = {"layer_types": ["conv", "conv"], "intermediate_size": 56, "conv_intermediate_size": 40}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_compiled_training_keeps(tiny_model, checkpointing):
    """On a CPU, by the same partition of the graph as Inductor's; with checkpointing of layers, their inputs."""
    model = tiny_model(**CONVOLUTIONS).train()
    if not checkpointing:
        check_kept_by_compiled_training(model, "aot_eager_decomp_partition")
        return
    ids = torch.arange(1, 17)[None]
    _, want = loss_and_gradients(copy.deepcopy(model).double(), ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad(set_to_none=True)
    kept = kept_by_compiled_training(model, ids, "aot_eager_decomp_partition")
    check_gradients(model, want)
    assert kept[model.config.intermediate_size] == 0
    assert 0 < kept[model.config.hidden_size] <= model.config.num_hidden_layers + 1


def test_what_compiled_training_keeps_beside_kernels():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    program = ("tests/kept_without_gpu.py", "90", "8", "16", "bfloat16")
    done = run_python(*program, TRITON_INTERPRET=None, TRANSFORMERS_BASED_BACKEND="triton")
    counts = dict(line.split() for line in done.stdout.splitlines())
    # Two convolutions, Taylor attention with its table of rolls, the window.
    assert counts["kernels"] == "5"
    # Gate and up of each layer, the two projections of each convolution; no product of a gate, no output.
    assert counts["56"] == "8"
    assert counts["80"] == "2"
    assert "40" not in counts


@pytest.mark.gpu
def test_gpu_what_compiled_training_keeps(tiny_model):
    kept = check_kept_by_compiled_training(tiny_model(**CONVOLUTIONS).cuda().train(), "inductor")
    assert kept[CONVOLUTIONS["conv_intermediate_size"]] == 0
    assert kept[2 * CONVOLUTIONS["conv_intermediate_size"]] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_gpu_training_steps(tiny_model, use_backend, kind):
    """In bf16, eager, compiled whole and checkpointed: as near to fp64 as plain PyTorch, within a rounding or two."""
    model = tiny_model().bfloat16().cuda().train()
    ids = torch.randint(1, 97, (2, 200), generator=torch.Generator().manual_seed(0)).cuda()
    inputs = paddings(ids)[kind]
    use_backend("torch")
    _, want = loss_and_gradients(copy.deepcopy(model).double(), ids, **inputs)
    _, plain = loss_and_gradients(model, ids, **inputs)
    use_backend("triton")
    for way in ("eager", "compiled", "checkpointed"):
        torch._dynamo.reset()
        if way == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # packing asks the GPU where documents begin, outside of any graph
        whole = way == "compiled" and kind == "padded"
        forward = torch.compile(model, fullgraph=True) if whole else model
        model.zero_grad(set_to_none=True)
        forward(ids, labels=labels_of(ids, **inputs), use_cache=False, **inputs).loss.backward()
        for name, x in model.named_parameters():
            exact = want[name]
            scale = exact.square().mean().sqrt()
            error, allowed = ((y.double() - exact).square().mean().sqrt() / scale for y in (x.grad, plain[name]))
            assert error <= 2 * allowed + 1e-2, (way, name)
            assert 2 * allowed + 1e-2 < 0.5, name


@pytest.mark.parametrize(
    "sizes",
    [{"sliding_window": 4097}, {"hidden_size": 48}, {"hidden_size": 40}],
    ids=["window 4097", "head_dim 12", "head_dim 10"],
)
def test_sizes_beyond_the_kernel_of_the_window_step(everywhere, tiny_model, use_backend, sizes):
    layers = ["conv", "sliding_attention"]
    model = tiny_model(layer_types=layers, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, **sizes)
    ids = torch.arange(1, 11).view(2, 5)
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    use_backend("torch")
    expected = model.generate(ids, **options)
    use_backend("triton")
    assert torch.equal(model.generate(ids, **options), expected)


def test_limits_are_those_of_the_kernels():
    checks = pytest.importorskip("based_kernels.checks", reason="the fused kernels need Triton")
    ours = ops._MAX_HEAD_DIM, ops._MAX_STEP_HEAD_DIM, ops._MAX_STEP_WINDOW, ops._MAX_NORM_DIM
    assert ours == (checks.MAX_SLIDING_HEAD_DIM, checks.MAX_HEAD_DIM, checks.MAX_WINDOW, checks.MAX_NORM_DIM)


def test_norms_wider_than_the_kernel(everywhere, use_backend):
    use_backend("triton")
    torch.manual_seed(0)
    x, weight = torch.randn(2, 16392), torch.randn(16392)
    normed, _ = ops.rms_norm(x, weight, 1e-5)
    exact = x.double()
    torch.testing.assert_close(
        normed, (weight * exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()).float(), atol=1e-5, rtol=1e-5
    )
