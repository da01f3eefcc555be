# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""
The tests of transformers' own suite that skip, on Based as on Llama: a reason, and patterns of the names it holds for.
These skip, as a whole or in a subtest, and no other does.

Overridden in test_hf_suite.py: `test_attention_outputs` (only the sliding layers return maps) and
`test_num_layers_is_small` (three mixers need three layers).
"""

import os
from fnmatch import fnmatchcase

import torch
from transformers.integrations import is_deepspeed_available
from transformers.utils import is_kernels_available, is_torchao_available


GPUS = torch.cuda.device_count()

# What the machine may lack: (whether it does, tests).
LACKED_HERE = {
    "needs a GPU": (
        GPUS == 0,
        """
        test_can_load_with_device_context_manager test_can_load_with_global_device_set test_cpu_offload
        test_disk_offload_bin test_disk_offload_safetensors test_flex_attention_with_grads test_sdpa_can_compile_dynamic
        test_sdpa_can_dispatch_on_flash
        """,
    ),
    "needs several GPUs": (GPUS < 2, "test_model_parallelism"),
    "needs a GPU and the library kernels": (
        GPUS == 0 or not is_kernels_available(),
        "test_kernels_can_load_without_crashing",
    ),
    "needs RUN_SLOW=1, a GPU, and every version of flash attention": (
        "RUN_SLOW" not in os.environ,
        "test_flash_attn_*",
    ),
    "needs deepspeed": (not is_deepspeed_available(), "test_resize_*_with_deepspeed*"),
    "needs torchao": (not is_torchao_available(), "test_tp_generation_quantized"),
}

# What neither model is or has.
LISTED = {
    "only for models with a training class of their own": "test_torch_compile_for_training",
    "needs four ranks; the suite starts two": """
        test_hsdp_grad_accumulation_vs_single_device_0_replicate_and_shard test_hsdp_save_load test_hsdp_save_load_dcp
    """,
    "one model, one config": """
        test_attn_implementation_composite_models test_can_set_attention_dynamically_composite_model
        test_internal_model_config_and_subconfig_are_same test_*_can_dispatch_composite_models
    """,
    "a decoder": "test_encoder_decoder_loss_no_double_shift",
    "no experts": """
        test_eager_matches_batched_and_grouped_inference_* test_moe_* test_output_router_logits_from_config test_ep_*
        test_fsdp2_expert_parallel_* test_hsdp_grad_accumulation_vs_single_device_2_expert_parallel
    """,
    "rotary over the whole head": """
        test_resize_position_vector_embeddings test_model_rope_with_partial_rotation test_vision_axial_rope
    """,
    "no checkpoint mapping is registered (DESIGN trap 7)": """
        test_can_load_from_already_mapped_keys test_reverse_loading_mapping
    """,
    "no weight is kept in fp32; the state is, whatever the model's dtype": "test_keep_in_fp32_modules*",
    "only for models with a switch `use_sliding_window`": "test_sliding_window_mask",
    "sdpa returns no attention maps": "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions",
}

# What Llama skips besides.
LISTED_FOR_LLAMA = {"transformers picks the models of that test": "test_can_init_all_missing_weights"}


def must_skip(suite: str, name: str) -> bool:
    lists = [*LISTED.values(), *(tests for is_lacked, tests in LACKED_HERE.values() if is_lacked)]
    if suite == "LlamaSuite":
        lists += LISTED_FOR_LLAMA.values()
    return any(fnmatchcase(name, pattern) for tests in lists for pattern in tests.split())
