# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Loading runs nobody's code: not that of a repository without `trust_remote_code`, not that of a pickle."""

import json
import pickle
import shutil

import pytest
import torch
from minihub import MiniHub
from programs import run_python

from transformers_based import BasedForCausalLM
from transformers_based.original_format import state_dict_to_original


@pytest.fixture
def marker(tmp_path):
    """A file that only hostile code writes."""
    return tmp_path / "was here"


class Hostile:
    """Pickled among the weights; whoever unpickles it without care writes the marker."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


LAYOUTS = ("original", "converted")
FORMS = ("zip", "old zip", "pickle", "shards")


@pytest.fixture
def folder(request, tiny_model, based_tiny_path, tmp_path):
    """A checkpoint without weights, in the layout `request.param`, and the weights for it."""
    folder = tmp_path / "model"
    if request.param == "original":
        folder.mkdir()
        shutil.copy(based_tiny_path / "config.json", folder)
        model = BasedForCausalLM.from_pretrained(based_tiny_path)
        return folder, state_dict_to_original(model.state_dict(), model.config)
    model = tiny_model()
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return folder, dict(model.state_dict())


def write(folder, content, form):
    path = folder / "pytorch_model.bin"
    if form == "shards":
        path = folder / "pytorch_model-00001-of-00001.bin"
        names = {name: path.name for name in content if isinstance(name, str)}
        index = {"metadata": {"total_size": 1}, "weight_map": names}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "old zip")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("folder", LAYOUTS, indirect=True)
def test_a_pickle_in_the_weights_runs_no_code(folder, form, marker):
    folder, weights = folder
    write(folder, {**weights, "extra": Hostile(marker)}, form)
    with pytest.raises((ValueError, pickle.UnpicklingError)) as caught:
        BasedForCausalLM.from_pretrained(folder)
    assert not marker.exists()
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("folder", LAYOUTS, indirect=True)
def test_the_pickle_of_that_test_does_bite(folder, marker):
    folder, weights = folder
    write(folder, {**weights, "extra": Hostile(marker)}, "zip")
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("form", [form for form in FORMS if form != "pickle"])
@pytest.mark.parametrize("folder", LAYOUTS, indirect=True)
def test_plain_weights_in_those_forms_load(folder, form):
    folder, weights = folder
    write(folder, weights, form)
    assert BasedForCausalLM.from_pretrained(folder).num_parameters() > 0


CALLS = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "BasedConfig",
    "BasedModel",
    "BasedForCausalLM",
)


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_no_code_of_a_repository_runs_without_trust(where, tiny_model, marker, tmp_path):
    """Its files would write the marker: with the package, and, refused in words, without it."""
    folder = tmp_path / "hostile"
    tiny_model().save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(marker)!r}, 'w').close()\n" + path.read_text())
    with MiniHub() as hub:
        hub.add("me/hostile", folder)
        source = str(folder) if where == "folder" else "me/hostile"
        program = f"""
import transformers, transformers_based
for name in {CALLS!r}:
    kind = getattr(transformers_based if name.startswith("Based") else transformers, name)
    for options in ({{}}, {{"trust_remote_code": False}}):
        loaded = kind.from_pretrained({source!r}, **options)
        assert type(loaded).__module__.startswith("transformers_based."), type(loaded)
"""
        variables = hub.environment(tmp_path / "cache")
        run_python("-c", program, **variables)
        assert not marker.exists()
        without_the_package = f"""
import os, sys
sys.modules["transformers_based"] = None
import transformers
for name in {[name for name in CALLS if name.startswith("Auto")]!r}:
    kind = getattr(transformers, name)
    try:
        kind.from_pretrained({source!r}, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), name
    else:
        raise SystemExit(f"{{name}} was not refused")
assert not os.path.exists({str(marker)!r})
kind.from_pretrained({source!r}, trust_remote_code=True)
"""
        run_python("-c", without_the_package, cwd=tmp_path, **{**variables, "PYTHONPATH": None})
        # The marker does work.
        assert marker.exists()
