# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The marks that transformers' tests carry, so that `--strict-markers` knows them."""

import os
import re
from pathlib import Path


def pytest_configure(config):
    if "HF_SDIST" not in os.environ:
        return
    sdist = Path(os.environ["HF_SDIST"])
    sources = [*sdist.glob("tests/test_*.py"), sdist / "src" / "transformers" / "testing_utils.py"]
    names = {name for path in sources for name in re.findall(r"\bmark\.(\w+)", path.read_text(encoding="utf-8"))}
    for name in names - {"parametrize"}:
        config.addinivalue_line("markers", f"{name}: from transformers' own tests")
