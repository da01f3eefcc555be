# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""conversion/: all kinds against their golden logits, memory, shards, what goes along, and bad weights."""

import itertools
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from minihub import MiniHub
from programs import ROOT, load_program, run_python
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, MambaForCausalLM, Phi3ForCausalLM

from transformers_based import BasedForCausalLM


converter = load_program("conversion/convert_checkpoint.py")
card = sys.modules["model_card"]
families = sys.modules["families"]

REFERENCE = Path(__file__).parent / "reference"
CLASSES = {"based": BasedForCausalLM, "attn": Phi3ForCausalLM, "mamba": MambaForCausalLM}
# Of each kind, a tensor that is worth damaging.
TENSORS = {
    "based": "model.transformer.layers.2.mixer.Wqkv.weight",
    "attn": "model.transformer.layers.1.mlp.fc1.weight",
    "mamba": "model.backbone.layers.2.mixer.A_log",
}
every_kind = pytest.mark.parametrize("kind", CLASSES)


@pytest.fixture
def original(kind, tmp_path):
    """A copy of the original checkpoint of a kind, free to be damaged."""
    folder = tmp_path / "original"
    folder.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(REFERENCE / f"{kind}-tiny" / name, folder)
    return folder


def read(folder):
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def write(folder, weights):
    torch.save(weights, folder / "pytorch_model.bin")


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def golden_of(kind):
    return load_file(REFERENCE / f"{kind}-tiny" / "golden.safetensors")


@every_kind
def test_converted_checkpoint_computes_the_golden_logits(kind, tmp_path):
    converter.convert(str(REFERENCE / f"{kind}-tiny"), tmp_path / "converted")
    model, golden = AutoModelForCausalLM.from_pretrained(tmp_path / "converted"), golden_of(kind)
    assert type(model) is CLASSES[kind]
    logits = model(golden["input_ids"]).logits[..., : golden["logits"].shape[-1]]
    torch.testing.assert_close(logits, golden["logits"], atol=2e-4, rtol=0)
    generated = model.generate(golden["input_ids"][:, :8], max_new_tokens=24, do_sample=False)
    assert generated.shape[1] == 32
    # The other rows only pad the embedding.
    assert generated.max() < 515


@every_kind
def test_original_formula_computes_the_golden_logits(kind):
    folder, golden = REFERENCE / f"{kind}-tiny", golden_of(kind)
    config = json.loads((folder / "config.json").read_text())
    weights = {name.removeprefix("model."): tensor for name, tensor in read(folder).items()}
    logits = families.family_of(config).logits(config, weights, golden["input_ids"])
    torch.testing.assert_close(logits[..., : golden["logits"].shape[-1]], golden["logits"], atol=2e-4, rtol=0)


