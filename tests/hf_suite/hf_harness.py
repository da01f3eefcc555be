# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""
Makes transformers' own test mixins importable, and runs them on a model that is not part of transformers.

The mixins are not in the installed library but in its source distribution, unpacked at $HF_SDIST. `install` presents
its `tests` folder as the package `hf_tests`, with stand-ins for the few modules that the distribution lacks. Nothing is
written there. The class decorator `checks_skips` lets no test skip that is not listed.
"""

import multiprocessing
import os
import pickle
import re
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from hf_listed import must_skip
from transformers.models.auto import modeling_auto


# transformers starts a process for some tests, for the memory of a GPU. Without one they skip in there, seconds later.
if not torch.cuda.is_available():
    os.environ["_INSIDE_SUB_PROCESS"] = "1"


def install() -> None:
    """Raises: RuntimeError if $HF_SDIST is not the source distribution of the installed transformers."""
    if "hf_tests" in sys.modules:
        return
    sdist = Path(os.environ["HF_SDIST"]).resolve()
    if not (sdist / "tests" / "test_modeling_common.py").is_file():
        raise RuntimeError(f"HF_SDIST={sdist} has no tests/test_modeling_common.py: it is no unpacked sdist.")
    version = re.search(r"^Version: (\S+)$", (sdist / "PKG-INFO").read_text(), re.MULTILINE).group(1)
    if version != transformers.__version__:
        raise RuntimeError(f"HF_SDIST={sdist} is transformers {version}; {transformers.__version__} is installed.")
    _add_module("hf_tests", path=[str(sdist / "tests")])
    for package in ("exporters", "generation", "utils"):
        _add_module(f"hf_tests.{package}", path=[])
    # The first two are asked only whether a test class inherits them.
    _add_module("hf_tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _add_module("hf_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _add_module("hf_tests.utils.test_configuration_utils", config_common_kwargs=COMMON_CONFIG_VALUES)
    _add_module("hf_tests.distributed_testing_utils", **DISTRIBUTED_HELPERS)


def _add_module(name: str, path: list[str] | None = None, **contents) -> None:
    module = types.ModuleType(name)
    if path is not None:
        module.__path__ = path
    vars(module).update(contents)
    sys.modules[name] = module


# Values that differ from every default, for the test that configs take them.
COMMON_CONFIG_VALUES = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["BertModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


def mixins() -> tuple[type, ...]:
    install()
    from hf_tests.test_modeling_common import ModelTesterMixin
    from hf_tests.test_training_mixin import TrainingTesterMixin

    return ModelTesterMixin, sys.modules["hf_tests.generation.test_utils"].GenerationTesterMixin, TrainingTesterMixin


def distributed_mixins() -> tuple[type, ...]:
    """Tensor parallelism and FSDP2, on two gloo ranks."""
    install()
    from hf_tests import test_fsdp_mixin, test_tensor_parallel_mixin

    test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
    test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
    for module in (test_fsdp_mixin, test_tensor_parallel_mixin):
        if hasattr(module, "mp"):  # 5.17 starts its ranks itself
            module.mp = types.SimpleNamespace(spawn=_start_ranks)
    return test_tensor_parallel_mixin.TensorParallelTesterMixin, test_fsdp_mixin.FSDPTesterMixin


def _start_ranks(fn, args=(), nprocs=2, join=True):
    # A forkserver imports torch and transformers once, not once for each rank.
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "torch.distributed.fsdp", "transformers_based"])
    torch.multiprocessing.start_processes(
        _rank, args=(pickle.dumps((fn, args)),), nprocs=nprocs, join=join, start_method="forkserver"
    )


def _rank(rank: int, work: bytes) -> None:
    install()  # `work` names functions in it
    torch.set_num_threads(1)
    fn, args = pickle.loads(work)
    fn(rank, *args)


def _run_distributed(world_size: int):
    def decorate(function):
        def run(*args, **kwargs):
            store = dist.TCPStore("localhost", 0, world_size=None, is_master=True, wait_for_workers=False)
            _start_ranks(_in_process_group, (function, world_size, store.host, store.port, args, kwargs), world_size)

        return run

    return decorate


def _in_process_group(rank: int, function, world_size: int, host: str, port: int, args, kwargs) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, rank, world_size, host, port))))
    store = dist.TCPStore(host, port, world_size=None, is_master=False, wait_for_workers=False)
    dist.init_process_group(_backend(), store=store, rank=rank, world_size=world_size)
    function(rank, *args, **kwargs)
    # Not after a failure: it would wait for ranks that are gone; their end is seen by `_start_ranks`.
    dist.destroy_process_group()


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _rank_device(rank: int) -> torch.device:
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)


DISTRIBUTED_HELPERS = {
    "_get_distributed_device_type": _device_type,
    "_get_distributed_backend": _backend,
    "_get_rank_device": _rank_device,
    "_set_rank_device": _set_rank_device,
    "_start_rank_processes": _start_ranks,
    "run_distributed": _run_distributed,
}


AUTO_MAPPINGS = {
    "base_model_class": "MODEL_MAPPING_NAMES",
    "causal_lm_class": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence_classification_class": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token_classification_class": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question_answering_class": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


class DecoderTester:
    """What the mixins ask of a `model_tester`: a tiny config and inputs for it. Subclasses name the classes."""

    config_class = base_model_class = causal_lm_class = None
    sequence_classification_class = token_classification_class = question_answering_class = None
    config_values: dict = {}
    is_training = True
    batch_size, seq_length = 13, 7
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.key_length = self.encoder_seq_length = self.seq_length

    @classmethod
    def model_classes(cls) -> tuple[type, ...]:
        return tuple(getattr(cls, role) for role in AUTO_MAPPINGS)

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        return self.model_classes()

    @classmethod
    def register(cls) -> None:
        """The mixins make labels only for classes named in the mappings of the Auto classes."""
        for role, mapping in AUTO_MAPPINGS.items():
            getattr(modeling_auto, mapping)[cls.config_class.model_type] = getattr(cls, role).__name__

    def get_config(self):
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        names += ("pad_token_id", "bos_token_id", "eos_token_id")
        return self.config_class(**{name: getattr(self, name) for name in names}, **self.config_values)

    def prepare_config_and_inputs_for_common(self):
        first = max(self.pad_token_id, self.bos_token_id, self.eos_token_id) + 1
        input_ids = torch.randint(first, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def checks_skips(suite: type[unittest.TestCase]) -> type[unittest.TestCase]:
    """Class decorator: a test skips, as a whole or in a subtest, if and only if hf_listed.py says so; else it fails."""
    suite.skipTest = _skip_and_tell
    for name in unittest.defaultTestLoader.getTestCaseNames(suite):
        setattr(suite, name, _checked(name, getattr(suite, name), must_skip(suite.__name__, name)))
    return suite


def _skip_and_tell(self, reason: str):
    # `subTest` swallows the exception.
    self.skip = unittest.SkipTest(reason)
    raise self.skip


def _checked(name: str, test, is_listed: bool):
    # No functools.wraps: it would copy the marks by which pytest skips before the test is called.
    def run(self):
        self.skip = raised = None
        try:
            test(self)
        except (unittest.SkipTest, pytest.skip.Exception) as error:
            self.skip = raised = error
        if self.skip is None and is_listed:
            raise AssertionError(f"{name} is listed in hf_listed.py and does not skip: take it out there.")
        if self.skip is not None and not is_listed:
            raise AssertionError(f"{name} skips and is not listed in hf_listed.py: {self.skip}")
        if raised is not None:
            raise raised

    run.__name__, run.__doc__ = name, test.__doc__
    return run
