# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Decoding steps recorded as a CUDA graph: `generate` gives what it gives without, whatever happens between two steps.

Without a GPU the recorder is a stand-in that, like a graph, knows nothing but the addresses of its tensors.
"""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import StaticCache, TextIteratorStreamer, TextStreamer
from transformers.generation import GenerationMixin, StoppingCriteria
from word_tokenizer import word_tokenizer

from transformers_based import (
    BasedForCausalLM,
    CacheSnapshot,
    TaylorCacheLayer,
    cache_based,
    decode_graph,
    modeling_based,
    ops,
)


GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def replays(monkeypatch):
    """A list that grows by one with each replay of a graph."""
    log, record = [], decode_graph.record

    def counting(forward, device):
        replay, output = (record if GPU else stand_in)(forward, device)

        def counted():
            log.append(1)
            replay()

        return counted, output

    monkeypatch.setattr(decode_graph, "record", counting)
    if not GPU:
        init = decode_graph._Graph.__init__

        def stand_in(forward, device):
            return record_without_gpu(forward, cache_at_hand[-1])

        def remembering(graph, model, step):
            cache_at_hand.append(step.cache)
            init(graph, model, step)

        cache_at_hand = []
        monkeypatch.setattr(decode_graph._Graph, "__init__", remembering)
        monkeypatch.setattr(decode_graph, "_DEVICES", ("cpu",))
        # as on a GPU, where a step makes room for tokens that wait
        monkeypatch.setattr(modeling_based, "is_lazy_step_faster", lambda query, value: value.dtype != torch.float64)
        monkeypatch.setattr(
            GenerationMixin,
            "_valid_auto_compile_criteria",
            lambda self, kwargs, config: (
                isinstance(kwargs.get("past_key_values"), StaticCache) and not config.disable_compile
            ),
        )
    return log


def record_without_gpu(forward, cache):
    """Runs `forward` on the tensors that the layers hold now, whatever they hold later, and not before a replay."""
    home = [decode_graph._tensors(layer) for layer in cache.layers]
    layers = [copy.copy(layer) for layer in cache.layers]
    for layer in layers:
        if isinstance(layer, TaylorCacheLayer):
            layer.recurrent_states = dict(layer.recurrent_states)
            layer.has_previous_state = dict(layer.has_previous_state)

    @contextmanager
    def at_home():
        away, cache.layers = cache.layers, [copy.copy(layer) for layer in layers]
        yield
        cache.layers = away

    before = [{name: x.clone() for name, x in tensors.items()} for tensors in home]
    output = forward()
    for tensors, values in zip(home, before):
        for name, x in tensors.items():
            x.copy_(values[name])
    output = torch.full_like(output, float("nan"))

    def replay():
        with at_home():
            output.copy_(forward())

    return replay, output


@pytest.fixture
def model(based_tiny):
    based_tiny.generation_config.pad_token_id = 0
    return based_tiny.to(DEVICE)


def prompt(batch=2, length=11, seed=0):
    return torch.randint(1, 500, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def plainly(model, ids, **options):
    return model.generate(ids, disable_compile=True, **options)


class StopAtLength(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 17, device=input_ids.device)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"stopping_criteria": [StopAtLength()]},
        {"repetition_penalty": 1.3, "num_beams": 2, "do_sample": True},
    ],
    ids=lambda options: " ".join(options) or "greedy",
)
@pytest.mark.parametrize("padding", [0, 5])
def test_tokens_are_those_of_the_plain_path(model, replays, options, padding):
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, **options}
    tokens = []
    for generate in (plainly, BasedForCausalLM.generate):
        torch.manual_seed(0)
        tokens.append(generate(model, ids, **arguments))
    assert torch.equal(*tokens)
    # The prefill, one step as usual, the others from the graph; transformers has no place for one in a beam search. By
    # the time it stops early, one more is on its way.
    assert len(replays) == (0 if "num_beams" in options else 5 if "stopping_criteria" in options else 10)


def test_logits_are_those_of_the_plain_path(model):
    options = {"max_new_tokens": 100, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain, fast = plainly(model, prompt(), **options), model.generate(prompt(), **options)
    torch.testing.assert_close(torch.stack(fast.logits), torch.stack(plain.logits), atol=2e-4, rtol=0)
    assert torch.equal(fast.sequences, plain.sequences)


def test_the_next_step_is_on_its_way_while_it_is_asked_whether_to_stop(model, replays):
    """But no cache that somebody sees has read a token that was not asked for."""
    at_criteria, options = [], {"max_new_tokens": 12, "do_sample": False}

    class Stop(StopAtLength):
        def __call__(self, input_ids, scores, **kwargs):
            at_criteria.append(len(replays))
            return super().__call__(input_ids, scores)

    model.generate(prompt(), **options)
    replays.clear()
    model.generate(prompt(), stopping_criteria=[Stop()], **options)
    # After the prefill, and then always one ahead.
    assert at_criteria == [0, 2, 3, 4, 5, 6]
    assert len(replays) == 6
    assert not model._decode_graphs._ready
    replays.clear()
    output = model.generate(prompt(), stopping_criteria=[Stop()], return_dict_in_generate=True, **options)
    assert len(replays) == 5
    assert output.past_key_values.get_seq_length() == 16
    cache = StaticCache(model.config, max_cache_len=99)
    model.generate(prompt(), stopping_criteria=[Stop()], past_key_values=cache, **options)
    assert cache.get_seq_length() == 16


def test_a_criterion_may_generate_itself(model):
    """With the same model, in between two steps of the other."""
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = [plainly(model, prompt(seed=seed), **options) for seed in range(2)]

    class Inner(StopAtLength):
        def __call__(self, input_ids, scores, **kwargs):
            assert torch.equal(model.generate(prompt(seed=1), **options), expected[1])
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    assert torch.equal(model.generate(prompt(), stopping_criteria=[Inner()], **options), expected[0])


def test_one_graph_serves_all_lengths_and_calls(model, replays, monkeypatch):
    records, record = [], decode_graph.record
    monkeypatch.setattr(decode_graph, "record", lambda *arguments: records.append(1) or record(*arguments))
    for length, new in ((5, 9), (40, 3), (1, 20)):
        expected = plainly(model, prompt(2, length), max_new_tokens=new, do_sample=False)
        assert torch.equal(model.generate(prompt(2, length), max_new_tokens=new, do_sample=False), expected)
    assert len(records) == 1
    assert len(replays) == 7 + 2 + 19
    for batch in (1, 3, 4, 5, 1, 2):
        expected = plainly(model, prompt(batch), max_new_tokens=6, do_sample=False)
        assert torch.equal(model.generate(prompt(batch), max_new_tokens=6, do_sample=False), expected)
    # Batches of 1, 3, 4, 5 push out that of 2.
    assert len(records) == 1 + 4 + 1
    assert len(model._decode_graphs._graphs) == decode_graph.MAX_GRAPHS


def test_conversations_take_turns(model):
    """Each goes on from its returned cache, though all of them pass through one graph."""
    turns = [[prompt(1, 7, seed=10 * talk + turn) for turn in range(3)] for talk in range(3)]
    texts, caches = [torch.empty(1, 0, dtype=torch.long, device=DEVICE)] * 3, [None] * 3
    for turn in range(3):
        for talk in range(3):
            ids = torch.cat([texts[talk], turns[talk][turn]], dim=1)
            options = {"past_key_values": caches[talk]} if turn else {}
            output = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **options)
            texts[talk], caches[talk] = output.sequences, output.past_key_values
            assert torch.equal(output.sequences, plainly(model, ids, max_new_tokens=5, do_sample=False))
    copied = copy.deepcopy(caches[2])
    expected = model(prompt(1, 3), past_key_values=copied).logits
    model.generate(prompt(1, 4), max_new_tokens=4)
    assert torch.equal(model(prompt(1, 3), past_key_values=caches[2]).logits, expected)


def test_weights_may_change(model):
    options = {"max_new_tokens": 8, "do_sample": False}
    model.generate(prompt(), **options)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3)
    assert torch.equal(model.generate(prompt(), **options), plainly(model, prompt(), **options))
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(
        *reversed(model.model.layers[0].mlp.up_proj.weight.shape), bias=False
    ).to(DEVICE)
    assert torch.equal(model.generate(prompt(), **options), plainly(model, prompt(), **options))
    model.to(torch.float64)
    assert torch.equal(model.generate(prompt(), **options), plainly(model, prompt(), **options))


def test_what_may_act_differently_is_not_recorded(model, replays):
    options = {"max_new_tokens": 6, "do_sample": False}
    calls = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    model.generate(prompt(), **options)
    assert len(calls) == 6
    assert not replays
    handle.remove()

    class Adapter(torch.nn.Linear):
        scale = 1.0

        def forward(self, x):
            return self.scale * super().forward(x)

    plain = model.model.layers[0].mlp.down_proj
    adapter = Adapter(plain.in_features, plain.out_features, bias=False).to(DEVICE)
    adapter.weight = plain.weight
    model.model.layers[0].mlp.down_proj = adapter
    first = model.generate(prompt(), **options)
    Adapter.scale = -2.0
    assert not torch.equal(model.generate(prompt(), **options), first)
    assert not replays


def test_hooks_for_all_modules_are_called(model, replays):
    calls = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(1) if module is model.lm_head else None
    )
    try:
        model.generate(prompt(), max_new_tokens=6, do_sample=False)
    finally:
        handle.remove()
    assert len(calls) == 6
    assert not replays


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5] * 4, "factor": 2.0}
        | {"original_max_position_embeddings": 14},
        {"rope_type": "linear", "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_types_of_rotary(tiny_model, replays, rope):
    """Some ask the GPU how far the text has come, which a recorded step cannot."""
    model = tiny_model(pad_token_id=0, rope_parameters={"rope_theta": 1e4, **rope}).to(DEVICE)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompt() % 97, **options), plainly(model, prompt() % 97, **options))
    assert bool(replays) == (rope["rope_type"] == "linear")


@pytest.mark.parametrize(
    "options",
    [
        {"disable_compile": True},
        {"cache_implementation": "dynamic"},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_turned_off(model, replays, options):
    if "output_attentions" in options:
        model.set_attn_implementation("eager")
    output = model.generate(
        prompt(1), max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    assert not replays
    assert len(output.sequences[0]) == 17
    if "output_hidden_states" in options:
        assert len(output.hidden_states) == 6
    if "output_attentions" in options:
        assert output.attentions[-1][0] is not None


def test_in_and_out_of_inference_mode(model, replays):
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = plainly(model, prompt(), **options)
    with torch.inference_mode():
        assert torch.equal(model.generate(prompt(), **options), expected)
    assert torch.equal(model.generate(prompt(), **options), expected)
    with torch.inference_mode():
        assert torch.equal(model.generate(prompt(), **options), expected)
    assert len(replays) == 4 + 5 + 5
    model.train()
    model(prompt(), labels=prompt()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_projections_lie_side_by_side(model, tmp_path):
    """Names, values and files stay as they are."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.generate(prompt(), max_new_tokens=4)
    mlp = model.model.layers[0].mlp
    assert mlp.up_proj.weight.data_ptr() == mlp.gate_proj.weight.data_ptr() + mlp.gate_proj.weight.nbytes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = torch.randn(2, 1, model.config.hidden_size, device=DEVICE)
    with torch.no_grad():
        together = ops.project(x, mlp.gate_proj, mlp.up_proj)
        assert together[0].untyped_storage().data_ptr() == together[1].untyped_storage().data_ptr()
        torch.testing.assert_close(together, (mlp.gate_proj(x), mlp.up_proj(x)), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    save_file(model.model.layers.state_dict(), tmp_path / "layers.safetensors")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(value, before[name].cpu()) for name, value in saved.items())
    assert len(saved) == len(before) - 1  # the tied head


