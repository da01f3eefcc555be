# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Padding-free packing as Trainer meets it: DataCollatorWithFlattening, losses and gradients, both backends, compiled.

The oracle is each document alone, in fp64. Which documents the forward sees for which arguments is in test_modeling.py.
"""

import pytest
import torch
from document_rows import document_rows, pad
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DataCollatorWithFlattening


ONE_OF_EACH = ["conv", "linear_attention", "sliding_attention"]
# A token alone, shorter than the convolution, longer than window, chunk and block.
LENGTHS = [5, 1, 37, 2, 1, 21]
# What Triton's interpreter computes in seconds.
FEW = [2, 1, 18]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def backend(request, use_backend):
    use_backend(request.param)
    return request.param


@pytest.fixture
def model(tiny_model):
    return tiny_model(layer_types=[*ONE_OF_EACH, "conv", "linear_attention"]).to(DEVICE).train()


def targets(rows):
    """Tokens that are predicted."""
    return sum(int((row["labels"][1:] != -100).sum()) for row in rows)


def flatten(rows, **options):
    batch = DataCollatorWithFlattening(**options)(rows)
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def backward(model, batches, count):
    """The summed loss of the batches and its gradients, in fp64."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.double() for name, p in model.named_parameters()}


def alone(model, rows):
    return backward(model, [{name: x[None].to(DEVICE) for name, x in row.items()} for row in rows], targets(rows))


def exact(model, rows, monkeypatch):
    """`alone` in fp64, which only plain PyTorch computes."""
    with monkeypatch.context() as patch:
        patch.setenv("TRANSFORMERS_BASED_BACKEND", "torch")
        dtype = model.dtype
        found = alone(model.double(), rows)
        model.to(dtype)
    return found


def assert_as_good(got, plain, exact, tolerance):
    """Loss and gradients are as near to fp64 as those of the documents alone in the same dtype."""
    (loss, gradients), (plain_loss, plain_gradients), (exact_loss, exact_gradients) = got, plain, exact
    assert abs(loss - exact_loss) <= abs(plain_loss - exact_loss) + tolerance * exact_loss
    for name, reference in exact_gradients.items():
        scale = reference.square().mean().sqrt()
        assert scale > 1e-5, name
        error, allowed = ((x[name] - reference).square().mean().sqrt() for x in (gradients, plain_gradients))
        assert error <= 1.1 * allowed + tolerance * scale, f"{name}: {error / scale:.1e}, {allowed / scale:.1e}"


PATTERNS = [["conv"], ["linear_attention"], ["sliding_attention"], ONE_OF_EACH]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer_types", PATTERNS, ids="-".join)
def test_loss_and_gradients_equal_the_documents_alone(tiny_model, layer_types, dtype, backend, monkeypatch):
    few = backend == "triton" and DEVICE == "cpu"
    if few and (layer_types, dtype) != (ONE_OF_EACH, torch.float32):
        pytest.skip("Triton's interpreter is slow; runs on a GPU")
    model, rows = tiny_model(layer_types=layer_types).to(DEVICE, dtype).train(), document_rows(FEW if few else LENGTHS)
    batch = flatten(rows, return_flash_attn_kwargs=True, return_seq_idx=True)
    # A view with gaps, as a collator may cut it from a larger tensor.
    batch["input_ids"] = torch.stack([batch["input_ids"], batch["labels"]], dim=-1)[..., 0]
    got = backward(model, [batch], targets(rows))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    assert_as_good(got, alone(model, rows), exact(model, rows, monkeypatch), tolerance)


KEYS = [
    {},
    {"return_flash_attn_kwargs": True},
    {"return_seq_idx": True},
    {"return_position_ids": False, "return_flash_attn_kwargs": True},
    {"return_position_ids": False, "return_seq_idx": True},
]


@pytest.mark.parametrize("lengths", [LENGTHS, [1, 1, 1, 4], [40], [64, 3]], ids=str)
@pytest.mark.parametrize("options", KEYS, ids=str)
def test_every_option_of_the_collator(model, options, lengths, monkeypatch):
    """A batch of one document among them."""
    rows = document_rows(lengths)
    got = backward(model, [flatten(rows, **options)], targets(rows))
    assert_as_good(got, alone(model, rows), exact(model, rows, monkeypatch), 1e-5)


