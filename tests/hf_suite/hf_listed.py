# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Why a test of transformers' own suite may skip, on Based or on Llama: pattern of its message -> what that means here.

Overridden in test_hf_suite.py: `test_attention_outputs` (only the sliding layers return maps) and
`test_num_layers_is_small` (three mixers need three layers).
"""

LISTED_SKIPS = {
    # What the machine lacks.
    r"requires (MPS|multiple accelerators|accelerator)": "no GPU in CI",
    r"requires Flash Attention": "no GPU in CI",
    r"requires deepspeed": "not installed",
    r"requires the kernels library": "not installed; our choice of kernels does not depend on it",
    r"requires torchao": "not installed",
    r"Need at least \d+ FSDP workers": "the suite starts two",
    r"test is slow": "run with RUN_SLOW=1",
    # What neither a Based nor a Llama model is or has.
    r"not a composite model|not composite|No subconfigs": "one model, one config",
    r"No sequence-to-sequence": "a decoder",
    r"no sparse experts|Not an MoE|output_router_logits|expert parallel plan|token-dispatch|grouped_mm": "no experts",
    r"position embeddings|partial rope|axial RoPE": "rotary over the whole head",
    r"No conversion found": "no checkpoint mapping is registered (DESIGN trap 7)",
    r"_keep_in_fp32_modules": "no weight is kept in fp32; the state is, whatever the model's dtype",
    r"Not a prioritized model": "transformers picks the models of that test",
    # Variants of a test that fit other models.
    r"does not support output_attentions": "the suite's stand-in for models without `has_attentions`",
    r"does not support sliding window mask": "a test for models with a switch for it",
    r"does not support SDPA": "a test for composite models",
}