@pytest.mark.parametrize("other_batch", [False, True])
@pytest.mark.parametrize("first_tokens", [2, 3])
def test_a_step_is_recorded_of_a_cache_that_has_made_one(model, replays, first_tokens, other_batch):
    """What a cache's first step makes, room for tokens, is not recorded: each replay would make it anew, and empty."""
    options = {"max_new_tokens": 20, "do_sample": False}
    model.generate(prompt(), max_new_tokens=first_tokens)
    del replays[:]
    if other_batch:
        model.generate(prompt(3), max_new_tokens=4)
    assert torch.equal(model.generate(prompt(), **options), plainly(model, prompt(), **options))
    assert torch.equal(model.generate(prompt(seed=1), **options), plainly(model, prompt(seed=1), **options))
    assert len(replays) >= 2 * 18


def test_a_reply_that_ends_with_its_second_token(model):
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = plainly(model, prompt(1), **options)
    model.generate(prompt(1), eos_token_id=int(expected[0, 12]), **options)
    assert torch.equal(model.generate(prompt(1), **options), expected)


def test_a_cache_that_was_reset(model):
    """It has made a step, and has given up what that made."""
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = plainly(model, prompt(), **options)
    cache = StaticCache(config=model.config, max_cache_len=64)
    model.generate(prompt(), past_key_values=cache, max_new_tokens=2, do_sample=False)
    cache.reset()
    assert torch.equal(model.generate(prompt(), past_key_values=cache, **options), expected)
    assert torch.equal(model.generate(prompt(), **options), expected)


