# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The one place that picks fused Triton kernels or plain PyTorch; `TRANSFORMERS_BASED_BACKEND` overrides the choice."""

import functools
import os

import torch
from transformers.utils import logging


try:
    import based_kernels
except ImportError:
    based_kernels = None


# Below "transformers", so that its verbosity settings apply.
logger = logging.get_logger(f"transformers.{__name__}")

BACKEND_VARIABLE = "TRANSFORMERS_BASED_BACKEND"

# Triton's interpreter takes seconds for what PyTorch does at once; of all kernels but the one for Taylor attention of
# many tokens, only the tests use it.
INTERPRETS_ALL = False

_logged = set()


def backend_wanted() -> str:
    """'auto', 'torch' or 'triton', as the environment says."""
    wanted = os.environ.get(BACKEND_VARIABLE, "auto")
    if wanted not in ("auto", "torch", "triton"):
        raise ValueError(f"{BACKEND_VARIABLE} must be auto, torch or triton; got {wanted!r}.")
    return wanted


def can_fuse(x: torch.Tensor) -> bool:
    """Whether kernels other than that of Taylor attention may be taken for `x`, if Triton is chosen."""
    return x.device.type == "cuda" or INTERPRETS_ALL


def choose_backend(op: str, device: str, dtype: str, obstacle: str | None = None) -> str:
    """
    'triton' or 'torch' for `op` on tensors of this kind; the choice is logged once, with the reason.

    Args:
        op: its name, for the log.
        obstacle: why the kernel of this op cannot take these tensors, if so; what holds for all kernels is added.

    Raises:
        ValueError: an unknown backend is asked for.
        RuntimeError: Triton is asked for and cannot run these tensors.
    """
    wanted = backend_wanted()
    obstacle = _obstacle_to_triton(device, dtype) or obstacle
    if wanted == "auto" and not obstacle and device != "cuda":
        obstacle = f"Triton's interpreter on {device} is for tests"
    if wanted == "triton" and obstacle:
        raise RuntimeError(f"{BACKEND_VARIABLE}=triton, but {obstacle}. Set it to auto or torch.")
    choice = "torch" if wanted == "torch" or obstacle else "triton"
    reason = f"{BACKEND_VARIABLE}={wanted}" if wanted != "auto" else obstacle or "fused kernels are installed"
    if (op, choice, reason) not in _logged:
        _logged.add((op, choice, reason))
        log = logger.warning if choice == "torch" and device == "cuda" and wanted == "auto" else logger.info
        log(f"{op} runs in {'plain PyTorch' if choice == 'torch' else 'Triton'}: {reason}.")
    return choice


def _obstacle_to_triton(device: str, dtype: str) -> str | None:
    if based_kernels is None:
        return "the package `based_kernels` is not installed"
    if not based_kernels.is_available():
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}"
    if device == "cuda" and (obstacle := _obstacle_of_gpu()):
        return obstacle
    if dtype not in ("torch.float32", "torch.float16", "torch.bfloat16"):
        return f"the kernels do not take {dtype}"
    return None


# Asked for every op of every layer; the driver takes its time to answer.
@functools.cache
def _obstacle_of_gpu() -> str | None:
    if torch.cuda.is_available():
        if torch.version.hip is not None:
            return "the kernels have never run on an AMD GPU"
        if torch.cuda.get_device_capability() < (8, 0):
            return "the kernels need a GPU of compute capability 8.0 or more"
    return None
