# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""
Runs a program with accelerate's FSDP or DeepSpeed on CPUs, where accelerate takes plain data parallelism in their place
although both work there.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml tests/accelerate_on_cpu.py PROGRAM ARGUMENTS
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin


def switch_on_fsdp(state: AcceleratorState, plugin: FullyShardedDataParallelPlugin) -> None:
    """What `state` does for itself where there is an accelerator."""
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin


def switch_on_deepspeed(state: AcceleratorState, plugin: DeepSpeedPlugin) -> None:
    """Likewise."""
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    state.deepspeed_plugins = plugin
    plugin.set_mixed_precision("no")
    plugin.select(_from_accelerator_state=True)


def main() -> None:
    init = AcceleratorState.__init__

    def init_and_switch_on(self, *args, deepspeed_plugin=None, **kwargs):
        is_new = not AcceleratorState._shared_state
        init(self, *args, deepspeed_plugin=deepspeed_plugin, **kwargs)
        if is_new and deepspeed_plugin is not None:
            switch_on_deepspeed(self, deepspeed_plugin)
        elif is_new:
            # Its settings come from the environment, where `accelerate launch` puts them.
            switch_on_fsdp(self, FullyShardedDataParallelPlugin())

    AcceleratorState.__init__ = init_and_switch_on
    del sys.argv[0]
    # As Python does for a program: it imports what lies beside it.
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