@pytest.mark.parametrize("way", ["reset", "restored"])
def test_a_cache_that_has_given_up_a_part_of_its_home(model, way):
    """Its state is at home still, and must move out with the rest."""
    options = {"max_new_tokens": 6, "do_sample": False}
    text = torch.cat([prompt(), prompt(seed=3)], dim=1)
    expected = plainly(model, text, **options)
    model.generate(prompt(), **options)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
    snapshot = CacheSnapshot(cache)
    model.generate(text, past_key_values=cache, **options)
    if way == "restored":
        snapshot.restore(cache)
    else:
        cache.reset()
        with torch.no_grad():
            model(prompt(), past_key_values=cache)
    model.generate(prompt(seed=7), **options)
    assert torch.equal(model.generate(text, past_key_values=cache, **options), expected)


def test_a_cache_of_two_models(model):
    """What lives in the graph of one is copied into that of the other."""
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    twin = copy.deepcopy(model)

    def go_on(output, seed):
        return torch.cat([output.sequences, prompt(seed=seed)], dim=1)

    first = model.generate(prompt(), **options)
    twin.generate(go_on(first, 4), past_key_values=first.past_key_values, **options)
    second = model.generate(prompt(seed=1), **options)
    twin.generate(prompt(seed=2), **options)
    text = go_on(second, 5)
    expected = plainly(model, text, **options).sequences
    assert torch.equal(model.generate(text, past_key_values=second.past_key_values, **options).sequences, expected)


