# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What `pip install` installs, and that it works without triton and without a network; what goes along with a model."""

import re
import shutil
import zipfile
from email.parser import Parser

import pytest
from programs import ROOT, run_python

import transformers_based


pytest.importorskip("setuptools", minversion="77", reason="wheels are built with setuptools >= 77, without a network")

# An uninstalled package, whatever is installed here.
HIDE = "import sys; sys.modules.update(dict.fromkeys({!r}.split()))\n"
NO_NETWORK = """
import socket
def refuse(*arguments):
    raise AssertionError(f"something reached for the network: {arguments[1:]}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is packaged, so that building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("packaging") / "tree"
    for name in ("src", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("README.md", "LICENSE", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(tree, hook: str):
    output = tree.parent / hook
    run_python("-c", f"from setuptools import build_meta; build_meta.{hook}({str(output)!r})", cwd=tree)
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tree):
    return build(tree, "build_wheel")


@pytest.fixture(scope="module")
def installed(wheel):
    """The folder of an installation from the wheel."""
    folder = wheel.parent / "site-packages"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_wheel_holds_both_packages_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"transformers_based/{path.name}" for path in (ROOT / "src" / "transformers_based").glob("*.py")}
    kernels = ROOT / "kernels" / "torch-ext" / "based_kernels"
    expected |= {f"based_kernels/{path.name}" for path in kernels.glob("*.py")} | {"based_kernels/metadata.json"}
    assert names == expected


def test_metadata(installed):
    (folder,) = installed.glob("*.dist-info")
    metadata = Parser().parsestr((folder / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Name"] == "transformers-based"
    assert metadata["Version"] == transformers_based.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (metadata["License-Expression"] or metadata["License"])
    assert (folder / "licenses" / "LICENSE").exists()
    requirements = metadata.get_all("Requires-Dist")
    always = {re.match(r"[\w-]+", line)[0]: line for line in requirements if "extra ==" not in line}
    assert set(always) == {"torch", "transformers", "accelerate", "safetensors", "huggingface-hub", "triton"}
    assert re.fullmatch(r"transformers\s*<6,>=5\.17", always["transformers"])
    assert 'sys_platform == "linux"' in always["triton"]
    assert set(metadata.get_all("Provides-Extra")) == {"train", "eval", "serve", "plot", "test", "dev"}
    (own_extras,) = (re.search(r"\[(.+)\]", line)[1] for line in requirements if line.startswith("transformers-based"))
    # `make test` installs `dev`: without the others their tests would skip.
    assert set(own_extras.split(",")) == {"eval", "plot", "serve", "test", "train"}


def test_editable_installation_finds_both_packages(tree):
    folder = tree.parent / "editable"
    zipfile.ZipFile(build(tree, "build_editable")).extractall(folder)
    program = f"""
import importlib.util, site
site.addsitedir({str(folder)!r})
print(*(importlib.util.find_spec(name).origin for name in ("transformers_based", "based_kernels")), sep="\\n")
"""
    # Without site-packages (-S), where another editable installation may be.
    files = run_python("-S", "-c", program, cwd=tree.parent, PYTHONPATH=None).stdout.split()
    assert files == [
        str(tree / "src" / "transformers_based" / "__init__.py"),
        str(tree / "kernels" / "torch-ext" / "based_kernels" / "__init__.py"),
    ]


def test_works_without_triton_and_without_network(installed, based_tiny_path, tmp_path):
    """From the wheel: import, load, train a step, generate, save and load."""
    program = f"""
import torch, transformers_based
from transformers import AutoModelForCausalLM
assert transformers_based.__file__.startswith({str(installed)!r})
model = transformers_based.BasedForCausalLM.from_pretrained({str(based_tiny_path)!r})
ids = torch.arange(40).view(2, 20)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
before = model(ids, labels=ids).loss
before.backward()
optimizer.step()
assert model(ids, labels=ids).loss < before
model.save_pretrained({str(tmp_path / "saved")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "saved")!r})
print(model.generate(ids, max_new_tokens=5, pad_token_id=0).shape)
assert sys.modules["triton"] is None
"""
    process = run_python("-c", HIDE.format("triton") + NO_NETWORK + program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "torch.Size([2, 25])" in process.stdout


def test_no_folder_shadows_the_kernels_library():
    assert not (ROOT / "tests" / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()


def test_relative_imports_are_of_the_form_that_is_shipped_with_a_model():
    """`save_pretrained` copies the files named by `from .name import x`, and only those."""
    lines = [
        (path.name, line)
        for path in (ROOT / "src" / "transformers_based").glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r"\s*(from\s+\.|import\s+\.)", line)
    ]
    assert lines
    wrong = [
        (name, line)
        for name, line in lines
        # The package's __init__ is not shipped.
        if name != "__init__.py" and not re.match(r"\s*from \.\w+ import ", line)
    ]
    assert not wrong
