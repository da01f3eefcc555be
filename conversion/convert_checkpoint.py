# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Converts an original checkpoint of the Based paper to transformers, or a Based one back.

    python conversion/convert_checkpoint.py SOURCE OUTPUT [--dtype bfloat16] [--verify] [--push-to-hub REPO]
    python conversion/convert_checkpoint.py SOURCE OUTPUT --reverse

SOURCE is a folder or a Hub id of a Based checkpoint or of one of its two baselines, attention and Mamba; families.py
tells them apart by config and weights. OUTPUT appears only when everything in it has been written, loaded again and
compared with SOURCE tensor by tensor; until then the files are in a folder beside it that any failure removes. Memory
holds one copy of the weights at a time, SOURCE or OUTPUT, whichever is larger (`--reverse`: several).
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, Family, Half, family_of
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from model_card import licence_of, model_card
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import CONFIG_NAME, WEIGHTS_NAME

from transformers_based import BasedForCausalLM
from transformers_based.original_format import (
    check_shapes,
    config_to_original,
    find_file,
    find_weight_files,
    read_weights,
    state_dict_from_original,
    state_dict_to_original,
    strip_names,
)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER = "openai-community/gpt2"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt")
TOKENIZER_VOCABULARY = 50257
# What fp32 leaves between two ways to compute logits of standard deviation 5.
LOGITS_TOLERANCE = 2e-4


