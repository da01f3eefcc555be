# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Names and layout of the original Based checkpoints (github.com/HazyResearch/based, `based/models/gpt.py`), both ways.

An original checkpoint is a `config.json` (a GPT2Config with extra fields) and a `pytorch_model.bin` (or
`model.safetensors`). `_MODEL`, `_LAYER` and `_MIXERS` are the one table: an original tensor and the transformers ones
stacked in it along dim 0.
"""

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME


_MODEL = {
    "transformer.embeddings.word_embeddings.weight": ("model.embed_tokens.weight",),
    "transformer.ln_f.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
_LAYER = {
    "norm1.weight": ("input_layernorm.weight",),
    "norm2.weight": ("post_attention_layernorm.weight",),
    "mlp.fc1.weight": ("mlp.up_proj.weight", "mlp.gate_proj.weight"),
    "mlp.fc2.weight": ("mlp.down_proj.weight",),
}
_MIXERS = {
    "conv": {
        "mixer.in_proj.weight": ("conv.in_proj.weight",),
        "mixer.in_proj.bias": ("conv.in_proj.bias",),
        "mixer.conv.conv.weight": ("conv.conv.weight",),
        "mixer.out_proj.weight": ("conv.out_proj.weight",),
        "mixer.out_proj.bias": ("conv.out_proj.bias",),
    },
    "linear_attention": {
        "mixer.proj_q.weight": ("linear_attn.q_proj.weight",),
        "mixer.proj_k.weight": ("linear_attn.k_proj.weight",),
        "mixer.proj_v.weight": ("linear_attn.v_proj.weight",),
        "mixer.out_proj.weight": ("linear_attn.o_proj.weight",),
    },
    "sliding_attention": {
        "mixer.Wqkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "mixer.out_proj.weight": ("self_attn.o_proj.weight",),
    },
}
# The released files carry this prefix on every key.
_PREFIX = "model."
# Counters of the training loop, and a buffer (`fixed_decay`) that the released code never reads.
_NOT_WEIGHTS = re.compile(r"metrics|^transformer\.decay\.decay$")

_MIXER_CLASSES = {"mixer": "BaseConv", "alt_mixer": "LinearAttention", "alt_mixer_2": "SlidingAttention"}
# What every released config says and this model takes for granted.
_TAKEN_FOR_GRANTED = {
    "activation_function": "swiglu",
    "rms_norm": True,
    "rotary_emb_fraction": 1,
    "rotary_emb_interleaved": False,
    "scale_attn_by_inverse_layer_idx": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
}
# Every number that is read, by the options it stands in: the least it may be, None for any.
_NUMBERS = {
    (): {
        **dict.fromkeys(("n_embd", "n_layer", "n_head", "n_inner", "n_positions", "vocab_size"), 1),
        "pad_vocab_size_multiple": 1,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    ("mixer",): {"kernel_size": 1, "expand_proj": 1},
    ("alt_mixer",): {"feature_dim": 1, "num_heads": 1},
    ("alt_mixer", "feature_map"): {"input_dim": 1},
    ("alt_mixer_2",): {"num_heads": 1, "window_size": 0},
}
# A file that asks for more is damaged: it would only fill the memory.
MOST_LAYERS, LARGEST_SIZE = 4096, 2**31 - 1


def is_original_config(config: Mapping[str, Any]) -> bool:
    """Whether this is the `config.json` of an original Based checkpoint; raises `ValueError` where it is no object."""
    if not isinstance(config, Mapping):
        raise ValueError(f"The content of a config.json must be an object, not {str(config)[:100]!r}.")
    return config.get("model_type") != "based" and any(config.get(name) for name in _MIXER_CLASSES)


def config_from_original(config: Mapping[str, Any], shapes: Mapping[str, torch.Size] | None = None) -> dict[str, Any]:
    """
    The `BasedConfig` keyword values of an original `config.json`.

    Args:
        config: its content.
        shapes: shapes of the original tensors by name, without prefix. They overrule the config, which rounds the MLP
            width and the vocabulary up only when the model is built.

    Raises:
        ValueError: the config asks for something that no released checkpoint has; the message names the field.
    """
    if missing := [name for name in ("n_embd", "n_layer", "n_head", "vocab_size") if name not in config]:
        raise ValueError(f"Original config: lacks {_some(missing)}.")
    _check_fields(config)
    for name, expected in _TAKEN_FOR_GRANTED.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"Original config: `{name}` is {config[name]!r}, only {expected!r} is supported.")
    for name, expected in _MIXER_CLASSES.items():
        target = (config.get(name) or {}).get("_target_") or expected
        if target.rsplit(".", 1)[-1] != expected:
            raise ValueError(f"Original config: `{name}` is a {target}, only {expected} is supported.")
    linear, sliding, conv = (config.get(name) or {} for name in ("alt_mixer", "alt_mixer_2", "mixer"))
    feature_map = linear.get("feature_map") or {}
    if (feature_map.get("_target_") or "TaylorExp").rsplit(".", 1)[-1] != "TaylorExp":
        raise ValueError(f"Original config: feature map {feature_map['_target_']}, only TaylorExp is supported.")

    hidden_size, num_layers = config["n_embd"], config["n_layer"]
    layer_types = [
        "sliding_attention"
        if i in (config.get("alt_mixer_2_layers") or ())
        else "linear_attention"
        if i in (config.get("alt_mixer_layers") or ())
        else "conv"
        for i in range(num_layers)
    ]

    multiple = config.get("pad_vocab_size_multiple", 1)
    intermediate_size = math.ceil((config.get("n_inner") or 4 * hidden_size) / 256) * 256
    feature_dim = linear.get("feature_dim", 16)
    special_tokens = {
        name: config.get(name, 50256) if config.get(name, 50256) < config["vocab_size"] else None
        for name in ("bos_token_id", "eos_token_id")
    }
    values = {
        "vocab_size": math.ceil(config["vocab_size"] / multiple) * multiple,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "layer_types": layer_types,
        "num_attention_heads": sliding.get("num_heads", config["n_head"]),
        # W // 2 keys to the left; transformers counts the query's own key too.
        "sliding_window": sliding.get("window_size", 128) // 2 + 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.get("rotary_emb_base", 10000.0))},
        "linear_num_heads": linear.get("num_heads", config["n_head"]),
        "linear_feature_dim": feature_dim,
        "linear_scale": float(feature_map.get("input_dim", feature_dim)) ** -0.5,
        "conv_kernel_size": conv.get("kernel_size", 3),
        "conv_intermediate_size": hidden_size * conv.get("expand_proj", 4) // 2,
        "conv_bias": conv.get("use_bias", True),
        "rms_norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "residual_in_fp32": config.get("residual_in_fp32", False),
        "max_position_embeddings": config.get("n_positions", 2048),
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        "unpadded_vocab_size": config["vocab_size"],
        **special_tokens,
    }
    return values if shapes is None else values | _sizes_from_shapes(shapes, values)


def _check_fields(config: Mapping[str, Any]) -> None:
    """Types and ranges of what `config_from_original` reads."""

    def fail(name, value, wanted):
        raise ValueError(f"Original config: `{name}` must be {wanted}, not {str(value)[:100]!r}.")

    for path, numbers in _NUMBERS.items():
        options = config
        for name in path:
            options = options.get(name) or {}
            if not isinstance(options, Mapping):
                fail(name, options, "the options of a mixer")
        if not isinstance(options.get("_target_") or "", str):
            fail(".".join((*path, "_target_")), options["_target_"], "a name")
        for name, least in numbers.items():
            value = options.get(name, 1)
            largest = MOST_LAYERS if name == "n_layer" else LARGEST_SIZE
            if name == "n_inner" and value is None:
                continue
            if type(value) is not int or not -LARGEST_SIZE <= value <= largest or value < (least or value):
                fail(".".join((*path, name)), value, "a number" if least is None else f"from {least} to {largest}")
    for name in ("layer_norm_epsilon", "rotary_emb_base"):
        value = config.get(name, 1)
        if type(value) not in (int, float) or not 0 < value <= LARGEST_SIZE:
            fail(name, value, "a positive number")
    for name in ("alt_mixer_layers", "alt_mixer_2_layers"):
        value = config.get(name) or []
        if not isinstance(value, list | tuple) or not all(type(layer) is int for layer in value):
            fail(name, value, "a list of layers")


def _sizes_from_shapes(shapes: Mapping[str, torch.Size], values: dict[str, Any]) -> dict[str, int]:
    sizes = {}
    if shape := shapes.get("transformer.embeddings.word_embeddings.weight"):
        sizes["vocab_size"] = shape[0]
        if values["unpadded_vocab_size"] > shape[0]:
            raise ValueError(
                f"Original config: `vocab_size` is {values['unpadded_vocab_size']}, the embedding has {shape[0]} rows."
            )
    for i, layer_type in enumerate(values["layer_types"]):
        layer = f"transformer.layers.{i}."
        if shape := shapes.get(layer + "mlp.fc2.weight"):
            sizes["intermediate_size"] = shape[1]
        if layer_type == "conv" and (shape := shapes.get(layer + "mixer.conv.conv.weight")):
            sizes["conv_intermediate_size"], sizes["conv_kernel_size"] = shape[0], shape[2]
            sizes["conv_bias"] = layer + "mixer.in_proj.bias" in shapes
        if layer_type == "linear_attention" and (shape := shapes.get(layer + "mixer.proj_v.weight")):
            sizes["linear_head_dim"] = shape[0] // values["linear_num_heads"]
    return sizes


def config_to_original(config) -> dict[str, Any]:
    """The `config.json` that the original code reads for a `BasedConfig`; `config_from_original` gives it back."""
    hidden_size, vocab_size = config.hidden_size, config.unpadded_vocab_size
    not_original = {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": hidden_size // config.num_attention_heads,
        "linear_head_dim": hidden_size // config.linear_num_heads,
        "hidden_act": "silu",
    }
    for name, expected in not_original.items():
        if getattr(config, name) != expected:
            raise ValueError(f"The original code has no `{name}` of {getattr(config, name)}, only {expected}.")
    if config.intermediate_size % 256:
        raise ValueError(
            f"The original code rounds the MLP width up to a multiple of 256; `intermediate_size` is "
            f"{config.intermediate_size}."
        )
    mixers = "based.models.mixers"
    return {
        "_target_": "based.models.gpt.GPT2MixerConfig",
        "vocab_size": vocab_size,
        "n_embd": hidden_size,
        "n_head": config.num_attention_heads,
        "n_layer": config.num_hidden_layers,
        "n_positions": config.max_position_embeddings,
        "n_inner": config.intermediate_size,
        "special_initializer": True,
        "residual_in_fp32": config.residual_in_fp32,
        "max_position_embeddings": 0,
        "pad_vocab_size_multiple": config.vocab_size if vocab_size != config.vocab_size else 1,
        "layer_norm_epsilon": config.rms_norm_eps,
        "rotary_emb_base": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": vocab_size if config.bos_token_id is None else config.bos_token_id,
        "eos_token_id": vocab_size if config.eos_token_id is None else config.eos_token_id,
        "attn_pdrop": 0,
        "embd_pdrop": 0,
        "resid_pdrop": 0,
        "use_flash_attn": True,
        "fused_mlp": False,
        "fused_bias_fc": False,
        "fused_dropout_add_ln": True,
        **_TAKEN_FOR_GRANTED,
        "alt_mixer_layers": [i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"],
        "alt_mixer_2_layers": [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"],
        "mixer": {
            "_target_": f"{mixers}.convolution.BaseConv",
            "l_max": config.max_position_embeddings,
            "use_bias": config.conv_bias,
            "expand_proj": 2 * config.conv_intermediate_size // hidden_size,
            "kernel_size": config.conv_kernel_size,
        },
        "alt_mixer": {
            "_target_": f"{mixers}.linear_attention.LinearAttention",
            "l_max": config.max_position_embeddings,
            "feature_map": {
                "_target_": f"{mixers}.linear_attention.TaylorExp",
                "input_dim": round(config.linear_scale**-2),
            },
            "feature_dim": config.linear_feature_dim,
            "num_heads": config.linear_num_heads,
        },
        "alt_mixer_2": {
            "_target_": f"{mixers}.slide_attention.SlidingAttention",
            "window_size": 2 * (config.sliding_window - 1),
            "num_heads": config.num_attention_heads,
            "causal": True,
        },
    }


def generation_config_values(config) -> dict[str, Any]:
    """What `generate` needs to know: rows that only pad the embedding are no tokens (the original cuts them off)."""
    padding = list(range(config.unpadded_vocab_size, config.vocab_size))
    return {"suppress_tokens": padding} if padding else {}


def name_table(config) -> dict[str, tuple[str, ...]]:
    """The whole table for one model: original name -> transformers names stacked in it."""
    table = dict(_MODEL)
    for i, layer_type in enumerate(config.layer_types):
        for original, names in (_LAYER | _MIXERS[layer_type]).items():
            if original.endswith("bias") and not config.conv_bias:
                continue
            table[f"transformer.layers.{i}.{original}"] = tuple(f"model.layers.{i}.{name}" for name in names)
    return table


def strip_names(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights without the `model.` prefix, and the names of what is no weight at all."""
    weights, dropped = {}, []
    for name, tensor in state_dict.items():
        stripped = name.removeprefix(_PREFIX)
        if _NOT_WEIGHTS.search(stripped):
            dropped.append(name)
        else:
            weights[stripped] = tensor
    return weights, dropped


