# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Two processes on one machine, over gloo, against one process: data, sharded, tensor and sequence parallelism."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate_on_cpu import switch_on_fsdp
from parallel_worker import CHECKS, ROWS, batches, document, make_optimizer, train, train_by_trainer, weights
from programs import ROOT, held_out_losses, load_program, run_python

from transformers_based import BasedConfig, BasedForCausalLM


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ENGINES = ("ddp", "fsdp2_of_accelerate", "fsdp2", "tensor_parallel", "zero3")
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture
def base(tiny_model):
    # transformers 5.17 wants a vocabulary that the ranks divide.
    return tiny_model(vocab_size=96).double()


@pytest.fixture
def untrained(base):
    return copy.deepcopy(base)


@pytest.fixture
def results(untrained, folder):
    """Everything the two processes found; started for the first test that asks."""
    if not (folder / "base").exists():
        untrained.save_pretrained(folder / "base")
        process = run_python(*TORCHRUN, "tests/parallel_worker.py", folder)
        (folder / "output").write_text(process.stdout)
    return {
        check.__name__: [torch.load(folder / f"{check.__name__}.{rank}.pt", weights_only=True) for rank in (0, 1)]
        for check in CHECKS
    }


def of(results, check):
    for rank, found in enumerate(results[check]):
        if "error" in found:
            pytest.fail(f"rank {rank}:\n{found['error']}")
        if "missing" in found:
            pytest.skip(f"{found['missing']}: pip install deepspeed")
    return results[check]


@pytest.fixture
def alone(base, untrained):
    """The losses of one process, and the model after its five steps."""
    return train(base, make_optimizer(base)), base


@pytest.mark.parametrize("engine", ENGINES)
def test_five_steps_are_those_of_one_process(results, alone, untrained, engine):
    losses, model = alone
    # DeepSpeed computes in fp32, all others in fp64.
    tolerance = 1e-5 if engine == "zero3" else 1e-9
    found = of(results, engine)
    for rank in (0, 1):
        assert found[rank]["losses"] == pytest.approx(losses, rel=tolerance)
    # ZeRO-3 gathers weights on the first rank only.
    for rank in (0,) if engine == "zero3" else (0, 1):
        assert found[rank]["weights"].keys() == weights(model).keys()
        for name, wanted in weights(model).items():
            got = found[rank]["weights"][name].double()
            assert (got - wanted).norm() <= tolerance * wanted.norm(), name
    # And every one of them has moved.
    for name, x in weights(untrained).items():
        assert (x - weights(model)[name]).norm() > 1e-3 * x.norm(), name


def test_trainer_over_two_processes_takes_the_steps_of_one(results, base, untrained, folder):
    """With rows of unequal lengths: every token counts alike, whichever process has it."""
    train_by_trainer(base, ROWS, folder)
    for found in of(results, "trainer"):
        assert found["processes"] == 2
        for name, wanted in weights(base).items():
            assert (found["weights"][name] - wanted).norm() <= 1e-9 * wanted.norm(), name
            assert (wanted - weights(untrained)[name]).norm() > 1e-4 * wanted.norm(), name


@pytest.mark.parametrize("engine", ENGINES)
def test_its_checkpoint_loads_in_one_process(results, alone, folder, engine):
    of(results, engine)
    _, model = alone
    loaded = BasedForCausalLM.from_pretrained(folder / engine)
    assert loaded.dtype == (torch.float32 if engine == "zero3" else torch.float64)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    # The code that goes along is the model's.
    assert loaded.config.auto_map["AutoModelForCausalLM"] == "modeling_based.BasedForCausalLM"
    files, own_files = ({path.name for path in (folder / name).glob("*.py")} for name in (engine, "base"))
    assert files == own_files >= {"modeling_based.py"}
    tolerance = 1e-4 if engine == "zero3" else 1e-8
    with torch.no_grad():
        ids = batches()[0]
        expected = model.eval()(ids).logits
        assert (loaded(ids).logits - expected).norm() <= tolerance * expected.norm()