@every_kind
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_any_dtype_is_verified_against_the_formula(kind, dtype, tmp_path, capfd):
    options = ["--dtype", dtype] if dtype else []
    assert converter.main([str(REFERENCE / f"{kind}-tiny"), str(tmp_path / "output"), "--verify", *options]) == 0
    assert "logits differ from the original formula by" in capfd.readouterr().out
    written = load_file(tmp_path / "output" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in written.values()} == {f"torch.{dtype or 'float32'}"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert str(model.dtype) == f"torch.{dtype or 'float32'}"


@every_kind
def test_verify_notices_another_function(kind, fails, monkeypatch):
    logits = families.family_of(json.loads((REFERENCE / f"{kind}-tiny" / "config.json").read_text())).logits
    changed = [
        families.Family(**{**vars(family), "logits": lambda *arguments: logits(*arguments) + 1e-3})
        for family in families.FAMILIES
    ]
    monkeypatch.setattr(families, "FAMILIES", changed)
    assert "logits differ" in fails(REFERENCE / f"{kind}-tiny", "--verify")


@every_kind
@pytest.mark.parametrize("change", ["prefix", "safetensors", "gpt2", "tied"])
def test_every_form_of_the_original_gives_the_same(kind, original, tmp_path, change):
    expected = load_file(converter.convert(str(original), tmp_path / "expected") / "model.safetensors")
    weights = read(original)
    if change == "prefix":
        write(original, {name.removeprefix("model."): tensor for name, tensor in weights.items()})
    elif change == "safetensors":
        (original / "pytorch_model.bin").unlink()
        save_file({name: tensor.clone() for name, tensor in weights.items()}, original / "model.safetensors")
    elif change == "gpt2" and kind != "mamba":
        edit_config(original, model_type="gpt2")
    elif change == "tied":
        del weights["model.lm_head.weight"]
        write(original, weights)
    actual = load_file(converter.convert(str(original), tmp_path / "actual") / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


@every_kind
def test_untied_head_is_kept_when_the_config_says_so(kind, original, tmp_path, fails):
    weights = read(original)
    weights["model.lm_head.weight"] = weights["model.lm_head.weight"] + 1
    write(original, weights)
    assert "lm_head.weight" in fails(original)
    edit_config(original, tie_word_embeddings=False)
    converter.convert(str(original), tmp_path / "untied", verify=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    assert torch.equal(model.lm_head.weight, weights["model.lm_head.weight"])


@every_kind
def test_shards(kind, original, tmp_path):
    whole = load_file(converter.convert(str(original), tmp_path / "whole") / "model.safetensors")
    assert converter.main([str(original), str(tmp_path / "sharded"), "--max-shard-size", "200KB"]) == 0
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    for name, tensor in whole.items():
        with safe_open(tmp_path / "sharded" / index["weight_map"][name], "pt") as file:
            assert torch.equal(file.get_tensor(name), tensor)
    model, golden = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded"), golden_of(kind)
    logits = model(golden["input_ids"]).logits[..., : golden["logits"].shape[-1]]
    torch.testing.assert_close(logits, golden["logits"], atol=2e-4, rtol=0)


def _write_large(folder):
    """An attention baseline of some 360 MB; no layer is a large part of it."""
    config = json.loads((REFERENCE / "attn-tiny" / "config.json").read_text())
    size, width, rows, layers = 1024, 4096, 6144, 5
    config |= {"n_embd": size, "n_head": 16, "n_layer": layers, "vocab_size": rows}
    shapes = {"embeddings.word_embeddings.weight": (rows, size), "ln_f.weight": (size,)}
    for i in range(layers):
        for name, shape in {
            "mixer.Wqkv.weight": (3 * size, size),
            "mixer.out_proj.weight": (size, size),
            "mlp.fc1.weight": (2 * width, size),
            "mlp.fc2.weight": (size, width),
            "norm1.weight": (size,),
            "norm2.weight": (size,),
        }.items():
            shapes[f"layers.{i}.{name}"] = shape
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write(folder, {f"model.transformer.{name}": torch.full(shape, 0.5) for name, shape in shapes.items()})


def _peak_memory(program, *arguments):
    """Bytes that `program` had in memory at most. (`ru_maxrss` of a child starts at what its parent has.)"""
    start = f"import re, sys; sys.path.insert(0, {str(ROOT / 'conversion')!r})\n"
    end = "\nprint(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    return int(run_python("-c", start + program + end, *arguments).stdout.split()[-1]) * 1024


def test_peak_memory_is_the_checkpoint_and_a_fifth(tmp_path):
    _write_large(tmp_path / "large")
    size = (tmp_path / "large" / "pytorch_model.bin").stat().st_size
    assert 300e6 < size < 400e6
    program = "import convert_checkpoint as c, transformers.models.phi3.modeling_phi3"
    base = _peak_memory(program)
    peak = _peak_memory(f"{program}\nassert c.main(sys.argv[1:]) == 0", tmp_path / "large", tmp_path / "output")
    assert (tmp_path / "output" / "model.safetensors").stat().st_size > 0.99 * size
    assert peak - base < 1.2 * size


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(kind, original, tmp_path, fails, value):
    weights, name = read(original), TENSORS[kind]
    weights[name].view(-1)[7] = value
    write(original, weights)
    message = fails(original)
    assert "pytorch_model.bin" in message
    assert name.removeprefix("model.") in message
    assert "--allow-nan" in message
    assert converter.main([str(original), str(tmp_path / "output"), "--allow-nan"]) == 0
    written = load_file(tmp_path / "output" / "model.safetensors")
    assert sum(int((~tensor.isfinite()).sum()) for tensor in written.values()) == 1


@every_kind
def test_numbers_too_large_for_the_dtype(kind, original, fails):
    weights, name = read(original), TENSORS[kind]
    weights[name].view(-1)[7] = 1e6
    write(original, weights)
    message = fails(original, "--dtype", "float16")
    assert name.removeprefix("model.") in message
    assert "float16" in message


@every_kind
def test_wrong_missing_and_unknown_tensors(kind, original, fails):
    weights, name = read(original), TENSORS[kind]
    for damage in (
        {**weights, name: torch.ones(7, 64)},
        {**weights, name: torch.ones(())},
        {key: tensor for key, tensor in weights.items() if key != name},
        {**weights, name: weights[name].long()},
        {**weights, name + "_new": torch.ones(2)},
        {**weights, name.removeprefix("model."): torch.ones(2)},
    ):
        write(original, damage)
        message = fails(original)
        assert "pytorch_model.bin" in message
        assert name.removeprefix("model.") in message
    write(original, {})
    assert "pytorch_model.bin" in fails(original)


@every_kind
def test_truncated_file(kind, original, fails):
    content = (original / "pytorch_model.bin").read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        (original / "pytorch_model.bin").write_bytes(content[:length])
        assert "pytorch_model.bin" in fails(original)


@pytest.mark.parametrize(("kind", "other"), itertools.permutations(CLASSES, 2))
def test_weights_of_one_kind_under_the_config_of_another(kind, other, original, fails):
    shutil.copy(REFERENCE / f"{other}-tiny" / "config.json", original)
    message = fails(original)
    assert "pytorch_model.bin" in message
    assert families.family_of(json.loads((original / "config.json").read_text())).kind in message


def test_gpt2_is_no_attention_baseline(tmp_path, fails):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert "'gpt2'" in fails(tmp_path / "gpt2")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("attn", {"activation_function": "gelu"}),
        ("attn", {"qkv_proj_bias": True}),
        ("attn", {"rotary_emb_fraction": 0}),
        ("attn", {"n_head": 7}),
        ("attn", {"n_head": "4"}),
        ("attn", {"n_layer": None}),
        ("mamba", {"ssm_cfg": 3}),
        ("mamba", {"rms_norm": False}),
        ("mamba", {"d_model": "64"}),
        ("mamba", {"vocab_size": [515]}),
    ],
)
def test_config_that_no_released_baseline_has(original, fails, values):
    edit_config(original, **values)
    assert "config.json" in fails(original)


@pytest.mark.parametrize("kind", ["attn", "mamba"])
def test_reverse_is_for_based_only(kind, original, tmp_path, fails):
    converted = converter.convert(str(original), tmp_path / "converted")
    assert "--reverse" in fails(converted, "--reverse")
    assert "--reverse" in fails(original, "--reverse")


def _shard(folder, names=("a.bin", "b.bin")):
    weights = read(folder)
    (folder / "pytorch_model.bin").unlink()
    weight_map = {name: names[i % 2] for i, name in enumerate(weights)}
    for shard in names:
        torch.save({name: weights[name] for name in weights if weight_map[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@every_kind
def test_shard_that_is_a_link_out_of_the_folder(kind, original, tmp_path, fails):
    _shard(original)
    (original / "b.bin").rename(tmp_path / "elsewhere.bin")
    (original / "b.bin").symlink_to(tmp_path / "elsewhere.bin")
    message = fails(original)
    assert "pytorch_model.bin.index.json" in message
    assert "`b.bin`" in message


@every_kind
def test_bad_weight_in_a_shard_names_the_shard(kind, original, fails):
    _shard(original)
    shard = next(path for path in (original / "a.bin", original / "b.bin") if TENSORS[kind] in torch.load(path))
    weights = torch.load(shard)
    weights[TENSORS[kind]].view(-1)[0] = float("nan")
    torch.save(weights, shard)
    message = fails(original)
    assert str(shard) in message
    assert TENSORS[kind].removeprefix("model.") in message


@pytest.mark.parametrize("kind", ["attn"])
@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "[" * 100_000]
)
def test_damaged_index(original, fails, content):
    (original / "pytorch_model.bin").unlink()
    (original / "pytorch_model.bin.index.json").write_text(content)
    assert "pytorch_model.bin.index.json" in fails(original)


@every_kind
def test_card_says_where_it_is_from_and_how_it_was_made(kind, original, tmp_path):
    (original / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nThe original.\n")
    converter.convert(str(original), tmp_path / "output", torch.bfloat16, max_shard_size="200KB", verify=True)
    text = (tmp_path / "output" / "README.md").read_text()
    for fact in (
        f"`{original}`",
        "2402.18668",
        "license: apache-2.0",
        "the Pile",
        CLASSES[kind].__name__,
        "Intended use",
    ):
        assert fact in text
    python, program, *arguments = text.split("```bash\n")[1].split("\n")[0].split()
    assert (python, program) == ("python", "conversion/convert_checkpoint.py")
    before = {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir()}
    shutil.rmtree(tmp_path / "output")
    assert converter.main(arguments) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "output").iterdir()} == before


@pytest.mark.parametrize("content", [None, "", "no metadata", "---\nlicense: [\n---\n", "---\nlicense: 'a: b'\n---\n"])
def test_licence_that_is_not_known(content):
    assert card.licence_of(content) is None


def test_published_numbers_are_those_of_the_kind_and_size():
    sizes = [card.size_class(millions * 10**6) for millions in (200, 360, 700, 1300, 2000)]
    assert sizes == [None, "360m", None, "1b", None]
    values = dict.fromkeys(("kind", "architecture", "source", "dtype", "licence", "tokenizer", "command"), "a")
    values |= {"is_hub_id": False, "rounded": False}
    assert "| attn-360m | 57.9 | 56.3 | 27.9 |" in card.model_card(family="attn", parameters=360_000_000, **values)
    assert "| mamba-1b | 11.1 | 28.4 | 29.4 |" in card.model_card(family="mamba", parameters=1_300_000_000, **values)
    assert "no released checkpoint" in card.model_card(family="based", parameters=10**6, **values)


def test_weights_are_downloaded_once(tmp_path):
    folder = tmp_path / "original"
    shutil.copytree(REFERENCE / "attn-tiny", folder)
    save_file({name: tensor.clone() for name, tensor in read(folder).items()}, folder / "model.safetensors")
    command = ("conversion/convert_checkpoint.py", "lab/original", tmp_path / "output", "--verify")
    with MiniHub() as hub:
        hub.add("lab/original", folder)
        run_python(*command, **hub.environment(tmp_path / "cache"))
        downloads = [request for request in hub.requests if request.startswith("GET")]
        assert sum("model.safetensors" in request for request in downloads) == 1
        assert not any("pytorch_model.bin" in request for request in hub.requests)
    assert "base_model: lab/original" in (tmp_path / "output" / "README.md").read_text()


def _with_vocabulary_of_gpt2(folder):
    """A copy of the small attention baseline whose embedding has a row for each token of GPT-2."""
    folder.mkdir()
    config = json.loads((REFERENCE / "attn-tiny" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 50257}))
    weights = read(REFERENCE / "attn-tiny")
    del weights["model.lm_head.weight"]
    weights["model.transformer.embeddings.word_embeddings.weight"] = torch.ones(50272, 64)
    write(folder, weights)
    return folder


