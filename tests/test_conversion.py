# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""conversion/convert_checkpoint.py: both directions, every form of an original checkpoint, and every way to be none."""

import json
import pickle
import shutil

import pytest
import torch
from minihub import MiniHub
from programs import ROOT, load_program, run_python
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from transformers_based import BasedForCausalLM, BasedForSequenceClassification


converter = load_program("conversion/convert_checkpoint.py")
JUNK = {"train_metrics.num-tokens.count", "val_metrics.num-tokens.count"}
CONV = "model.transformer.layers.0.mixer.in_proj.weight"


@pytest.fixture
def original(based_tiny_path, tmp_path):
    """A copy of the original checkpoint, free to be damaged."""
    folder = tmp_path / "original"
    folder.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(based_tiny_path / name, folder)
    return folder


@pytest.fixture
def weights(based_tiny_path):
    """What its pytorch_model.bin holds, without the junk."""
    state_dict = torch.load(based_tiny_path / "pytorch_model.bin", weights_only=True)
    return {name: tensor for name, tensor in state_dict.items() if name not in JUNK}


@pytest.fixture
def converted(based_tiny_path, tmp_path):
    """It, converted."""
    return converter.convert(str(based_tiny_path), tmp_path / "converted")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def test_written_files_hold_only_transformers_names(converted, based_tiny):
    assert {"config.json", "generation_config.json", "model.safetensors"} <= {path.name for path in converted.iterdir()}
    assert not (converted / "pytorch_model.bin").exists()
    written = load_file(converted / "model.safetensors")
    expected = {name: tensor for name, tensor in based_tiny.state_dict().items() if name != "lm_head.weight"}
    assert same_bits(written, expected)
    assert json.loads((converted / "config.json").read_text())["model_type"] == "based"


def test_converted_checkpoint_computes_the_golden_logits(converted, golden):
    model = AutoModelForCausalLM.from_pretrained(converted)
    logits = model(golden["input_ids"]).logits[..., : golden["logits"].shape[-1]]
    torch.testing.assert_close(logits, golden["logits"], atol=2e-4, rtol=0)