def state_dict_from_original(
    weights: Mapping[str, torch.Tensor], config, shapes: Mapping[str, torch.Size], source: str
) -> dict[str, torch.Tensor]:
    """
    Transformers names for original ones (without prefix), values untouched. `shapes` are those of the transformers
    weights that `config` asks for; `source` is named in errors.

    Raises:
        ValueError: a tensor is missing, is in no table or has the wrong shape.
    """
    table, converted = name_table(config), {}
    if config.tie_word_embeddings:
        # One weight: the model ties its head itself.
        table.pop("lm_head.weight")
        weights, embedding = dict(weights), "transformer.embeddings.word_embeddings.weight"
        head = weights.pop("lm_head.weight", None)
        if head is not None and embedding in weights and not torch.equal(head, weights[embedding]):
            raise ValueError(
                f"{source}: `lm_head.weight` differs from the embedding although they are tied. If that is meant, set "
                "`tie_word_embeddings` to false in its config.json."
            )
    expected = {
        original: torch.Size((sum(shapes[name][0] for name in names), *shapes[names[0]][1:]))
        for original, names in table.items()
    }
    check_shapes({name: tensor.shape for name, tensor in weights.items()}, expected, source)
    for original, names in table.items():
        converted.update(zip(names, weights[original].split([shapes[name][0] for name in names])))
    return converted


