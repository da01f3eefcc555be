# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""README.md: every code block runs as it stands, in a copy of the repository and against a Hub on the loopback."""

import configparser
import re
import shlex
import shutil

import pytest
from minihub import MiniHub
from programs import ROOT, run, run_python


TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PROGRAMS = [(kind, block) for kind, block in BLOCKS if kind in ("python", "bash")]
# Installing takes a network, and `make test` would run this test again: these are checked against what they name.
CHECKED = [block for kind, block in PROGRAMS if re.match(r"(pip|make) ", block)]
RUN = [(kind, block) for kind, block in PROGRAMS if block not in CHECKED]


@pytest.fixture
def copy_of_repository(tmp_path):
    folder = tmp_path / "repository"
    for name in ("src", "kernels", "conversion", "examples", "tests/reference"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_every_block_is_known():
    assert TEXT.count("```") == 2 * len(BLOCKS)
    assert {kind for kind, _ in BLOCKS} == {"python", "bash", "text", "bibtex"}
    for word in ("from_pretrained(", ".generate(", "examples/finetune.py", "convert_checkpoint.py", "push_to_hub("):
        assert any(word in block for _, block in RUN), word


@pytest.mark.parametrize(("kind", "block"), RUN, ids=[block.splitlines()[-1][:40] for _, block in RUN])
def test_block_runs(kind, block, copy_of_repository, tmp_path):
    paths = f"{copy_of_repository / 'src'}:{copy_of_repository / 'kernels' / 'torch-ext'}"
    with MiniHub() as hub:
        variables = {**hub.environment(tmp_path / "cache"), "PYTHONPATH": paths}
        if kind == "python":
            run_python("-c", block, cwd=copy_of_repository, **variables)
        else:
            run("bash", "-euo", "pipefail", "-c", block, cwd=copy_of_repository, **variables)
        if "push_to_hub" in block:
            assert {"model.safetensors", "modeling_based.py"} <= hub.files("your-name/based-tiny").keys()


@pytest.mark.parametrize("block", CHECKED)
def test_install_and_make_lines_name_what_exists(block):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        if program == "make":
            assert set(arguments) <= set(targets)
            continue
        assert arguments.pop(0) in ("install", "uninstall")
        for argument in arguments:
            if match := re.fullmatch(r"\.\[(.+)\]", argument):
                assert set(match[1].split(",")) <= set(setup["options.extras_require"])
            elif argument.endswith(".txt"):
                assert (ROOT / argument).exists()
            else:
                assert argument in (".", "--constraint", "--yes", "triton")


def test_files_and_targets_in_the_text_exist():
    for path in re.findall(r"`([\w.-]+/[\w./-]*)`", TEXT):
        if path.split("/")[0] not in ("hazyresearch", "openai-community"):
            assert (ROOT / path).exists(), path
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)`", TEXT)) <= set(targets)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extra in setup["options.extras_require"]:
        assert f"`{extra}`" in TEXT