def convert(
    source: str,
    output: str | os.PathLike,
    dtype: torch.dtype | None = None,
    *,
    max_shard_size: str = "5GB",
    allow_nan: bool = False,
    verify: bool = False,
) -> Path:
    """
    Writes the original checkpoint `source` to the new folder `output` as transformers reads it, and returns the folder.

    Args:
        source: folder or Hub id.
        dtype: of the written weights; as stored by default.
        max_shard_size: weights beyond it go to several files.
        allow_nan: convert weights that are NaN or infinite too.
        verify: also compare the logits of what was written with the original formula.

    Raises:
        OSError, ValueError, RuntimeError, SafetensorError: `source` cannot be converted, or `output` is not free. The
            message names the file and the key, and nothing is left behind.
    """
    config = read_config(source)
    if config.get("model_type") == "based":
        raise ValueError(f"{source} is in transformers' layout already; --reverse converts it to the original one.")
    family = family_of(config)
    if family is None:
        kinds = ", ".join(family.kind for family in FAMILIES)
        raise ValueError(f"{source} is none of: {kinds} (model_type is {config.get('model_type')!r}).")
    options = [f"--{name} {value}" for name, value in (("max-shard-size", max_shard_size),) if value != "5GB"]
    options += [f"--dtype {name}" for name, value in DTYPES.items() if value == dtype]
    options += [f"--{name}" for name, given in (("allow-nan", allow_nan), ("verify", verify)) if given]
    with new_folder(output) as folder:
        weights = Weights(source)
        rounded = dtype not in (None, weights.dtype)
        dtype = dtype or weights.dtype
        model, places = read_model(weights, family, config, dtype, allow_nan)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        architecture, parameters = type(model).__name__, model.num_parameters()
        # Read again from the disk below, and there is room for one copy.
        del model
        model = load(folder, dtype)
        compare(_pairs(weights, places, model.state_dict()), dtype)
        if verify:
            verify_logits(model, weights, family, config)
        del model
        text = model_card(
            family=family.name,
            kind=family.kind,
            architecture=architecture,
            source=source,
            is_hub_id=not os.path.isdir(source),
            parameters=parameters,
            dtype=str(dtype).removeprefix("torch."),
            rounded=rounded,
            licence=_licence(source),
            tokenizer=_add_tokenizer(folder, config["vocab_size"]),
            command=shlex.join(
                ["python", "conversion/convert_checkpoint.py", source, str(output), *" ".join(options).split()]
            ),
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
        return _finish(folder, output)


def convert_back(source: str, output: str | os.PathLike, dtype: torch.dtype | None = None) -> Path:
    """`convert` the other way: `output` gets `config.json` and `pytorch_model.bin` as the original code reads them."""
    model_type = read_config(source).get("model_type")
    if model_type != "based":
        raise ValueError(
            f"{source} is no Based checkpoint in transformers' layout, which --reverse starts from (model_type is "
            f"{model_type!r})."
        )
    with new_folder(output) as folder:
        stored = read_files(source)
        dtype = dtype or stored_dtype(stored.values())
        model = load(source, dtype, BasedForCausalLM)
        config, weights = model.config, model.state_dict()
        torch.save(state_dict_to_original(weights, config), folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(config_to_original(config), indent=2) + "\n", encoding="utf-8")
        written, _ = strip_names(read_files(str(folder)))
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        actual = state_dict_from_original(written, config, shapes, str(folder))
        compare(((name, tensor, actual.get(name)) for name, tensor in stored.items()), dtype)
        return _finish(folder, output)


def read_config(source: str) -> dict[str, Any]:
    """
    The content of the `config.json` of a folder or Hub repository.

    Raises:
        OSError: there is none. ValueError: it is no JSON object, or is damaged; the message names it.
    """
    path = find_file(source, CONFIG_NAME)
    if path is None:
        raise FileNotFoundError(f"{source} has no {CONFIG_NAME}")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("not a JSON object")
        if family := family_of(config):
            family.config(config, {})
    except (ValueError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from error
    return config


class Weights(Mapping):
    """
    The tensors of the weight files of a folder or Hub repository by name, without the `model.` prefix, read when asked
    for. What is no weight is named on stderr and left out.
    """

    # Pages of a mapped file count as memory until it is closed; this many bytes later it is opened anew.
    _OPEN_BYTES = 2**23

    def __init__(self, source: str):
        self.files, self.shapes, self._stored, self._path = {}, {}, {}, None
        dtypes, dropped = set(), []
        paths = find_weight_files(source)
        for path in tqdm(paths, desc="Reading files"):
            for stored, tensor in read_weights(path).items():
                weights, junk = strip_names({stored: tensor})
                dropped += junk
                for name in weights:
                    if name in self.files:
                        raise ValueError(f"{path} holds `{stored}`, which {self.files[name]} has already.")
                    if not tensor.is_floating_point():
                        raise ValueError(f"{path}: `{stored}` holds {tensor.dtype}, not numbers with a point.")
                    self.files[name], self.shapes[name], self._stored[name] = path, tensor.shape, stored
                    dtypes.add(tensor.dtype)
        if not self.files:
            raise ValueError(f"{', '.join(paths)}: no weights in it.")
        if dropped:
            print(f"{', '.join(paths)}: dropped {', '.join(sorted(dropped))}: no weights of the model", file=sys.stderr)
        self.source = paths[0] if len(paths) == 1 else source
        self.dtype = reduce(torch.promote_types, dtypes)

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self.files[name]
        # Old pickles cannot be mapped: they are in memory whole and stay there.
        mapped = path.endswith(".safetensors") or zipfile.is_zipfile(path)
        if path != self._path or (mapped and self._read > self._OPEN_BYTES):
            self._path, self._tensors, self._read = path, None, 0
            self._tensors = read_weights(path)
        tensor = self._tensors[self._stored[name]]
        self._read += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


# For each original tensor, where its rows go: (transformers tensor, first row, number of rows), in order.
Places = dict[str, list[tuple[str, int, int]]]


def read_model(
    weights: Weights, family: Family, config: Mapping[str, Any], dtype: torch.dtype, allow_nan: bool
) -> tuple[PreTrainedModel, Places]:
    """
    The transformers model with `weights` in `dtype`, good for saving only, and where each tensor went.

    Raises:
        ValueError: the weights are not what `config` asks for, or are not finite and not `allow_nan`.
    """
    new_config = family.config(config, weights.shapes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(new_config, dtype=dtype)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    table, found, head = dict(family.table(new_config)), dict(weights.shapes), "lm_head.weight"
    if new_config.tie_word_embeddings:
        # One weight: the model ties its head itself.
        del table[head]
        tied = found.pop(head, None) and family.embedding in found
        if tied and not _same_bits(weights[head], weights[family.embedding]):
            raise ValueError(
                f"{weights.files[head]}: `{head}` differs from the embedding although they are tied. If that is "
                "meant, set `tie_word_embeddings` to false in its config.json."
            )
    places = {original: _places(targets, shapes) for original, targets in table.items()}
    expected = {
        original: torch.Size((sum(rows for *_, rows in parts), *shapes[parts[0][0]][1:]))
        for original, parts in places.items()
    }
    check_shapes(found, expected, weights.source, family.kind, weights.files)
    state = {}
    for original, parts in tqdm(places.items(), desc="Reading tensors"):
        tensor = weights[original]
        if not allow_nan and not _is_finite(tensor):
            raise ValueError(
                f"{weights.files[original]}: `{original}` holds NaN or infinite numbers; --allow-nan converts them."
            )
        for name, start, rows, part in ((*place, part) for place, part in zip(parts, _split(tensor, parts))):
            if name not in state:
                state[name] = torch.empty(shapes[name], dtype=dtype)
            written = state[name][start : start + rows].copy_(part)
            if not allow_nan and not _is_finite(written):
                raise ValueError(f"{weights.files[original]}: `{original}` holds numbers too large for {dtype}.")
    # Not strict: the tied head.
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    # Rows that only pad the embedding are no tokens; the original cuts them off.
    if padding := list(range(config["vocab_size"], new_config.vocab_size)):
        model.generation_config.suppress_tokens = padding
    return model, places


def _places(targets: Iterable[str | Half], shapes: Mapping[str, torch.Size]) -> list[tuple[str, int, int]]:
    places = []
    for target in targets:
        if isinstance(target, Half):
            rows = shapes[target.name][0] // 2
            places.append((target.name, target.which * rows, rows))
        else:
            places.append((target, 0, shapes[target][0]))
    return places


def _split(tensor: torch.Tensor, places: list[tuple[str, int, int]]) -> tuple[torch.Tensor, ...]:
    return tensor.split([rows for *_, rows in places])


def _is_finite(tensor: torch.Tensor) -> bool:
    # The smallest and the largest number are NaN if any is, and need no temporary copy.
    return tensor.numel() == 0 or all(bound.isfinite() for bound in torch.aminmax(tensor))


def _pairs(
    weights: Weights, places: Places, state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    for original, parts in tqdm(places.items(), desc="Comparing tensors"):
        for (name, start, rows), part in zip(parts, _split(weights[original], parts)):
            yield name, part, state[name][start : start + rows] if name in state else None


def verify_logits(model: PreTrainedModel, weights: Weights, family: Family, config: Mapping[str, Any]) -> None:
    """
    Compares the logits of `model` in fp32 with the original formula on the original weights, rounded as the model's.

    Raises:
        RuntimeError: they differ by more than fp32 does.
    """
    ids = torch.randint(config["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(0))
    rounded = {name: weights[name].to(model.dtype) for name in weights}
    with torch.no_grad():
        expected = family.logits(config, rounded, ids)
        actual = model.float().eval()(ids, use_cache=False).logits
    difference = (expected - actual).abs().max().item()
    tolerance = LOGITS_TOLERANCE * max(1.0, expected.std().item() / 5)
    # Not `>`: NaN must fail.
    if not difference <= tolerance:
        raise RuntimeError(f"logits differ from the original formula by {difference:.2e}, more than {tolerance:.1e}")
    print(f"logits differ from the original formula by {difference:.1e} at most")


def _add_tokenizer(folder: Path, vocab_size: int) -> str:
    """Puts the tokenizer of GPT-2 into `folder` if it fits and can be reached; returns what to say about it."""
    if vocab_size != TOKENIZER_VOCABULARY:
        print(f"no tokenizer added: a vocabulary of {vocab_size} is not the one of {TOKENIZER}", file=sys.stderr)
        return "none"
    try:
        paths = [try_to_load_from_cache(TOKENIZER, name) for name in TOKENIZER_FILES]
        if not all(isinstance(path, str) for path in paths):
            # One request that gives up soon: downloads try for minutes to reach what cannot be reached.
            HfApi().model_info(TOKENIZER, timeout=5)
            paths = [hf_hub_download(TOKENIZER, name) for name in TOKENIZER_FILES]
        AutoTokenizer.from_pretrained(Path(paths[0]).parent).save_pretrained(folder)
    except Exception as error:
        # The weights are good without it, whatever kept it away.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"no tokenizer added: {TOKENIZER} cannot be reached ({reason})", file=sys.stderr)
        return f"`{TOKENIZER}`, not included"
    return f"`{TOKENIZER}`"


def _licence(source: str) -> str | None:
    try:
        path = find_file(source, "README.md")
        return licence_of(Path(path).read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None


def read_files(source: str) -> dict[str, torch.Tensor]:
    """All tensors of the weight files of a folder or Hub repository, as named there."""
    tensors = {}
    for path in tqdm(find_weight_files(source), desc="Reading files"):
        tensors.update(read_weights(path))
    return tensors


def stored_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The dtype that holds every one of `tensors` exactly."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in tensors})


def load(source: str | os.PathLike, dtype: torch.dtype, model_class: type = AutoModelForCausalLM) -> PreTrainedModel:
    """
    The model of a folder or Hub id in transformers' layout.

    Raises:
        ValueError: weights are missing, or belong to no such model; the message names them.
    """
    model, info = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{source} lacks {', '.join(sorted(info['missing_keys']))}")
    if info["unexpected_keys"]:
        unexpected = ", ".join(sorted(info["unexpected_keys"]))
        raise ValueError(f"{source} holds {unexpected}, which is no weight of {type(model).__name__}")
    return model


def compare(pairs: Iterable[tuple[str, torch.Tensor, torch.Tensor | None]], dtype: torch.dtype) -> None:
    """
    Checks of each (name, expected, actual) that they agree to the bit once the first is in `dtype`.

    Raises:
        RuntimeError: two do not; the message names them.
    """
    for name, expected, actual in pairs:
        if actual is None or actual.dtype != dtype or not _same_bits(actual, expected.to(dtype)):
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
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload converted checkpoint")


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    parser = argparse.ArgumentParser(
        description="Converts an original checkpoint of the Based paper to transformers, or a Based one back.",
        epilog="OUTPUT is written completely, compared with SOURCE and then put in place, or not at all.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of the checkpoint")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: as stored)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: 5GB)")
    parser.add_argument("--allow-nan", action="store_true", help="convert NaN and infinite weights too")
    parser.add_argument("--verify", action="store_true", help="also compare logits with the original formula")
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload OUTPUT to this Hub repository")
    parser.add_argument("--reverse", action="store_true", help="Based only: from transformers' layout to the original")
    args = parser.parse_args(arguments)
    options = {"max_shard_size": args.max_shard_size, "allow_nan": args.allow_nan, "verify": args.verify}
    if args.reverse and options != {"max_shard_size": "5GB", "allow_nan": False, "verify": False}:
        parser.error("--reverse takes none of --max-shard-size, --allow-nan, --verify")

    step = "convert"
    try:
        dtype = DTYPES.get(args.dtype)
        if args.reverse:
            folder = convert_back(args.source, args.output, dtype)
        else:
            folder = convert(args.source, args.output, dtype, **options)
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