def check_shapes(
    shapes: Mapping[str, torch.Size],
    expected: Mapping[str, torch.Size],
    source: str,
    kind: str = "Based checkpoint",
    files: Mapping[str, str] | None = None,
) -> None:
    """
    Checks the `shapes` of original tensors against those that a config asks for. Messages name the file of a tensor
    where `files` has it, else `source`.

    Raises:
        ValueError: a tensor is missing, not `expected`, or has another shape.
    """
    files = files or {}
    if missing := [name for name in expected if name not in shapes]:
        raise ValueError(
            f"{source} lacks {_some(missing)}, which every {kind} has; the file is incomplete, or its config.json is "
            "another's."
        )
    if unknown := [name for name in shapes if name not in expected]:
        raise ValueError(f"{files.get(unknown[0], source)} holds {_some(unknown)}, which no {kind} has.")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{files.get(name, source)}: `{name}` has shape {tuple(shapes[name])}, its config.json asks for "
                f"{tuple(shape)}."
            )


def state_dict_to_original(weights: Mapping[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Original names (with the prefix of the released files) for transformers ones, values untouched."""
    if config.tie_word_embeddings:
        weights = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    return {
        _PREFIX + original: torch.cat([weights[name] for name in names])
        for original, names in name_table(config).items()
    }


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def find_file(source: str | os.PathLike, name: str, **hub_kwargs) -> str | None:
    """
    Local path of a file of a folder or Hub repository, downloaded when needed; None if it has none of that name.

    Raises:
        OSError: the Hub, or the repository on it, cannot be reached.
    """
    source, subfolder = os.path.expanduser(source), hub_kwargs.get("subfolder", "")
    if os.path.isdir(source):
        path = os.path.join(source, subfolder, name)
        return path if os.path.isfile(path) else None
    hub_kwargs = {key: value for key, value in hub_kwargs.items() if key != "proxies"}
    try:
        return hf_hub_download(source, name, **hub_kwargs)
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE or hub_kwargs.get("local_files_only"):
            return None
        raise
    except EntryNotFoundError:
        return None
    except ValueError as error:
        raise OSError(f"{source} is no folder, and not the id of a Hub repository: {error}") from error
    except OSError:
        raise
    except Exception as error:
        # The errors of the Hub client's HTTP library, which differs between versions.
        raise OSError(f"{source}: {name} cannot be downloaded: {error}") from error


def find_weight_files(source: str | os.PathLike, **hub_kwargs) -> list[str]:
    """
    Local paths of the weight files of a folder or Hub repository (downloaded when needed), safetensors preferred.

    Raises:
        OSError: there is none.
        ValueError: an index file is damaged, or names a shard outside of its folder.
    """
    for name, index_name in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if path := find_file(source, name, **hub_kwargs):
            return [path]
        if index := find_file(source, index_name, **hub_kwargs):
            return [_find_shard(source, index, shard, hub_kwargs) for shard in _shards(index)]
    raise OSError(f"{source} has no weights: none of {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME} or their index files.")


def _shards(index: str) -> list[str]:
    try:
        with open(index, encoding="utf-8") as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
        unsafe = [shard for shard in shards if os.path.basename(shard) != shard or shard in ("", ".", "..")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weight files: {type(error).__name__} {error}") from error
    if unsafe:
        raise ValueError(f"{index} names shards outside of its folder: {_some(unsafe)}.")
    if not shards:
        raise ValueError(f"{index} names no weight file.")
    return shards


def _find_shard(source: str | os.PathLike, index: str, shard: str, hub_kwargs: dict[str, Any]) -> str:
    path = find_file(source, shard, **hub_kwargs)
    if path is None:
        raise OSError(f"{source} has no {shard}, which {index} names.")
    # The cache of the Hub client is made of links too, into the folder of the repository they are in.
    folder = os.path.realpath(os.path.dirname(index))
    cache, _, _ = folder.rpartition(f"{os.sep}snapshots{os.sep}")
    target = os.path.dirname(os.path.realpath(path))
    if target != folder and not (cache and target == os.path.join(cache, "blobs")):
        raise ValueError(
            f"{index} names shards outside of its folder: `{shard}` is a link to {os.path.realpath(path)}."
        )
    return path


# What the readers of weights raise for a damaged file.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError)


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    The tensors of one `.safetensors` or `.bin` file, memory-mapped where the format allows. Pickles are read with
    `weights_only=True`: they cannot run code.

    Raises:
        ValueError: the file is truncated, not a checkpoint, or a pickle that wants to run code; the message names it.
    """
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no plain file of tensors (it may hold code), so it is not read: {error}"
        ) from error
    except (*UNREADABLE, RuntimeError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} cannot be read; truncated, or not a checkpoint: {error}") from error
    if not isinstance(state_dict, dict) or not all(isinstance(x, torch.Tensor) for x in state_dict.values()):
        raise ValueError(f"{path} holds something other than named tensors.")
    return state_dict