def test_what_is_sharded(results, base):
    names = set(weights(base))
    for engine in ("fsdp2", "fsdp2_of_accelerate"):
        (found, _) = of(results, engine)
        assert set(found["sharded"]) == names
    (found, _) = of(results, "tensor_parallel")
    # The taps of the convolutions are replicated, and the norms.
    replicated = {name for name in names if "norm" in name or name.endswith("conv.conv.weight")}
    # 5.17 leaves the embedding whole where it is tied to nothing that is sharded.
    assert names - set(found["sharded"]) - {"model.embed_tokens.weight"} == replicated
    rowwise = {name for name, placement in found["sharded"].items() if placement in ("S(1)", "Shard(dim=1)", "S(-1)")}
    assert {name.rsplit(".", 2)[1] for name in rowwise} == {"o_proj", "down_proj"}


def test_zero3_shards_every_weight(results, base):
    for found in of(results, "zero3"):
        assert set(found["sharded"]) == set(weights(base))


def test_tensor_parallel_generates_the_same(results, alone):
    _, model = alone
    ids = batches()[0]
    expected = model.eval().generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
    for found in of(results, "tensor_parallel"):
        for generated in found["generated"]:
            assert torch.equal(generated, expected)
        with torch.no_grad():
            torch.testing.assert_close(found["logits"], model(ids).logits, rtol=1e-9, atol=1e-9)


def test_an_original_checkpoint_is_shared_out_too(results):
    for found in of(results, "original_checkpoint"):
        assert found.keys() == {"tp_size", "fsdp_size"}
        assert all(0 < difference < 2e-4 for difference in found.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_one_document_over_two_ranks(results, base, dtype, tolerance):
    exact = base.train()
    ids = document()
    logits = exact(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    loss.backward()
    parts = of(results, "sequence")
    for found in parts:
        found = found[str(dtype)]
        assert found["loss"] == pytest.approx(loss.item(), rel=tolerance)
        for name, x in exact.named_parameters():
            assert (found["gradients"][name].double() - x.grad).norm() <= tolerance * x.grad.norm(), name
            assert x.grad.any(), name
    got = torch.cat([found["logits"] for found in parts], dim=1)
    assert (got - logits).norm() <= 1e-5 * logits.norm()


def test_what_does_not_work_says_so(results, base):
    for found in of(results, "refusals"):
        assert "pipeline stages" in found["pipeline"]
        assert "packed_colwise" in found["packed"]
        assert "conv.in_proj" in found["packed"]
        assert "sideways" in found["style"]
        assert "`linear_num_heads` is 3" in found["heads"]
    for found in of(results, "sequence"):
        assert "`sliding_window`" in found["short"]
        assert "gradient_checkpointing" in found["checkpointing"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}, "num_key_value_heads"),
        ({"num_attention_heads": 3, "head_dim": 8}, "num_attention_heads"),
        ({"linear_num_heads": 5, "linear_head_dim": 8}, "linear_num_heads"),
    ],
)
def test_heads_that_do_not_divide(tiny_config, overrides, name):
    config = tiny_config(**overrides)
    with pytest.raises(ValueError, match=rf"`{name}` is {overrides[name]}, which `tp_size` 2"):
        config.check_parallel_plan(2, 1, "auto")
    config.check_parallel_plan(1, 1, None)
    # Only the mixers that are there.
    tiny_config(**overrides, layer_types=["conv"]).check_parallel_plan(2, 1, "auto")


