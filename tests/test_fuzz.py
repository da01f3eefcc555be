# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Damaged and hostile files, some thousands of them (hypothesis, the same ones each time): configs, index files,
headers and bytes of weights. Each either loads or ends in an error that says which file or field is wrong."""

import copy
import json
import resource
import shutil
import struct

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from transformers_based import BasedConfig, BasedForCausalLM
from transformers_based.original_format import config_to_original, state_dict_to_original


NAMED = (ValueError, OSError, TypeError, RuntimeError, StrictDataclassError)
SCALARS = st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=5
)
CONFIG = BasedConfig(
    vocab_size=17,
    hidden_size=8,
    intermediate_size=256,
    layer_types=["conv", "linear_attention", "sliding_attention"],
    num_hidden_layers=3,
    num_attention_heads=2,
    linear_num_heads=2,
    linear_feature_dim=4,
)
ORIGINAL = config_to_original(CONFIG)


def fuzz(examples):
    quiet = list(HealthCheck)
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)


def changes(config):
    """Some fields of `config`, or of the dictionaries in it, replaced or (...) removed: (path, value)."""
    paths = [(name,) for name in config]
    paths += [(name, inner) for name, value in config.items() if isinstance(value, dict) for inner in value]
    return st.lists(st.tuples(st.sampled_from(paths), VALUES | st.just(...)), min_size=1, max_size=3)


def changed(config, changes):
    config = copy.deepcopy(config)
    for (*outer, name), value in changes:
        place = config[outer[0]] if outer and isinstance(config.get(outer[0]), dict) else config
        if value is ...:
            place.pop(name, None)
        else:
            place[name] = value
    return config


def ends_well(call, *names):
    """`call` works, or raises a named error whose text holds one of `names`, without taking a gigabyte."""
    before, message = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None
    try:
        call()
    except NAMED as error:
        message = str(error).strip()
    assert message is None or any(name in message for name in names or message[:1]), message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BasedForCausalLM(CONFIG)


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    weights = state_dict_to_original(model.state_dict(), CONFIG)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(ORIGINAL))
    return folder


@pytest.fixture(scope="module")
def original_safe(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original safetensors")
    weights = torch.load(original / "pytorch_model.bin", weights_only=True)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")
    shutil.copy(original / "config.json", folder)
    return folder


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    model.save_pretrained(folder)
    return folder


@fuzz(1000)
@given(changes(CONFIG.to_dict()))
def test_config(changes):
    config = changed(CONFIG.to_dict(), changes)
    ends_well(lambda: BasedConfig.from_dict(config))


@fuzz(1000)
@given(changes(ORIGINAL))
def test_original_config(changes):
    config = changed(ORIGINAL, changes)
    ends_well(lambda: BasedConfig.from_dict(config), "Original config", "field", "validator", "`", "Based")


@pytest.mark.parametrize("layout", ["original", "converted"])
def test_config_with_weights(layout, request, tmp_path_factory):
    folder = shutil.copytree(request.getfixturevalue(layout), tmp_path_factory.mktemp("fuzz") / "model")
    base = json.loads((folder / "config.json").read_text())

    @fuzz(300)
    @given(changes(base))
    def run(changes):
        (folder / "config.json").write_text(json.dumps(changed(base, changes)))
        ends_well(lambda: BasedForCausalLM.from_pretrained(folder))

    run()


@pytest.mark.parametrize("layout", ["original", "converted"])
def test_text_of_a_config_or_index(layout, request, tmp_path_factory):
    """Cut, overwritten, or another JSON value altogether."""
    folder = shutil.copytree(request.getfixturevalue(layout), tmp_path_factory.mktemp("fuzz") / "model")
    text = (folder / "config.json").read_bytes()
    index = tmp_path_factory.mktemp("index")
    shutil.copy(folder / "config.json", index)
    anything = VALUES.map(lambda x: json.dumps(x).encode())
    cut = st.integers(0, len(text)).map(lambda n: text[:n])

    @fuzz(150)
    @given(anything | cut | st.binary(max_size=20))
    def run(content):
        (folder / "config.json").write_bytes(content)
        ends_well(lambda: BasedConfig.from_pretrained(folder))
        ends_well(lambda: BasedForCausalLM.from_pretrained(folder))
        (index / "model.safetensors.index.json").write_bytes(content)
        ends_well(lambda: BasedForCausalLM.from_pretrained(index))

    run()

    @fuzz(100)
    @given(st.dictionaries(st.sampled_from(["weight_map", "metadata"]), VALUES))
    def run_index(content):
        (index / "model.safetensors.index.json").write_text(json.dumps(content))
        ends_well(lambda: BasedForCausalLM.from_pretrained(index))

    run_index()


@pytest.mark.parametrize("layout", ["original_safe", "converted"])
def test_header_of_safetensors(layout, request, tmp_path_factory):
    folder = shutil.copytree(request.getfixturevalue(layout), tmp_path_factory.mktemp("fuzz") / "model")
    content = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    sizes = st.none() | st.integers(0, 2**64 - 1)

    @fuzz(250)
    @given(changes(header), sizes)
    def run(changes, announced):
        changed_header = json.dumps(changed(header, changes)).encode()
        size = len(changed_header) if announced is None else announced
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + changed_header + data)
        ends_well(lambda: BasedForCausalLM.from_pretrained(folder), str(folder), "model.", "`")

    run()


@pytest.mark.parametrize("layout", ["original", "original_safe", "converted"])
def test_bytes_of_weights(layout, request, tmp_path_factory):
    """Cut anywhere, and a few bytes overwritten."""
    folder = shutil.copytree(request.getfixturevalue(layout), tmp_path_factory.mktemp("fuzz") / "model")
    (path,) = [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    content = path.read_bytes()
    places = st.integers(0, len(content) - 1) | st.integers(0, 300)
    damage = st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)

    @fuzz(150)
    @given(damage, st.none() | places)
    def run(damage, length):
        damaged = bytearray(content)
        for place, byte in damage:
            damaged[place] = byte
        path.write_bytes(damaged[:length])
        ends_well(lambda: BasedForCausalLM.from_pretrained(folder), str(folder), "model.", "`")

    run()


@pytest.mark.parametrize("layout", ["original", "converted"])
@pytest.mark.parametrize("size", [5_000_000, 2**31 - 1, 10**18])
def test_a_config_that_asks_for_more_than_the_files_hold(layout, size, request, tmp_path):
    """Every size, one by one; the memory for it is not even asked for."""
    folder = shutil.copytree(request.getfixturevalue(layout), tmp_path / "model")
    base = json.loads((folder / "config.json").read_text())
    sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim linear_num_heads"
    names = [*sizes.split(), "linear_feature_dim", "conv_kernel_size", "n_embd", "n_layer"]
    for name in base.keys() & set(names):
        (folder / "config.json").write_text(json.dumps({**base, name: size}))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(NAMED, match=f"{name}|head_dim|asks for|lacks|shape"):
            BasedForCausalLM.from_pretrained(folder)
        # KiB: what reading and importing take.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, name


def test_a_damaged_file_stays_as_it_was(original, tmp_path):
    """Nothing is written while loading: the folder holds the same files, the same bytes."""
    folder = shutil.copytree(original, tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:5000])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        BasedForCausalLM.from_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_undamaged_files_load(original, original_safe, converted):
    weights = load_file(converted / "model.safetensors")
    for folder in (original, original_safe, converted):
        loaded = BasedForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    with pytest.raises(SafetensorError):
        load_file(original / "config.json")
