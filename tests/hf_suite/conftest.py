# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The marks that transformers' tests carry, so that `--strict-markers` knows them."""


def pytest_configure(config):
    for name in (
        "slow",
        "accelerate_tests",
        "torch_compile_test",
        "generate",
        *(f"flash_attn{v}_test" for v in ("", "_3", "_4")),
    ):
        config.addinivalue_line("markers", f"{name}: from transformers' own tests")
