# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The configuration of a Based model. `BasedConfig()` is based-360m, `BasedConfig(**based_1b)` is based-1b."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .original_format import LARGEST_SIZE, MOST_LAYERS, config_from_original, is_original_config


LAYER_TYPES = ("conv", "linear_attention", "sliding_attention")


def _hybrid(num_layers: int, linear: tuple[int, ...]) -> list[str]:
    """Convolutions, with a linear attention at each index of `linear` and a sliding attention right after it."""
    types = dict.fromkeys(linear, "linear_attention") | {i + 1: "sliding_attention" for i in linear}
    return [types.get(i, "conv") for i in range(num_layers)]


based_1b: dict[str, Any] = {
    "hidden_size": 1792,
    "intermediate_size": 3584,
    "num_hidden_layers": 36,
    "layer_types": _hybrid(36, (1, 6, 11, 16, 21, 27, 33)),
}


@strict
class BasedConfig(PreTrainedConfig):
    r"""
    Configuration of [`BasedModel`] and its heads (arXiv 2402.18668). The defaults are those of based-360m
    (`hazyresearch/based-360m`); the keyword values of based-1b are in `transformers_based.based_1b`:

    ```python
    >>> from transformers_based import BasedConfig, based_1b

    >>> config = BasedConfig(**based_1b)
    >>> config.hidden_size, config.num_hidden_layers
    (1792, 36)
    ```

    Args:
        vocab_size (`int`, defaults to 50264): rows of the embedding, padding of the vocabulary included.
        unpadded_vocab_size (`int`, *optional*, defaults to `vocab_size`): rows past this one only pad the embedding; an
            original checkpoint is loaded so that `generate` never picks them.
        hidden_size (`int`, defaults to 1024): width of the residual stream.
        intermediate_size (`int`, defaults to 2048): width of the MLP.
        num_hidden_layers (`int`, defaults to 27): number of decoder layers.
        layer_types (`list[str]`, *optional*): the mixer of each layer, `"conv"`, `"linear_attention"` or
            `"sliding_attention"`. By default every fifth layer from 1 on is linear and the one after it sliding.
        num_attention_heads (`int`, defaults to 16): query heads of the sliding attention.
        num_key_value_heads (`int`, *optional*, defaults to `num_attention_heads`): its key and value heads.
        head_dim (`int`, *optional*, defaults to `hidden_size // num_attention_heads`): its head size.
        sliding_window (`int`, defaults to 65): keys that a query sees, its own included.
        rope_parameters (`dict`, *optional*, defaults to plain rotary with base 10000): of the sliding attention.
        linear_num_heads (`int`, defaults to 16): heads of the linear attention.
        linear_feature_dim (`int`, defaults to 16): size of its queries and keys before the feature map.
        linear_head_dim (`int`, *optional*, defaults to `hidden_size // linear_num_heads`): size of its values.
        linear_scale (`float`, *optional*, defaults to `linear_feature_dim ** -0.5`): factor on its scores.
        conv_kernel_size (`int`, defaults to 3): width of the short convolution.
        conv_intermediate_size (`int`, *optional*, defaults to `2 * hidden_size`): its channels.
        conv_bias (`bool`, defaults to `True`): biases on the projections around it.
        hidden_act (`str`, defaults to `"silu"`): activation of the MLP's gate.
        rms_norm_eps (`float`, defaults to 1e-5): epsilon of the RMS norms.
        residual_in_fp32 (`bool`, defaults to `True`): keep the residual stream in fp32.
        initializer_range (`float`, *optional*, defaults to `sqrt(2 / (5 * hidden_size))`): standard deviation of the
            initial weights; projections back into the residual stream get a further `1 / sqrt(2 * num_hidden_layers)`.
        max_position_embeddings (`int`, defaults to 2048): training length. Not a limit.
        tie_word_embeddings, use_cache, bos_token_id, eos_token_id, pad_token_id: as everywhere in transformers.
    """

    model_type = "based"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 10000.0
    # Heads are shared out, and the MLP's columns. The short convolutions run whole on every rank, only the weights
    # around them are shared out: `in_proj` holds u above g, so that plain column slices would give the first ranks all
    # of u, and transformers' packed slices cut its bias in the plain way.
    base_model_tp_plan = {
        "layers.*.conv.in_proj": "colwise_gather_output",
        "layers.*.conv.out_proj": "colwise_gather_output",
        "layers.*.linear_attn.q_proj": "colwise",
        "layers.*.linear_attn.k_proj": "colwise",
        "layers.*.linear_attn.v_proj": "colwise",
        "layers.*.linear_attn.o_proj": "rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 50264
    unpadded_vocab_size: int | None = None
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 27
    layer_types: list[str] | None = None
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int = 65
    rope_parameters: dict | None = None
    linear_num_heads: int = 16
    linear_feature_dim: int = 16
    linear_head_dim: int | None = None
    linear_scale: float | None = None
    conv_kernel_size: int = 3
    conv_intermediate_size: int | None = None
    conv_bias: bool = True
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    initializer_range: float | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self._check_positive("hidden_size", "num_attention_heads", "linear_num_heads", "linear_feature_dim")
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"`num_hidden_layers` must be at most {MOST_LAYERS}; got {self.num_hidden_layers}.")
        if self.layer_types is None:
            linear = tuple(range(1, self.num_hidden_layers - 1, 5))
            self.layer_types = _hybrid(self.num_hidden_layers, linear)
        # Before transformers renames old layer types of other models to ours.
        self.validate_layer_type()
        if self.unpadded_vocab_size is None:
            self.unpadded_vocab_size = self.vocab_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.linear_head_dim is None:
            self.linear_head_dim = self.hidden_size // self.linear_num_heads
        if self.linear_scale is None:
            self.linear_scale = self.linear_feature_dim**-0.5
        if self.conv_intermediate_size is None:
            self.conv_intermediate_size = 2 * self.hidden_size
        if self.initializer_range is None:
            self.initializer_range = (2 / (5 * self.hidden_size)) ** 0.5
        super().__post_init__(**kwargs)

    def validate_layer_type(self):
        # An own check, not the inherited one: transformers 5.17 rewrites "conv" to "linear_attention" there.
        if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES)):
            raise ValueError(f"Unknown `layer_types` {unknown}: a Based layer is one of {list(LAYER_TYPES)}.")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` names {len(self.layer_types)} layers, `num_hidden_layers` is {self.num_hidden_layers}."
            )

    def validate_sizes(self):
        self._check_positive(
            "vocab_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_key_value_heads",
            "head_dim",
            "sliding_window",
            "linear_head_dim",
            "linear_scale",
            "conv_kernel_size",
            "conv_intermediate_size",
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(f"`rope_parameters`: unknown rope_type {rope_type!r}.")
        if "sliding_attention" in self.layer_types and self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even for the rotary embedding; got {self.head_dim}.")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) <= LARGEST_SIZE:
                least = "positive" if not getattr(self, name) > 0 else f"at most {LARGEST_SIZE}"
                raise ValueError(f"`{name}` must be {least}; got {getattr(self, name)}.")

    def check_parallel_plan(self, tp_size: int, pp_size: int, tp_plan: Any) -> None:
        """Raises `ValueError` if a model of this config cannot be cut up like this; asked before weights are read."""
        if pp_size > 1:
            raise ValueError(
                f"`pp_size` is {pp_size}: a Based model cannot be cut into pipeline stages, since a cache that has "
                "only some layers does not know its length. Use `tp_size` or `fsdp_size`."
            )
        if tp_size == 1:
            return
        replicated = self._check_styles(tp_plan) if isinstance(tp_plan, dict) else set()
        heads = {
            ("linear_attention", "linear_attn"): ("linear_num_heads",),
            ("sliding_attention", "self_attn"): ("num_attention_heads", "num_key_value_heads"),
        }
        for (layer_type, module), names in heads.items():
            for name in names if layer_type in self.layer_types and module not in replicated else ():
                if getattr(self, name) % tp_size:
                    raise ValueError(
                        f"`{name}` is {getattr(self, name)}, which `tp_size` {tp_size} does not divide: ranks share "
                        "whole heads."
                    )

    def _check_styles(self, tp_plan: dict[str, str]) -> set[str]:
        """
        Raises `ValueError` for styles that would fail later, or be silently wrong, as "sequence_parallel" is for the
        gradients of a norm. Returns the attentions and MLPs that the plan replicates.
        """
        automatic: dict[str, dict[str, str]] = {}
        for name, style in self.base_model_tp_plan.items():
            # transformers 5.17 adds the embedding to it.
            if name != "embed_tokens":
                module, projection = name.split(".")[-2:]
                automatic.setdefault(module, {})[projection] = style
        plans: dict[str, dict[str, str]] = {}
        for name, style in tp_plan.items():
            owner, _, layer = name.rpartition(".")
            module = owner.rpartition(".")[2]
            styles = []
            if layer in automatic.get(module, {}):
                styles = [automatic[module][layer]]
                plans.setdefault(owner, {})[layer] = style
            elif layer == "embed_tokens":
                styles = ["embedding_rowwise"]
            elif layer in ("lm_head", "score", "qa_outputs"):
                styles = ["colwise_gather_output"]
            # What gathers, or cuts, for itself leaves the convolution whole; anything else would mix up u and g.
            also = ["rowwise_split_input"] if module == "conv" and styles else []
            if style not in (*styles, *also, "replicate"):
                use = f"Use {styles[0]!r}, or leave it out." if styles else "Leave it out: ranks do not share it."
                raise ValueError(f"`tp_plan` has {style!r} for {name}. {use}")
        replicated = set()
        for owner, plan in plans.items():
            module = owner.rpartition(".")[2]
            whole = {projection for projection, style in plan.items() if style == "replicate"}
            # transformers 5.17 replicates what a plan leaves out, 5.23 takes the automatic style: neither would fit.
            if module != "conv" and (plan.keys() != automatic[module].keys() or whole not in (set(), plan.keys())):
                raise ValueError(
                    f"`tp_plan` must cut, or replicate, all of {', '.join(automatic[module])} of {owner}, or name none "
                    f"of them; got {plan}."
                )
            if whole == plan.keys():
                replicated.add(module)
        return replicated

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Also reads the `config.json` of the original checkpoints; raises `ValueError` for that of another model."""
        if is_original_config(config_dict):
            config_dict = config_from_original(config_dict)
        elif config_dict.get("model_type", "based") != cls.model_type or {"n_embd", "d_model"} & config_dict.keys():
            raise ValueError(
                f"This is not the config of a Based model: model_type is {config_dict.get('model_type')!r} and there "
                "are no `alt_mixer` layers. Load it with the class of that model, or AutoModelForCausalLM."
            )
        for name, wanted in (("id2label", dict), ("label2id", dict), ("dtype", str), ("torch_dtype", str)):
            if not isinstance(config_dict.get(name), wanted | type(None) | torch.dtype):
                raise ValueError(f"`{name}` must be a {wanted.__name__}; got {config_dict[name]!r}.")
        return super().from_dict(config_dict, **kwargs)


__all__ = ["BasedConfig", "based_1b"]
