# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""`make hub-kernel`: its folder is what the Hub's `kernels` library loads, from disk and from a Hub on the loopback."""

import json
import os
import shutil

import pytest
import torch
from huggingface_hub import constants
from minihub import MiniHub
from programs import ROOT, run, run_python


PACKAGE = ROOT / "kernels" / "torch-ext" / "based_kernels"
# `make test` installs the library there, and nowhere else.
LIBRARY = os.environ.get("KERNELS_LIB", "")
needs_library = pytest.mark.skipif(
    not LIBRARY, reason="the `kernels` library is installed by `make test` (KERNELS_LIB)"
)
PRELUDE = f"""
import sys, torch
from pathlib import Path
sys.path.append({LIBRARY!r})
def check(kernel, place):
    import based_kernels
    assert kernel is based_kernels and place in kernel.__file__, kernel.__file__
    query, key, value = (torch.randn(1, 20, 2, size, requires_grad=True) for size in (8, 8, 16))
    output, state = kernel.taylor_attention(query, key, value, output_final_state=True)
    scores = (torch.einsum("bihd,bjhd->bhij", query, key) * 8**-0.5)
    weights = (1 + scores + scores**2 / 2).tril()
    expected = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), value)
    torch.testing.assert_close(output, expected, atol=1e-3, rtol=1e-3)
    print("kernel", kernel.is_available())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `make hub-kernel` writes, from a copy of the repository."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "kernels", tree / "kernels")
    for name in ("Makefile", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run("make", "hub-kernel", cwd=tree)
    return tree / "build" / "hub-kernel"


@pytest.fixture
def folder_for_this_machine(folder, tmp_path):
    """The same, its build under the name that this build of PyTorch looks for."""
    copy = shutil.copytree(folder, tmp_path / "kernel")
    if not torch.cuda.is_available():
        (copy / "build" / "torch-cuda").rename(copy / "build" / "torch-cpu")
    return copy


def test_layout(folder):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    code = {path.name for path in PACKAGE.iterdir() if path.suffix in (".py", ".json")}
    assert files == {"README.md", "build.toml", "LICENSE"} | {f"build/torch-cuda/{name}" for name in code}
    metadata = json.loads((folder / "build" / "torch-cuda" / "metadata.json").read_text())
    assert f"torch-{metadata['backend']['type']}" == "torch-cuda"


def client(program, **variables):
    # Only the folder's copy of the kernels can be imported.
    return run_python("-c", PRELUDE + program, PYTHONPATH=None, TRITON_INTERPRET="1", **variables).stdout


@needs_library
def test_get_local_kernel(folder, folder_for_this_machine):
    for path in (folder / "build" / "torch-cuda", folder_for_this_machine):
        program = f"from kernels import get_local_kernel\ncheck(get_local_kernel(Path({str(path)!r})), {str(path)!r})"
        assert client(program) == "kernel True\n"


@needs_library
def test_get_kernel(folder_for_this_machine, tmp_path):
    name = "me/based-kernels"
    upload = f"""
from huggingface_hub import HfApi
api = HfApi()
api.create_repo({name!r}, repo_type="kernel")
api.create_branch({name!r}, branch="v1", repo_type="kernel")
api.upload_folder(
    repo_id={name!r}, folder_path={str(folder_for_this_machine)!r}, repo_type="kernel", revision="v1"
)
"""
    get = f"""
from kernels import get_kernel
check(get_kernel({name!r}, version=1, trust_remote_code=True), "based-kernels")
"""
    untrusted = get.replace(", trust_remote_code=True", "")
    with MiniHub() as hub:
        # With telemetry off, 0.16.2 sends a header that ends in a blank, which the client refuses.
        telemetry = {"HF_HUB_DISABLE_TELEMETRY": "0"}
        if "kernel" in constants.REPO_TYPES:
            client(upload, **hub.environment(tmp_path / "cache"))
        else:  # huggingface_hub 1.x uploads no kernels
            hub.commit(f"kernels/{name}", {})
            files = [path for path in folder_for_this_machine.rglob("*") if path.is_file()]
            content = {path.relative_to(folder_for_this_machine).as_posix(): path.read_bytes() for path in files}
            hub.commit(f"kernels/{name}", content, branch="v1")
        variables = {**hub.environment(tmp_path / "other cache"), **telemetry}
        assert client(get, **variables) == "kernel True\n"
        with pytest.raises(AssertionError, match=r"ValueError: Kernel repository 'me/based-kernels' .* trust"):
            client(untrusted, **variables)