def test_gradients_and_inference_mode_leave_nothing_at_home(model):
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(prompt(), **options)
    model(prompt(seed=1), past_key_values=first.past_key_values)
    with torch.inference_mode():
        model.generate(prompt(seed=2), **options)
    text = torch.cat([first.sequences[:, :-1], prompt(seed=1), prompt(seed=3)], dim=1)
    expected = plainly(model, text, **options).sequences
    assert torch.equal(model.generate(text, past_key_values=first.past_key_values, **options).sequences, expected)
    last = model.generate(prompt(seed=4), **options).past_key_values
    assert not any(x.requires_grad for layer in last.layers for x in decode_graph._tensors(layer).values())


def test_the_backend_changes_between_two_turns(model, monkeypatch):
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    lazily = modeling_based.is_lazy_step_faster
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "torch")
    if not GPU:
        monkeypatch.setattr(modeling_based, "is_lazy_step_faster", lambda query, value: False)
    first = model.generate(prompt(), **options)
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "auto")
    monkeypatch.setattr(modeling_based, "is_lazy_step_faster", lazily)
    text = torch.cat([first.sequences, prompt(seed=1)], dim=1)
    expected = plainly(model, text, **options).sequences
    assert torch.equal(model.generate(text, past_key_values=first.past_key_values, **options).sequences, expected)