def test_positions_may_start_anywhere(model, monkeypatch):
    """`position_ids_start` of newer collators."""
    rows = document_rows([5, 1, 1, 37])
    batch = flatten(rows)
    batch["position_ids"] += 2
    got = backward(model, [batch], targets(rows))
    assert_as_good(got, alone(model, rows), exact(model, rows, monkeypatch), 1e-5)


@pytest.fixture
def in_fixed_order():
    """On a GPU, plain PyTorch adds up gradients in whatever order its blocks end, unless it is told not to."""
    torch.use_deterministic_algorithms(DEVICE == "cuda", warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("changed", [0, 1, 2])
@pytest.mark.usefixtures("in_fixed_order")
def test_perturbing_one_document_leaves_the_gradients_of_the_others_alone(tiny_model, backend, changed):
    """Bitwise."""
    few = backend == "triton" and DEVICE == "cpu"
    if few and changed != 1:
        pytest.skip("Triton's interpreter is slow; runs on a GPU")
    model = tiny_model(layer_types=["linear_attention"] if few else ONE_OF_EACH).to(DEVICE).train()
    rows = document_rows([7, 18, 3] if few else [5, 37, 21])
    batch = flatten(rows, return_seq_idx=True)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    here = batch["seq_idx"][0] == changed

    def gradient(x):
        x = x.clone().requires_grad_()
        model(inputs_embeds=x, use_cache=False, num_items_in_batch=1, **batch).loss.backward()
        return x.grad[0]

    other = torch.where(here[:, None], embeds.roll(1, dims=1) * 1.5, embeds)
    before, after = gradient(embeds), gradient(other)
    assert torch.equal(after[~here], before[~here])
    assert (after[here] != before[here]).any(-1).float().mean() >= 0.75
    assert before.abs().max() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_packing_and_single_documents_reach_the_same_loss(model, side, monkeypatch):
    rows = document_rows(LENGTHS)
    padded = {name: x.to(DEVICE) for name, x in pad(rows, side).items()}
    plain, reference = alone(model, rows), exact(model, rows, monkeypatch)
    for batch in (padded, flatten(rows)):
        assert_as_good(backward(model, [batch], targets(rows)), plain, reference, 1e-5)
        # Without a count, the mean over the same tokens.
        assert model(**batch).loss.item() == pytest.approx(reference[0], abs=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("in_fixed_order")
def test_gradient_checkpointing(model, reentrant):
    rows = document_rows(LENGTHS)
    batch = flatten(rows, return_flash_attn_kwargs=True)
    loss, expected = backward(model, [batch], targets(rows))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, found = backward(model, [batch], targets(rows))
    assert again == loss
    # The kernels add up the residual stream otherwise where layers are checkpointed.
    tolerance = 1e-6 if DEVICE == "cuda" else 0
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, atol=tolerance * x.abs().max().item(), rtol=0)


def test_compiled(tiny_model, monkeypatch):
    """Several documents, then one alone."""
    model = tiny_model(layer_types=ONE_OF_EACH).to(DEVICE).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for lengths in ([5, 1, 37], [30]):
        rows = document_rows(lengths)
        batch = flatten(rows, return_flash_attn_kwargs=True)
        model.zero_grad()
        loss = compiled(**batch, num_items_in_batch=targets(rows), use_cache=False).loss
        loss.backward()
        got = loss.item(), {name: p.grad.double() for name, p in model.named_parameters()}
        assert_as_good(got, alone(model, rows), exact(model, rows, monkeypatch), 1e-5)
    with pytest.raises(ValueError, match="`cu_seq_lens_q` must rise from 0 to the number of tokens"):
        compiled(torch.arange(20)[None].to(DEVICE), cu_seq_lens_q=torch.tensor([0, 7, 19]), use_cache=False)


BOUNDS = {
    "too short": ([0, 7, 19], None, r"`cu_seq_lens_q` must rise from 0 to the number of tokens \(20\)"),
    "too long": ([0, 7, 21], None, "`cu_seq_lens_q` must rise"),
    "not from 0": ([7, 20], None, "`cu_seq_lens_q` must rise"),
    "an empty document": ([0, 7, 7, 20], None, "`cu_seq_lens_q` must rise"),
    "backwards": ([0, 9, 7, 20], None, "`cu_seq_lens_q` must rise"),
    "two dimensions": ([[0, 20]], None, "`cu_seq_lens_q` must rise"),
    "nothing": ([], None, "`cu_seq_lens_q` must rise"),
    "a number": (20, None, "`cu_seq_lens_q` must rise"),
    "other keys": ([0, 7, 20], [0, 8, 20], "`cu_seq_lens_k` must be `cu_seq_lens_q`"),
    "keys alone": (None, [0, 8, 20], "`cu_seq_lens_k` must be `cu_seq_lens_q`"),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", BOUNDS)
def test_bounds_that_do_not_fit(model, case, checkpointing):
    queries, keys, message = BOUNDS[case]
    given = {"cu_seq_lens_q": queries, "cu_seq_lens_k": keys}
    arguments = {name: torch.tensor(x, device=DEVICE).int() for name, x in given.items() if x is not None}
    if checkpointing:
        model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=message):
        model(torch.arange(20, device=DEVICE)[None], **arguments)


def test_bounds_that_are_a_list(model):
    with pytest.raises(ValueError, match="`cu_seq_lens_q` must be a tensor of integers; got list"):
        model(torch.arange(20, device=DEVICE)[None], cu_seq_lens_q=[0, 7, 20])


COUNTED_ON = torch.arange(20)[None]
RESTARTED = torch.cat([torch.arange(7), torch.arange(13)])[None]
OF_TWO = torch.tensor([0] * 7 + [1] * 13)[None]
CONTRADICTIONS = {
    "bounds and positions": {"cu_seq_lens_q": [0, 8, 20], "position_ids": RESTARTED},
    "bounds within what goes on": {"cu_seq_lens_q": [0, 7, 12, 20], "position_ids": RESTARTED},
    "one document that restarts": {"cu_seq_lens_q": [0, 20], "position_ids": RESTARTED},
    "a first document of one token": {"cu_seq_lens_q": [0, 2, 20], "position_ids": COUNTED_ON.sub(1).clamp_min(0)},
    "bounds and indices": {"cu_seq_lens_q": [0, 8, 20], "seq_idx": OF_TWO},
    "bounds and one index": {"cu_seq_lens_q": [0, 8, 20], "seq_idx": torch.zeros_like(OF_TWO)},
    "indices and positions": {"seq_idx": OF_TWO.roll(1, 1), "position_ids": RESTARTED},
    "one index and positions": {"seq_idx": torch.zeros_like(OF_TWO), "position_ids": RESTARTED},
    "all three": {"cu_seq_lens_q": [0, 7, 20], "seq_idx": OF_TWO, "position_ids": RESTARTED.roll(1, 1)},
}
AGREEMENTS = {
    "all three": {"cu_seq_lens_q": [0, 7, 20], "seq_idx": OF_TWO + 3, "position_ids": RESTARTED},
    "positions that count on": {"cu_seq_lens_q": [0, 7, 20], "position_ids": COUNTED_ON},
    "positions from elsewhere": {"seq_idx": OF_TWO, "position_ids": RESTARTED + 5},
    "positions left out within a document": {"seq_idx": OF_TWO, "position_ids": RESTARTED + 4 * (RESTARTED > 5)},
    "padding as a document": {"seq_idx": OF_TWO, "position_ids": RESTARTED.masked_fill(OF_TWO == 1, 0)},
}


def documents(case):
    return {name: torch.as_tensor(x, device=DEVICE).int() for name, x in case.items()}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_documents_told_twice_that_differ(model, case):
    *_, first, second = CONTRADICTIONS[case]
    if case == "all three":
        first = "cu_seq_lens_q"
    with pytest.raises(ValueError, match=f"`{first}` and `{second}` tell of different documents"):
        model(COUNTED_ON.to(DEVICE), **documents(CONTRADICTIONS[case]))


@pytest.mark.parametrize("case", AGREEMENTS)
def test_documents_told_twice_alike(model, case):
    ids, given = COUNTED_ON.to(DEVICE), documents(AGREEMENTS[case])
    with torch.no_grad():
        got = model(ids, **given).logits
        positions = given["position_ids"]
        alone = [
            model(ids[:, part], position_ids=positions[:, part], seq_idx=torch.zeros_like(ids[:, part])).logits
            for part in (slice(7), slice(7, 20))
        ]
    torch.testing.assert_close(got, torch.cat(alone, dim=1), atol=1e-5, rtol=0)


def test_one_document_may_leave_positions_out(model):
    """Whoever says that it is one document."""
    ids = COUNTED_ON.to(DEVICE)
    with torch.no_grad():
        outputs = model.eval()(ids, position_ids=ids + 9 * (ids > 7), seq_idx=torch.zeros_like(ids), use_cache=True)
    assert outputs.past_key_values.get_seq_length() == 20