LAYERS = "model.layers.*."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def plan_for(module, projections, *styles):
    return dict(zip((f"{LAYERS}{module}.{x}" for x in projections), styles * (4 // len(styles))))


CUT = ("colwise", "colwise", "colwise", "rowwise")
PLANS = {
    "nothing": {},
    "the automatic one": {f"model.{name}": style for name, style in BasedConfig.base_model_tp_plan.items()},
    "head and embedding": {"lm_head": "colwise_gather_output", "model.embed_tokens": "embedding_rowwise"},
    "whole vocabulary": {"lm_head": "replicate", "model.embed_tokens": "replicate"},
    "an attention cut": plan_for("self_attn", ATTENTION, *CUT),
    "an attention whole": plan_for("linear_attn", ATTENTION, "replicate"),
    "one cut and one whole": plan_for("self_attn", ATTENTION, "replicate") | plan_for("linear_attn", ATTENTION, *CUT),
    "MLP whole": plan_for("mlp", MLP, "replicate"),
    "norms whole": {"model.norm": "replicate", LAYERS + "input_layernorm": "replicate"},
    "half of a convolution": {LAYERS + "conv.out_proj": "rowwise_split_input", LAYERS + "conv.in_proj": "replicate"},
    "head of a classifier": {"score": "colwise_gather_output"},
}
REFUSED_PLANS = {
    "another style": ({LAYERS + "mlp.up_proj": "rowwise"}, r"'rowwise' .*mlp\.up_proj. Use 'colwise'"),
    "mixed up channels": ({LAYERS + "conv.in_proj": "colwise"}, r"conv\.in_proj. Use 'colwise_gather_output'"),
    "its weight": ({LAYERS + "conv.in_proj.weight": "packed_colwise"}, r"'packed_colwise' .*Leave it out"),
    "taps": ({LAYERS + "conv.conv": "colwise_gather_output"}, r"conv\.conv. Leave it out"),
    "head": ({"lm_head": "colwise"}, "lm_head. Use 'colwise_gather_output'"),
    "embedding": ({"model.embed_tokens": "embedding_colwise"}, "embed_tokens. Use 'embedding_rowwise'"),
    "norm": ({"model.norm": "sequence_parallel"}, r"'sequence_parallel' for model\.norm. Leave it out"),
    "norm of a layer": ({LAYERS + "input_layernorm": "replicated_with_grad_allreduce"}, "input_layernorm. Leave it"),
    "whole module": ({LAYERS + "mlp": "all_reduce"}, "'all_reduce' .*Leave it out"),
    "half cut": (plan_for("mlp", MLP[:2], "colwise"), "must cut, or replicate, all of gate_proj, up_proj, down_proj"),
    "half whole": (plan_for("mlp", MLP[:2], "replicate"), "must cut, or replicate, all of gate_proj"),
    "some of each": (plan_for("self_attn", ATTENTION, "replicate", *CUT[1:]), r"all of q_proj, .*self_attn"),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_of_ones_own(tiny_config, case):
    tiny_config().check_parallel_plan(2, 1, PLANS[case])


@pytest.mark.parametrize("case", REFUSED_PLANS)
def test_plans_that_are_refused(tiny_config, case):
    plan, message = REFUSED_PLANS[case]
    with pytest.raises(ValueError, match=f"`tp_plan`.*{message}"):
        tiny_config().check_parallel_plan(2, 1, plan)
    # Nothing is cut up for one rank.
    tiny_config().check_parallel_plan(1, 1, plan)


def test_heads_of_a_replicated_attention_need_not_divide(tiny_config):
    config = tiny_config(linear_num_heads=3, linear_head_dim=8)
    config.check_parallel_plan(2, 1, PLANS["an attention whole"])
    for case in ("nothing", "an attention cut", "one cut and one whole"):
        with pytest.raises(ValueError, match="`linear_num_heads` is 3"):
            config.check_parallel_plan(2, 1, PLANS[case])


def test_replicated_attentions_compute_the_same(results):
    for found in of(results, "replicated"):
        if "not_here" in found:
            pytest.skip(found["not_here"])
        torch.testing.assert_close(found["logits"], found["expected_logits"], rtol=1e-9, atol=1e-9)
        assert found["gradients"].keys() == found["expected_gradients"].keys()
        for name, wanted in found["expected_gradients"].items():
            assert (found["gradients"][name] - wanted).norm() <= 1e-9 * wanted.norm(), name
        assert torch.equal(found["generated"], found["expected_generated"])
        assert {name.split(".")[-3] for name in found["sharded"] if "attn" in name} == {"linear_attn"}


def test_context_parallelism_of_accelerate_is_refused(tiny_model):
    """It cuts the text as `examples/sequence_parallel.py` does, but tells only plain attention of the other parts."""
    from accelerate.big_modeling import (
        _attach_context_parallel_hooks,
        _refuse_recurrent_layers_under_sequence_parallelism,
    )

    for refuse in (_attach_context_parallel_hooks, _refuse_recurrent_layers_under_sequence_parallelism):
        with pytest.raises(ValueError, match="linear_attention"):
            refuse(tiny_model())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_config(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[path.stem]
    assert config.distributed_type == kind


@pytest.mark.parametrize("config", ["ddp", "fsdp2", "zero3"])
def test_accelerate_launches_the_finetuning(tmp_path, config):
    """
    On two processes, on a CPU. What was saved is evaluated by one of them: the loss is the same though the held-out
    pieces are not as many in each.
    """
    if config == "zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")
    output = tmp_path / "model"
    process = run_python(
        *("-m", "accelerate.commands.launch", "--config_file", f"examples/accelerate/{config}.yaml"),
        *(("tests/accelerate_on_cpu.py",) if config != "ddp" else ()),
        *("examples/finetune.py", "--train-file", ROOT / "LICENSE", "--output-dir", output),
        *("--model", ROOT / "tests" / "reference" / "based-tiny"),
        *("--max-steps", "20", "--save-steps", "20", "--block-size", "64", "--held-out", "0.095"),
        *("--batch-size", "4", "--accumulate", "2"),
        ACCELERATE_USE_CPU="true",
    )
    # That it was this engine: each has checkpoints of its own.
    checkpoint = {"ddp": "optimizer.pt", "fsdp2": "pytorch_model_fsdp.bin", "zero3": "zero_to_fp32.py"}[config]
    assert (output / "checkpoint-20" / checkpoint).exists()
    assert "17 more held out" in process.stdout
    assert "594,240 of 594,240 weights are trained" in process.stdout
    before, after, again = held_out_losses(process.stdout)
    assert again == pytest.approx(after, abs=2e-3)
    assert after < 0.6 * before
    assert "It goes on like this:\nBased is" in process.stdout
    assert {path.name for path in output.glob("*.py")} >= {"modeling_based.py", "configuration_based.py"}
    model = BasedForCausalLM.from_pretrained(output)
    text = torch.tensor([list((ROOT / "LICENSE").read_bytes()[:512])])
    with torch.no_grad():
        assert model(text, labels=text).loss < 0.6 * before


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fsdp_on_cpu_takes_the_precision(monkeypatch, precision):
    monkeypatch.setattr(PartialState, "_shared_state", {})
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    switch_on_fsdp(SimpleNamespace(mixed_precision=precision), plugin)
    assert (
        getattr(plugin.mixed_precision_policy, "param_dtype", None) == {"no": None, "bf16": torch.bfloat16}[precision]
    )


def test_accelerate_launches_adapters_in_bf16(tmp_path):
    process = run_python(
        *("-m", "accelerate.commands.launch", "--config_file", "examples/accelerate/fsdp2.yaml"),
        *("tests/accelerate_on_cpu.py", "examples/finetune.py", "--train-file", ROOT / "LICENSE", "--bf16"),
        *("--model", ROOT / "tests" / "reference" / "based-tiny", "--output-dir", tmp_path / "model"),
        *("--max-steps", "10", "--block-size", "64", "--batch-size", "4", "--learning-rate", "1e-2", "--lora", "4"),
        ACCELERATE_USE_CPU="true",
    )
    before, after, again = held_out_losses(process.stdout)
    assert again == pytest.approx(after, rel=1e-3)
    assert after < before - 1


def test_sequence_parallel_example_verifies_itself(results, folder):
    output = (folder / "output").read_text()
    assert "One process: loss" in output
    assert re.search(r"^Step 1: loss [\d.]+", output, re.MULTILINE)


def test_sequence_parallel_over_three_processes():
    """One of them receives a state and passes one on; the parts differ in length."""
    three = [*TORCHRUN[:-1], "3"]
    output = run_python(*three, "examples/sequence_parallel.py", "--tokens", "556", "--steps", "1", "--verify").stdout
    assert "One process: loss" in output


@pytest.mark.parametrize("spoilt", ["gradient", "loss", "none"])
def test_sequence_parallel_example_notices_what_is_no_number(tiny_model, spoilt):
    example, model = load_program("examples/sequence_parallel.py"), tiny_model().train()
    ids = torch.randint(1, 97, (1, 12))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    loss = loss.detach()
    if spoilt == "none":
        example.verify(model, ids, loss)
        return
    if spoilt == "gradient":
        model.get_parameter("model.layers.0.input_layernorm.weight").grad[3] = float("nan")
    with pytest.raises(SystemExit, match="Not the same"):
        example.verify(model, ids, loss * float("nan") if spoilt == "loss" else loss)


def test_sequence_parallel_example_wants_torchrun():
    with pytest.raises(SystemExit, match="torchrun"):
        load_program("examples/sequence_parallel.py").main([])
