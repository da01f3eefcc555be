# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""
Runs a program with accelerate's FSDP on CPUs. accelerate has it for accelerators only, though it works on gloo as well.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml tests/fsdp_on_cpu.py PROGRAM ARGUMENTS
"""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def switch_on(state: AcceleratorState, plugin: FullyShardedDataParallelPlugin) -> None:
    """What `state` does for itself where there is an accelerator."""
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def main() -> None:
    init = AcceleratorState.__init__

    def init_and_switch_on(self, *args, **kwargs):
        is_new = not AcceleratorState._shared_state
        init(self, *args, **kwargs)
        if is_new:
            # Its settings come from the environment, where `accelerate launch` puts them.
            switch_on(self, FullyShardedDataParallelPlugin())

    AcceleratorState.__init__ = init_and_switch_on
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
