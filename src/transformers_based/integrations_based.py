# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What other libraries keep in tables by model type, for "based": entered when they are imported, never imported here.

    peft           the default `target_modules` of LoRA and its kin: every projection of every mixer and MLP
    liger_kernel   what `TrainingArguments(use_liger_kernel=True)` does to a model: the fused linear cross-entropy

Both are slow to import, and this file goes along with a pushed model, where an `import` would make them requirements.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from types import MethodType, ModuleType

import torch
from torch import nn
from transformers.utils import can_return_tuple

from .loss_based import check_labels, check_vocabulary


# The depthwise taps of the convolution are left out: three weights a channel have no low rank.
LORA_TARGETS = [
    *("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
]
LORA_METHODS = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA")


def register_peft_targets(constants: ModuleType) -> None:
    """So that `get_peft_model(model, LoraConfig())` needs no `target_modules`."""
    for method in LORA_METHODS:
        getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING").setdefault("based", LORA_TARGETS)


def register_liger(monkey_patch: ModuleType) -> None:
    """So that Liger knows how to patch a Based model."""
    monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.setdefault("based", apply_liger_kernel_to_based)


def apply_liger_kernel_to_based(fused_linear_cross_entropy: bool = True, model: nn.Module | None = None) -> None:
    """
    Makes `model`, a `BasedForCausalLM`, compute its training loss without ever holding the logits `[B, T, vocabulary]`.

    The other kernels of Liger are left out: the norm and the rotary embedding here keep fp32 where Liger's do not.

    Raises:
        ValueError: no model, which Liger would patch as a class.
    """
    if model is None:
        raise ValueError("Liger patches a Based model that exists: pass `model`, or use `use_liger_kernel` of Trainer.")
    if fused_linear_cross_entropy and isinstance(getattr(model, "lm_head", None), nn.Module):
        model.forward = MethodType(_forward_with_fused_loss, model)


@can_return_tuple
def _forward_with_fused_loss(
    self,
    input_ids: torch.LongTensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    past_key_values=None,
    inputs_embeds: torch.FloatTensor | None = None,
    labels: torch.LongTensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    shift_labels: torch.LongTensor | None = None,
    skip_logits: bool | None = None,
    seq_idx: torch.Tensor | None = None,
    **kwargs,
):
    """
    `BasedForCausalLM.forward`; in training (or with `skip_logits`) the loss comes without logits. Like that one it
    names `seq_idx`: Trainer drops the columns of a dataset that the forward does not name.
    """
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
        "seq_idx": seq_idx,
    }
    has_labels = labels is not None or shift_labels is not None
    if skip_logits and not has_labels:
        raise ValueError("`skip_logits` needs `labels` or `shift_labels`.")
    skip_logits = self.training and has_labels if skip_logits is None else skip_logits
    if not skip_logits or not _is_plain_product(self.lm_head):
        if shift_labels is not None:
            kwargs["shift_labels"] = shift_labels.contiguous()
        return type(self).forward(self, **inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)

    if self.lm_head.weight.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Liger's kernels do not run on a CPU: train there without `use_liger_kernel`.")
    liger = import_module("liger_kernel.transformers.model.llama")
    outputs = self.model(**inputs, **kwargs)
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    hidden_states = outputs.last_hidden_state[:, kept].contiguous()
    check_labels(hidden_states.shape[:2], labels=labels, shift_labels=shift_labels)
    # Liger reads whatever lies beyond the logits.
    asked = labels[:, 1:] if shift_labels is None else shift_labels
    check_vocabulary(asked, self.config.vocab_size, kwargs.get("ignore_index", -100))
    result = liger.lce_maybe_trainable_lm_head(
        self,
        hidden_states=hidden_states,
        hidden_size=self.config.hidden_size,
        labels=labels,
        shift_labels=None if shift_labels is None else shift_labels.contiguous(),
        **kwargs,
    )
    loss, _, token_accuracy, predicted_tokens = liger.unpack_cross_entropy_result(result)
    return liger.LigerCausalLMOutputWithPast(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        token_accuracy=token_accuracy,
        predicted_tokens=predicted_tokens,
    )


def _is_plain_product(lm_head: nn.Module) -> bool:
    """Liger reads `lm_head.weight` alone: an adapter on the head would be left out, a sharded one read in part."""
    return hasattr(lm_head, "weight") and not hasattr(lm_head, "lora_A") and type(lm_head.weight) is nn.Parameter


class _WhenImported(MetaPathFinder):
    """Calls `actions[name](module)` right after the module `name` is executed, for modules not imported yet."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]):
        self.actions = actions
        self.is_asking = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.actions or self.is_asking:
            return None
        self.is_asking = True
        try:
            specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self.is_asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                # Loaders of archives serve several modules.
                if module.__name__ == fullname:
                    self.actions[fullname](module)

            spec.loader.exec_module = execute_and_register
        return spec


def register_integrations() -> None:
    """Called when the model's code is imported, here or as remote code."""
    actions = {
        "peft.utils.constants": register_peft_targets,
        "liger_kernel.transformers.monkey_patch": register_liger,
    }
    for name, register in actions.items():
        if name in sys.modules:
            register(sys.modules[name])
    sys.meta_path.insert(0, _WhenImported(actions))
