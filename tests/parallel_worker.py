# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What test_parallel.py has two processes do: each check trains five steps in fp64 and writes down what came out.

    torchrun --nproc-per-node 2 tests/parallel_worker.py FOLDER

FOLDER/base holds the model. Each rank writes FOLDER/<check>.<rank>.pt, and most checks a checkpoint, FOLDER/<check>.
"""

import copy
import sys
import traceback
from pathlib import Path

import accelerate_on_cpu
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from programs import load_program
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from transformers_based import BasedConfig, BasedForCausalLM


STEPS, ROWS, LENGTH = 5, 4, 21
sequence_parallel = load_program("examples/sequence_parallel.py")
pad = load_program("examples/finetune.py").pad


def batches() -> torch.Tensor:
    """`[steps, rows, tokens]`."""
    return torch.randint(96, (STEPS, ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def document() -> torch.Tensor:
    """Longer than a chunk of linear attention, and of no round length."""
    return torch.randint(96, (1, 347), generator=torch.Generator().manual_seed(2))


def make_optimizer(model) -> torch.optim.Optimizer:
    # Not Adam, whose steps are the same whatever the gradients are multiplied with.
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, optimizer, rows=slice(None), backward=torch.Tensor.backward) -> list[float]:
    """Five steps, each on `rows` of its batch; the losses."""
    model.train()
    losses = []
    for ids in batches():
        optimizer.zero_grad()
        # Not the model's own loss, which is computed in fp32.
        logits = model(input_ids=ids[rows]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[rows, 1:].flatten())
        backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def train_by_trainer(model, rows_each: int, folder: Path) -> None:
    """Five of its steps on rows of 3 to 21 tokens, `rows_each` for every process, in their order."""
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    quiet = {"save_strategy": "no", "eval_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=rows_each,
        train_sampling_strategy="sequential",
        use_cpu=True,
        **options,
        **quiet,
    )
    rows = batches().flatten(0, 1).tolist()
    rows = [{"input_ids": row[: 3 + 18 * i % 19]} for i, row in enumerate(rows)]
    Trainer(model=model, args=arguments, data_collator=pad, train_dataset=rows).train()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(model) -> dict[str, torch.Tensor]:
    return {name: whole(x) for name, x in model.named_parameters()}


def mean_over_ranks(losses: list[float]) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def own_rows() -> slice:
    share = ROWS // dist.get_world_size()
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64, **options)


def new_accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def ddp(folder: Path) -> dict:
    accelerator = new_accelerator()
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    model = load(folder)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    losses = mean_over_ranks(train(model, optimizer, own_rows(), accelerator.backward))
    model = accelerator.unwrap_model(model)
    model.save_pretrained(folder / "ddp", is_main_process=accelerator.is_main_process)
    return {"losses": losses, "weights": weights(model)}


def trainer(folder: Path) -> dict:
    model = load(folder)
    train_by_trainer(model, ROWS // dist.get_world_size(), folder)
    return {"processes": AcceleratorState().num_processes, "weights": weights(model)}


def fsdp2_of_accelerate(folder: Path) -> dict:
    accelerator = new_accelerator()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerate_on_cpu.switch_on_fsdp(accelerator.state, plugin)
    model = load(folder)
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    placements = {name: x.placements for name, x in model.named_parameters() if isinstance(x, DTensor)}
    losses = mean_over_ranks(train(model, optimizer, own_rows(), accelerator.backward))
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder / "fsdp2_of_accelerate", state_dict=state_dict)
    return {"losses": losses, "weights": weights(model), "sharded": sorted(placements)}


def fsdp2(folder: Path) -> dict:
    model = load(folder, distributed_config=DistributedConfig(fsdp_size=2))
    optimizer = make_optimizer(model)
    sharded = [name for name, x in model.named_parameters() if isinstance(x, DTensor)]
    losses = mean_over_ranks(train(model, optimizer, own_rows()))
    model.save_pretrained(folder / "fsdp2")
    return {"losses": losses, "weights": weights(model), "sharded": sharded}


def zero3(folder: Path) -> dict:
    try:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    except ImportError as error:
        return {"missing": str(error)}
    options = {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # By default DeepSpeed clips gradients to a norm of 1.
        "gradient_clipping": 0.0,
    }
    # While it is there, `from_pretrained` leaves each process its share of every weight.
    held = HfDeepSpeedConfig(options)
    model = load(folder).float()
    sharded = [name for name, x in model.named_parameters() if x.numel() < x.ds_numel]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make_optimizer(model), config=options, dist_init_required=False
    )

    def backward(loss):
        engine.backward(loss)
        engine.step()

    class Nothing:
        """The engine steps, and zeroes its gradients, for itself."""

        zero_grad = step = staticmethod(lambda: None)

    losses = mean_over_ranks(train(engine, Nothing, own_rows(), backward))
    state_dict = engine._zero3_consolidated_16bit_state_dict()
    del held
    unset_hf_deepspeed_config()
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "zero3", state_dict=state_dict)
    state_dict = {name: x for name, x in (state_dict or {}).items() if name != "lm_head.weight"}
    return {"losses": losses, "weights": state_dict, "sharded": sharded}


def tensor_parallel(folder: Path) -> dict:
    model = load(folder, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))
    optimizer = make_optimizer(model)
    placements = {name: str(x.placements[0]) for name, x in model.named_parameters() if isinstance(x, DTensor)}
    losses = train(model, optimizer)
    model.save_pretrained(folder / "tensor_parallel")
    ids = batches()[0]
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        logits = whole(model.eval()(ids).logits)
    generated = model.generate(ids, **options)
    everywhere = [torch.empty_like(generated) for _ in range(2)]
    dist.all_gather(everywhere, generated)
    return {
        "losses": losses,
        "weights": weights(model),
        "sharded": placements,
        "logits": logits,
        "generated": everywhere,
    }


def replicated(folder: Path) -> dict:
    """A sliding attention whose heads cannot be shared out, left whole."""
    if "replicate" not in ALL_PARALLEL_STYLES:
        return {"not_here": "this transformers has no style `replicate`"}
    values = load(folder).config.to_dict() | {"num_key_value_heads": 1}
    alone = BasedForCausalLM(BasedConfig.from_dict(values)).double()
    for x in alone.parameters():
        dist.broadcast(x.data, 0)
    alone.save_pretrained(folder / "replicated", is_main_process=dist.get_rank() == 0)
    dist.barrier()
    plan = {f"model.layers.*.self_attn.{x}_proj": "replicate" for x in "qkvo"}
    config = DistributedConfig(tp_size=2, tp_plan=plan)
    model = BasedForCausalLM.from_pretrained(folder / "replicated", dtype=torch.float64, distributed_config=config)
    results = {"sharded": [name for name, x in model.named_parameters() if isinstance(x, DTensor)]}
    ids = batches()[0]
    for prefix, x in (("", model), ("expected_", alone)):
        logits = x.train()(ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        results[prefix + "logits"] = whole(logits)
        results[prefix + "gradients"] = {name: whole(p.grad) for name, p in x.named_parameters()}
        results[prefix + "generated"] = x.eval().generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
    return results


def original_checkpoint(folder: Path) -> dict:
    """The reference checkpoint, in its original layout, read by two ranks: how far from what the original computes."""
    path = Path(__file__).parent / "reference" / "based-tiny"
    golden, found = load_file(path / "golden.safetensors"), {}
    for engine in ("tp_size", "fsdp_size"):
        model = BasedForCausalLM.from_pretrained(path, distributed_config={engine: 2}).eval()
        with torch.no_grad():
            logits = whole(model(golden["input_ids"]).logits)[..., : golden["logits"].shape[-1]]
        found[engine] = float((logits - golden["logits"]).abs().max())
    return found


def sequence(folder: Path) -> dict:
    model = load(folder).train()
    ids, results = document(), {}
    for dtype in (torch.float64, torch.float32):
        model = copy.deepcopy(model).to(dtype)
        model.zero_grad()
        loss = sequence_parallel.loss_of(model, ids)
        loss.backward()
        sequence_parallel.sum_gradients(model)
        dist.all_reduce(loss.detach_())
        gradients = {name: x.grad.clone() for name, x in model.named_parameters()}
        results[str(dtype)] = {"loss": loss.item(), "gradients": gradients}
    part = sequence_parallel.part_of(ids.shape[1], model.config)
    with torch.no_grad():
        cache = sequence_parallel.sequence_parallel_cache(model, part)
        results["logits"] = model.eval()(ids[:, part], past_key_values=cache).logits
    model.train().gradient_checkpointing_enable()
    return {
        **results,
        "short": message(lambda: sequence_parallel.part_of(9, model.config)),
        "checkpointing": message(lambda: sequence_parallel.sequence_parallel_cache(model, part)),
    }


def message(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def refusals(folder: Path) -> dict:
    def loading(**options):
        return message(lambda: load(folder, distributed_config=DistributedConfig(**options)))

    values = load(folder).config.to_dict() | {"linear_num_heads": 3, "linear_head_dim": 8}
    odd = folder / "odd"
    BasedForCausalLM(BasedConfig.from_dict(values)).save_pretrained(odd)
    dist.barrier()
    return {
        "pipeline": loading(pp_size=2),
        "packed": loading(tp_size=2, tp_plan={"model.layers.*.conv.in_proj": "packed_colwise"}),
        "style": loading(tp_size=2, tp_plan={"model.layers.*.mlp.up_proj": "sideways"}),
        "heads": message(lambda: BasedForCausalLM.from_pretrained(odd, distributed_config={"tp_size": 2})),
    }


CHECKS = (
    ddp,
    trainer,
    fsdp2_of_accelerate,
    fsdp2,
    tensor_parallel,
    replicated,
    original_checkpoint,
    sequence,
    refusals,
    zero3,
)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    for check in CHECKS:
        try:
            results = check(folder)
        except Exception:
            results = {"error": traceback.format_exc()}
        torch.save(results, folder / f"{check.__name__}.{dist.get_rank()}.pt")
        dist.barrier()
    # As its last: it leaves the group of processes that it finds.
    sequence_parallel.main(["--tokens", "555", "--steps", "2", "--verify"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