def test_what_a_recording_makes_is_refused(model, monkeypatch):
    monkeypatch.setattr(decode_graph, "_names", lambda cache: [cache.layers])
    with pytest.raises(RuntimeError, match="has made tensors for its cache"):
        model.generate(prompt(), max_new_tokens=6, do_sample=False)


def test_what_waits_is_folded_with_the_scale_of_the_mixer(tiny_model):
    """Also in a cache that came to the graph before it made a step of its own."""
    model = tiny_model(pad_token_id=0, linear_scale=0.9).to(DEVICE)
    ids, options = prompt() % 97, {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    model.generate(ids, **options)
    output, plain = model.generate(ids, **options), plainly(model, ids, **options)
    assert torch.equal(output.sequences, plain.sequences)
    for layer, expected in zip(output.past_key_values.layers, plain.past_key_values.layers):
        if isinstance(layer, TaylorCacheLayer):
            torch.testing.assert_close(layer.state, expected.state, atol=1e-4, rtol=1e-4)


def test_streaming(model, replays):
    tokenizer = word_tokenizer()
    ids = prompt(1)
    options = {"max_new_tokens": 12, "do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs={**options, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == tokenizer.decode(plainly(model, ids, **options)[0, 11:]).split()
    assert len(replays) == 10
    model.generate(ids, streamer=TextStreamer(tokenizer), **options)


@pytest.mark.parametrize("warm", [True, False])
def test_threads(model, warm):
    """Their caches take turns in the graph, step by step."""
    options = {"max_new_tokens": 30, "do_sample": False}
    expected = [plainly(model, prompt(seed=seed), **options) for seed in range(3)]
    if warm:
        model.generate(prompt(), max_new_tokens=4)
    results = [None] * 3

    def run(seed):
        results[seed] = model.generate(prompt(seed=seed), **options)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(results, expected))


def test_a_thread_waits_while_another_reads_a_prompt_into_its_home(model, monkeypatch):
    """Else it would move that cache out between the writes of the keys and of the values."""
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    model.generate(prompt(seed=9), **options)
    first = model.generate(prompt(), **options)
    text = torch.cat([first.sequences, prompt(seed=4)], dim=1)
    expected = plainly(model, text, **options).sequences
    other = plainly(model, prompt(seed=5), **options).sequences
    results, threads, at_slots = [], [], cache_based._at_slots

    def interrupted(x, slots):
        is_ours = threading.current_thread() is threading.main_thread()
        if is_ours and not threads and x.shape[2] == prompt().shape[1] + 1:
            threads.append(
                threading.Thread(target=lambda: results.append(model.generate(prompt(seed=5), **options).sequences))
            )
            threads[0].start()
            threads[0].join(timeout=2)
        return at_slots(x, slots)

    monkeypatch.setattr(cache_based, "_at_slots", interrupted)
    got = model.generate(text, past_key_values=first.past_key_values, **options).sequences
    threads[0].join()
    assert torch.equal(got, expected)
    assert torch.equal(results[0], other)


def test_a_model_with_graphs_is_copied_and_saved(model, tmp_path):
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(prompt(), **options)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(-1)
    assert not torch.equal(twin.generate(prompt(), **options), expected)
    assert torch.equal(model.generate(prompt(), **options), expected)
    torch.save(model, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(loaded.generate(prompt(), **options), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        BasedForCausalLM.from_pretrained(tmp_path / "saved").to(DEVICE).generate(prompt(), **options), expected
    )


@pytest.mark.parametrize("layer_types", [["conv", "linear_attention"], ["sliding_attention"]])
def test_any_mixers(tiny_model, layer_types, replays):
    model = tiny_model(layer_types=layer_types, pad_token_id=0).to(DEVICE)
    ids = prompt() % 97
    options = {"max_new_tokens": 15, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plainly(model, ids, **options))
    assert len(replays) == 13


def rms(x):
    return x.double().square().mean().sqrt().item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_plain_path(model, replays, dtype, monkeypatch):
    """Logits over 100 steps against fp64, beside plain PyTorch's forward in the same dtype on the same tokens."""
    exact = copy.deepcopy(model).double()
    half = model.to(dtype)
    output = half.generate(
        prompt(), max_new_tokens=100, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "torch")
    expected, plain = (m(output.sequences[:, :-1], use_cache=False).logits[:, 10:] for m in (exact, half))
    assert len(replays) == 98
    error, allowed = rms(torch.stack(output.logits, dim=1) - expected), rms(plain - expected)
    assert error <= 1.1 * allowed
    assert allowed < 0.1 * rms(expected)


def test_runs_repeat_bit_by_bit(model):
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first, *others = (torch.stack(model.generate(prompt(), **options).logits) for _ in range(20 if GPU else 3))
    # The first call takes its first steps otherwise; from the second on all are alike.
    assert all(torch.equal(others[0], other) for other in others[1:])
    torch.testing.assert_close(first, others[0], atol=1e-4, rtol=0)


@pytest.mark.gpu
def test_gpu_512_steps_are_those_of_the_plain_path(model, replays, monkeypatch):
    """Of plain PyTorch, with a dynamic cache: no graph and no kernel of ours."""
    options, dynamic = {"max_new_tokens": 512, "do_sample": False}, {"cache_implementation": "dynamic"}
    got = model.generate(prompt(3), **options)
    assert len(replays) == 510
    assert torch.equal(got, model.generate(prompt(3), **options, **dynamic))
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "torch")
    assert torch.equal(got, model.generate(prompt(3), **options, **dynamic))


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 20}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("pads", [0, 4])
def test_many_steps(model, replays, pads, sampling, monkeypatch):
    """Past many folds of what waits beside the state, and turns of the ring."""
    steps = 512
    ids = prompt(3)
    exists = torch.ones_like(ids)
    exists[1, :pads] = 0
    options = {"attention_mask": exists, "max_new_tokens": steps, "do_sample": False} | sampling
    torch.manual_seed(0)
    got = model.generate(ids, **options)
    assert len(replays) == steps - 2
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "torch")
    monkeypatch.setattr(modeling_based, "is_lazy_step_faster", lambda query, value: False)
    torch.manual_seed(0)
    assert torch.equal(got, model.generate(ids, cache_implementation="dynamic", **options))


@pytest.mark.gpu
def test_gpu_4096_steps_allocate_nothing(model):
    output = model.generate(prompt(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache, graphs = output.past_key_values, model._decode_graphs
    token, allocated = output.sequences[:, -1:], []
    exists = torch.ones_like(token, dtype=torch.bool)
    for i in range(4096):
        inputs = {"input_ids": token, "position_ids": torch.full_like(token, 15 + i), "past_key_values": cache}
        token = graphs(**inputs, attention_mask=decode_graph.step_masks(exists)).logits.argmax(-1)
        if i in (9, 4095):
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated())
    assert allocated[0] == allocated[1]
    assert cache.get_seq_length() == 14 + 4096
