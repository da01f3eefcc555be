# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Converts an original Based checkpoint to transformers, or back.

    python conversion/convert_checkpoint.py SOURCE OUTPUT [--dtype bfloat16] [--push-to-hub REPO]
    python conversion/convert_checkpoint.py SOURCE OUTPUT --reverse

SOURCE is a folder or a Hub id. OUTPUT appears only when everything in it has been written, loaded again and compared
with SOURCE tensor by tensor; until then the files are in a folder beside it that any failure removes.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import CONFIG_NAME, WEIGHTS_NAME, cached_file

from transformers_based import BasedConfig, BasedForCausalLM
from transformers_based.original_format import (
    config_from_original,
    config_to_original,
    find_weight_files,
    is_original_config,
    read_weights,
    state_dict_from_original,
    state_dict_to_original,
    strip_names,
)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(source: str, output: str | os.PathLike, dtype: torch.dtype | None = None) -> Path:
    """
    Writes the original checkpoint `source` to the new folder `output` as transformers reads it, and returns the folder.

    Args:
        source: folder or Hub id.
        dtype: of the written weights; as stored by default.

    Raises:
        OSError, ValueError, RuntimeError, SafetensorError: `source` cannot be converted, or `output` is not free. The
            message names the file and the key, and nothing is left behind.
    """
    config = read_config(source)
    if config.get("model_type") == "based":
        raise ValueError(f"{source} is in transformers' layout already; --reverse converts it to the original one.")
    if not is_original_config(config):
        raise ValueError(f"{source} {_what_it_is(config)}: only Based checkpoints can be converted.")
    with new_folder(output) as folder:
        weights, _ = strip_names(read_files(source))
        dtype = dtype or stored_dtype(weights)
        model = load(source, dtype)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.save_pretrained(folder)
        del model
        expected = state_dict_from_original(weights, BasedConfig.from_pretrained(folder), shapes, source)
        compare(expected, load(folder, dtype).state_dict(), dtype)
        return _finish(folder, output)


def convert_back(source: str, output: str | os.PathLike, dtype: torch.dtype | None = None) -> Path:
    """`convert` the other way: `output` gets `config.json` and `pytorch_model.bin` as the original code reads them."""
    if read_config(source).get("model_type") != "based":
        raise ValueError(f"{source} is no Based checkpoint in transformers' layout, which --reverse starts from.")
    with new_folder(output) as folder:
        stored = read_files(source)
        dtype = dtype or stored_dtype(stored)
        model = load(source, dtype)
        config, weights = model.config, model.state_dict()
        torch.save(state_dict_to_original(weights, config), folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(config_to_original(config), indent=2) + "\n", encoding="utf-8")
        written, _ = strip_names(read_files(str(folder)))
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        compare(stored, state_dict_from_original(written, config, shapes, str(folder)), dtype)
        return _finish(folder, output)


def read_config(source: str) -> dict[str, Any]:
    """
    The content of the `config.json` of a folder or Hub repository.

    Raises:
        OSError: there is none. ValueError: it is no JSON object, or is damaged; the message names it.
    """
    path = cached_file(source, CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise FileNotFoundError(f"{source} has no {CONFIG_NAME}")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("not a JSON object")
        if is_original_config(config):
            config_from_original(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from error
    return config


def _what_it_is(config: Mapping[str, Any]) -> str:
    if "ssm_cfg" in config:
        return "is a Mamba baseline of the Based paper"
    if "n_embd" in config and "rotary_emb_fraction" in config:
        return "is an attention baseline of the Based paper"
    return f"is no Based checkpoint (model_type is {config.get('model_type')!r})"


def read_files(source: str) -> dict[str, torch.Tensor]:
    """All tensors of the weight files of a folder or Hub repository, as named there."""
    tensors = {}
    for path in tqdm(find_weight_files(source), desc="Reading files"):
        tensors.update(read_weights(path))
    return tensors


def stored_dtype(weights: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype that holds every one of `weights` exactly."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()})


def load(source: str | os.PathLike, dtype: torch.dtype) -> BasedForCausalLM:
    """
    The model of a folder or Hub id in either layout.

    Raises:
        ValueError: weights are missing, or belong to no `BasedForCausalLM`; the message names them.
    """
    model, info = BasedForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{source} lacks {', '.join(sorted(info['missing_keys']))}")
    # What an original checkpoint holds besides weights is reported under this name too.
    unexpected = sorted(key for key in info["unexpected_keys"] if strip_names({key: None})[0])
    if unexpected:
        raise ValueError(f"{source} holds {', '.join(unexpected)}, which is no weight of BasedForCausalLM")
    return model


def compare(expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """
    Checks that every tensor of `expected`, in `dtype`, stands in `actual`, to the bit.

    Raises:
        RuntimeError: one does not; the message names it.
    """
    for name, tensor in tqdm(expected.items(), desc="Comparing tensors"):
        if name not in actual or actual[name].dtype != dtype or not _same_bits(actual[name], tensor.to(dtype)):
            raise RuntimeError(f"`{name}` was not written correctly; is the disk sound?")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    # As bytes: NaN equals itself, and 0.0 is not -0.0.
    return a.shape == b.shape and torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


@contextmanager
def new_folder(output: str | os.PathLike) -> Iterator[Path]:
    """
    A folder that becomes `output` when the block ends well and is removed when it does not.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; remove it or choose another OUTPUT")
    # On the file system of `output`, so that the last step is a rename.
    parent = next(folder for folder in output.parents if folder.exists())
    temporary = parent / f".{output.name}.{os.getpid()}.part"
    temporary.mkdir()
    try:
        yield temporary
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _finish(folder: Path, output: str | os.PathLike) -> Path:
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:>15,} bytes  {path.name}")
    return Path(output)


def push(folder: Path, repo: str) -> None:
    """Uploads all of `folder` to the Hub repository `repo`, which is created if need be."""
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload BasedForCausalLM")


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    parser = argparse.ArgumentParser(
        description="Converts an original Based checkpoint to transformers, or back.",
        epilog="OUTPUT is written completely, compared with SOURCE and then put in place, or not at all.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of the checkpoint")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: as stored)")
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload OUTPUT to this Hub repository")
    parser.add_argument("--reverse", action="store_true", help="from transformers' layout to the original one")
    args = parser.parse_args(arguments)

    step = "convert"
    try:
        folder = (convert_back if args.reverse else convert)(args.source, args.output, DTYPES.get(args.dtype))
        print(f"wrote and checked {folder}")
        if args.push_to_hub:
            step = "upload"
            push(folder, args.push_to_hub)
            print(f"uploaded to {args.push_to_hub}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        print(f"cannot {step} {args.source}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {args.output} was not written" if step == "convert" else "interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # A batch system ends jobs with SIGTERM, which would skip the removal of the temporary folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