def test_round_trip_is_bitwise(converted, weights, tmp_path):
    back = converter.convert_back(str(converted), tmp_path / "back")
    assert {path.name for path in back.iterdir()} == {"config.json", "pytorch_model.bin"}
    assert same_bits(torch.load(back / "pytorch_model.bin", weights_only=True), weights)
    again = converter.convert(str(back), tmp_path / "again")
    assert same_bits(load_file(again / "model.safetensors"), load_file(converted / "model.safetensors"))
    assert (again / "config.json").read_text() == (converted / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoint_stays_so(original, weights, tmp_path, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    torch.save(weights, original / "pytorch_model.bin")
    converted = converter.convert(str(original), tmp_path / "converted")
    assert AutoModelForCausalLM.from_pretrained(converted).dtype == dtype
    back = converter.convert_back(str(converted), tmp_path / "back")
    assert same_bits(torch.load(back / "pytorch_model.bin", weights_only=True), weights)


def test_mixed_precision_checkpoint_keeps_every_value(original, weights, tmp_path):
    weights = {name: tensor if name == CONV else tensor.bfloat16() for name, tensor in weights.items()}
    torch.save(weights, original / "pytorch_model.bin")
    written = load_file(converter.convert(str(original), tmp_path / "converted") / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert torch.equal(written["model.layers.0.conv.in_proj.weight"], weights[CONV])
    norm = weights["model.transformer.ln_f.weight"]
    assert torch.equal(written["model.norm.weight"], norm.float())


def test_dtype_option_rounds(based_tiny_path, tmp_path, weights):
    assert converter.main([str(based_tiny_path), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    written = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(written["model.layers.0.conv.in_proj.weight"], weights[CONV].bfloat16())


def _without_prefix(folder, weights):
    torch.save({name.removeprefix("model."): tensor for name, tensor in weights.items()}, folder / "pytorch_model.bin")


def _as_safetensors(folder, weights):
    (folder / "pytorch_model.bin").unlink()
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")


def _sharded(folder, weights):
    (folder / "pytorch_model.bin").unlink()
    shards, names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], list(weights)
    weight_map = {name: shards[i % 2] for i, name in enumerate(names)}
    for shard in shards:
        torch.save({name: weights[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _gpt2_model_type(folder, weights):
    edit_config(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])


def _one_copy_of_the_embedding(folder, weights):
    del weights["model.lm_head.weight"]
    torch.save(weights, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "rewrite", [_without_prefix, _as_safetensors, _sharded, _gpt2_model_type, _one_copy_of_the_embedding]
)
def test_every_form_of_the_original_gives_the_same(original, weights, converted, tmp_path, rewrite):
    rewrite(original, weights)
    again = converter.convert(str(original), tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


def test_junk_and_fixed_decay_are_dropped_and_named(original, weights, converted, tmp_path, capfd):
    weights["model.transformer.decay.decay"] = torch.ones(4)
    weights["val_metrics.loss.total"] = torch.ones(())
    torch.save(weights, original / "pytorch_model.bin")
    assert converter.main([str(original), str(tmp_path / "again")]) == 0
    output, errors = capfd.readouterr()
    assert "model.transformer.decay.decay" in errors
    assert "val_metrics.loss.total" in errors
    assert "Comparing tensors: 100%" in errors
    assert "wrote and checked" in output
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


def test_output_in_missing_folders_and_into_an_empty_one(based_tiny_path, tmp_path):
    converter.convert(str(based_tiny_path), tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    converter.convert(str(based_tiny_path), tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]
    assert (tmp_path / "empty" / "config.json").stat().st_mode == (tmp_path / "a" / "b" / "config.json").stat().st_mode


@pytest.mark.parametrize("is_file", [True, False])
def test_existing_output_is_refused_and_untouched(based_tiny_path, tmp_path, capfd, is_file):
    output = tmp_path / "output"
    if not is_file:
        output.mkdir()
    kept = output if is_file else output / "precious"
    kept.write_text("here first")
    assert converter.main([str(based_tiny_path), str(output)]) == 1
    assert "exists and is not an empty folder" in capfd.readouterr().err
    assert kept.read_text() == "here first"
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_truncated_file(original, fails):
    content = (original / "pytorch_model.bin").read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        (original / "pytorch_model.bin").write_bytes(content[:length])
        assert "pytorch_model.bin" in fails(original)


def test_truncated_safetensors(original, weights, fails):
    _as_safetensors(original, weights)
    content = (original / "model.safetensors").read_bytes()
    for length in (0, 100, len(content) - 1):
        (original / "model.safetensors").write_bytes(content[:length])
        assert "model.safetensors" in fails(original)


def test_attention_weights_under_a_based_config(original, fails):
    names = ["transformer.layers.0.mixer.Wqkv.weight", "transformer.layers.0.mlp.fc1.weight"]
    torch.save({f"model.{name}": torch.ones(8, 8) for name in names}, original / "pytorch_model.bin")
    message = fails(original)
    assert "pytorch_model.bin" in message
    assert "transformer.embeddings.word_embeddings.weight" in message


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (
            {"n_embd": 64, "n_head": 4, "n_layer": 3, "vocab_size": 515, "rotary_emb_fraction": 0.5},
            "attention baseline",
        ),
        ({"d_model": 64, "n_layer": 3, "vocab_size": 515, "ssm_cfg": {}}, "Mamba baseline"),
        ({"model_type": "llama", "hidden_size": 64}, "'llama'"),
    ],
)
def test_other_models_are_named(original, fails, config, kind):
    (original / "config.json").write_text(json.dumps(config))
    assert kind in fails(original)


def test_missing_key(original, weights, fails):
    del weights["model.transformer.layers.3.mlp.fc1.weight"]
    torch.save(weights, original / "pytorch_model.bin")
    message = fails(original)
    assert "pytorch_model.bin" in message
    assert "transformer.layers.3.mlp.fc1.weight" in message


def test_unknown_key(original, weights, fails):
    weights["model.transformer.layers.3.mlp.fc9.weight"] = torch.ones(2)
    torch.save(weights, original / "pytorch_model.bin")
    assert "transformer.layers.3.mlp.fc9.weight" in fails(original)


def test_wrong_shape(original, weights, fails):
    weights["model.transformer.layers.2.mixer.Wqkv.weight"] = torch.ones(191, 64)
    torch.save(weights, original / "pytorch_model.bin")
    message = fails(original)
    assert "pytorch_model.bin" in message
    assert "transformer.layers.2.mixer.Wqkv.weight" in message


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_pickle_with_code_does_not_run(original, tmp_path, fails, plain_pickle):
    content = {CONV: _Bomb(tmp_path / "exploded")}
    if plain_pickle:
        (original / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, original / "pytorch_model.bin")
    assert "pytorch_model.bin" in fails(original)
    assert not (tmp_path / "exploded").exists()


def test_pickle_of_something_else(original, fails):
    torch.save([torch.ones(2)], original / "pytorch_model.bin")
    assert "pytorch_model.bin" in fails(original)


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin"])
def test_missing_file(original, fails, name):
    (original / name).unlink()
    assert name in fails(original)


def test_missing_shard(original, weights, fails):
    _sharded(original, weights)
    (original / "pytorch_model-00002-of-00002.bin").unlink()
    assert "pytorch_model-00002-of-00002.bin" in fails(original)


@pytest.mark.parametrize("shard", ["../outside.bin", "/outside.bin", "sub/../../outside.bin"])
def test_index_that_leaves_its_folder(original, weights, tmp_path, fails, shard):
    torch.save(weights, tmp_path / "outside.bin")
    (original / "pytorch_model.bin").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (original / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    message = fails(original)
    assert "pytorch_model.bin.index.json" in message
    assert shard in message


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"alt_mixer": 1, "n_embd": 64}', '{"alt_mixer": {}, "mixer": {"a": 1}}']
)
def test_damaged_config(original, fails, content):
    (original / "config.json").write_text(content)
    assert "config.json" in fails(original)


def test_config_field_that_no_released_checkpoint_has(original, fails):
    edit_config(original, rms_norm=False)
    message = fails(original)
    assert "config.json" in message
    assert "rms_norm" in message


def test_directions_are_not_confused(original, converted, fails):
    assert "--reverse" in fails(converted)
    assert "--reverse" in fails(original, "--reverse")


def test_reverse_of_a_damaged_checkpoint(converted, fails):
    weights = load_file(converted / "model.safetensors")
    content = (converted / "model.safetensors").read_bytes()
    (converted / "model.safetensors").write_bytes(content[:-1])
    assert "model.safetensors" in fails(converted, "--reverse")
    del weights["model.norm.weight"]
    save_file(weights, converted / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in fails(converted, "--reverse")


def test_reverse_refuses_what_the_original_layout_cannot_hold(tmp_path, tiny_model, fails):
    tiny_model(num_key_value_heads=2).save_pretrained(tmp_path / "grouped")
    assert "num_key_value_heads" in fails(tmp_path / "grouped", "--reverse")
    tiny_model(BasedForSequenceClassification, pad_token_id=0).save_pretrained(tmp_path / "classifier")
    assert "score.weight" in fails(tmp_path / "classifier", "--reverse")


@pytest.mark.parametrize(
    ("layer_types", "options"),
    [
        (["conv", "conv"], {}),
        (["sliding_attention"], {"linear_num_heads": 4}),
        (["linear_attention", "conv"], {"conv_bias": False, "tie_word_embeddings": False}),
    ],
)
def test_round_trip_of_a_new_model(tmp_path, tiny_model, layer_types, options):
    """Made with transformers, written in the original layout, and back."""
    model = tiny_model(layer_types=layer_types, intermediate_size=256, **options)
    model.save_pretrained(tmp_path / "model")
    converter.convert_back(str(tmp_path / "model"), tmp_path / "original")
    again = BasedForCausalLM.from_pretrained(converter.convert(str(tmp_path / "original"), tmp_path / "again"))
    assert same_bits(again.state_dict(), model.state_dict())
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_failure_while_writing_leaves_nothing(based_tiny_path, tmp_path, monkeypatch, capfd, error):
    def save_half(self, folder, **kwargs):
        (folder / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(BasedForCausalLM, "save_pretrained", save_half)
    code = converter.main([str(based_tiny_path), str(tmp_path / "output")])
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert "Traceback" not in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_termination_while_writing_leaves_nothing(based_tiny_path, tmp_path):
    program = f"""
import os, runpy, signal, sys
from transformers_based import BasedForCausalLM
def save_half(self, folder, **kwargs):
    (folder / "model.safetensors").write_text("half")
    os.kill(os.getpid(), signal.SIGTERM)
BasedForCausalLM.save_pretrained = save_half
sys.path.append({str(ROOT / "conversion")!r})
sys.argv = ["convert_checkpoint.py", {str(based_tiny_path)!r}, {str(tmp_path / "output")!r}]
runpy.run_path({str(ROOT / "conversion" / "convert_checkpoint.py")!r}, run_name="__main__")
"""
    assert run_python("-c", program, check=False).returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_wrong_bytes_on_disk_are_noticed(based_tiny_path, tmp_path, monkeypatch, capfd):
    save = BasedForCausalLM.save_pretrained

    def save_with_a_flipped_bit(self, folder, **kwargs):
        save(self, folder, **kwargs)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"].view(torch.int32)[5] ^= 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(BasedForCausalLM, "save_pretrained", save_with_a_flipped_bit)
    assert converter.main([str(based_tiny_path), str(tmp_path / "output")]) == 1
    assert "model.norm.weight" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_from_the_hub_and_up_again(original, converted, tmp_path):
    arguments = ("conversion/convert_checkpoint.py", "lab/original", tmp_path / "output", "--push-to-hub", "me/based")
    with MiniHub() as hub:
        hub.add("lab/original", original)
        run_python(*arguments, **hub.environment(tmp_path / "cache"))
        pushed = hub.files("me/based")
    assert pushed["model.safetensors"] == (converted / "model.safetensors").read_bytes()
    assert set(pushed) >= {path.name for path in (tmp_path / "output").iterdir()}


def test_failed_upload_keeps_the_folder(original, tmp_path):
    arguments = ("conversion/convert_checkpoint.py", original, tmp_path / "output", "--push-to-hub", "not a name")
    with MiniHub() as hub:
        process = run_python(*arguments, check=False, **hub.environment(tmp_path / "cache"))
    assert process.returncode == 1
    assert process.stderr.strip().splitlines()[-1].startswith("cannot upload")
    assert (tmp_path / "output" / "model.safetensors").exists()