def test_tokenizer_goes_along(tmp_path):
    """A small stand-in is on the Hub under the name of GPT-2's."""
    source, tokenizer = _with_vocabulary_of_gpt2(tmp_path / "original"), tmp_path / "gpt2"
    tokenizer.mkdir()
    model = models.BPE({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}, [("a", "b")])
    Tokenizer(model).save(str(tokenizer / "tokenizer.json"))
    model.save(str(tokenizer))
    (tokenizer / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with MiniHub() as hub:
        hub.add("openai-community/gpt2", tokenizer)
        command = ("conversion/convert_checkpoint.py", source, tmp_path / "output")
        run_python(*command, **hub.environment(tmp_path / "cache"))
    assert AutoTokenizer.from_pretrained(tmp_path / "output")("abab")["input_ids"] == [2, 2]
    assert "| Tokenizer | `openai-community/gpt2` |" in (tmp_path / "output" / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "output").generation_config.suppress_tokens[0] == 50257


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0"}])
def test_no_tokenizer_without_a_hub(tmp_path, variables):
    """Offline by choice, or at an address where nobody answers."""
    with MiniHub() as hub:
        variables = hub.environment(tmp_path / "cache") | variables
    source = _with_vocabulary_of_gpt2(tmp_path / "original")
    process = run_python("conversion/convert_checkpoint.py", source, tmp_path / "output", **variables)
    assert "no tokenizer added: openai-community/gpt2 cannot be reached" in process.stderr
    assert not list((tmp_path / "output").glob("tokenizer*"))
    assert "not included" in (tmp_path / "output" / "README.md").read_text()


def test_interrupted_download_goes_on_where_it_stopped(tmp_path):
    """The connection breaks in the middle of the weights; the next request asks for the rest only."""
    folder = _with_vocabulary_of_gpt2(tmp_path / "original")
    edit_config(folder, vocab_size=90_000)
    # The Hub client keeps what it has in steps of 10 MiB.
    embedding = {"model.transformer.embeddings.word_embeddings.weight": torch.ones(90_000, 64)}
    write(folder, read(folder) | embedding)
    half, ranges = (folder / "pytorch_model.bin").stat().st_size // 2, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            path = folder / name
            body = path.read_bytes() if path.exists() else b""
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            self.send_response(404 if not body else 206 if start else 200)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("ETag", f'"{name}"')
            self.send_header("Content-Length", str(len(body) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            if self.command == "GET" and name == "pytorch_model.bin":
                ranges.append(start)
                body = body if start else body[:half]
            if self.command == "GET":
                self.wfile.write(body[start:])

        do_HEAD = do_GET

        def log_message(self, *_):
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    variables = MiniHub().environment(tmp_path / "cache")
    variables["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"
    run_python("conversion/convert_checkpoint.py", "lab/original", tmp_path / "output", **variables)
    server.shutdown()
    server.server_close()
    assert len(ranges) == 2
    assert ranges[0] == 0
    assert 0 < ranges[1] <= half
    assert (tmp_path / "output" / "model.safetensors").exists()
