"""Sharding models over devices (PyTorch's FSDP2): each holds a part and gathers the rest when it is needed.

With LoRA only the frozen base is sharded: it is nearly all of the memory. Adapters and heads, their gradients and
optimizer lie whole on every process, and their gradients are summed by `lrlhf.distributed`, as without sharding.

Without LoRA the models that train are sharded too, with their gradients and optimizer, and FSDP sums their gradients.
A checkpoint is gathered into one whole file all the same, so that runs move between any numbers of processes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from transformers.modeling_layers import GradientCheckpointingLayer

from lrlhf.config import Gather, LoRA, Quantization
from lrlhf.distributed import whole
from lrlhf.errors import UserError
from lrlhf.model.backbone import Backbone
from lrlhf.model.quantization import make_shardable


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy over all devices as one data-parallel group; `fsdp2` or `fsdp2_by_layer` for short.

    Args:
        gather: when passes without gradient (sampling, scoring, validation) get the parts of the base that a device
            does not hold. `rollout`: once, and keep them to the end of the rollout: fast, and every device holds the
            whole base meanwhile. `layer`: each layer whenever it runs: no device ever holds more than a layer and the
            embeddings, and every token of a response costs as many collectives as there are layers.
        timeout: of every collective; a process that is alone for longer stops with an error.
    """

    def __init__(self, gather: Gather = "rollout", timeout: timedelta = default_pg_timeout):
        super().__init__(save_distributed_checkpoint=False, timeout=timeout)
        self.gather = gather

    def setup_environment(self) -> None:
        """Lightning's "auto" would make the devices of a node a tensor-parallel group."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    # A checkpoint is one whole file, as under DDP; what trains and is sharded is gathered for it, tensor by tensor.
    restore_checkpoint_after_setup = ParallelStrategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = ParallelStrategy.lightning_restore_optimizer
    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """With the parameters that train whole, in the first process; the others are in no checkpoint."""
        module: Any = self.lightning_module
        trained = module.trained()
        state = ParallelStrategy.lightning_module_state_dict(self)
        return {name: whole(value) if name in trained else value for name, value in state.items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its part."""
        module: Any = self.lightning_module
        trained = module.trained()
        state = {name: _part(value, trained.get(name)) for name, value in checkpoint["state_dict"].items()}
        ParallelStrategy.load_model_state_dict(self, {**checkpoint, "state_dict": state}, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole, in the first process."""
        return tree_map(whole, ParallelStrategy.optimizer_state(self, optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its part."""
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                i: {name: _part(value, parameters[i]) for name, value in values.items()}
                for i, values in saved["state"].items()
            }
            states.append({**saved, "state": moments})
        ParallelStrategy.load_optimizer_state_dict(self, {**checkpoint, "optimizer_states": states})


def _part(value: Any, like: Tensor | None) -> Any:
    """This process's part of a tensor that lies like a parameter; anything else as it is."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


StrategyRegistry.register("fsdp2", FSDP2Strategy, "FSDP2, gathering once a rollout", gather="rollout")
StrategyRegistry.register("fsdp2_by_layer", FSDP2Strategy, "FSDP2, gathering layer by layer", gather="layer")


def check_strategy(strategy: Strategy, lora: LoRA | None, quantize: Quantization | None) -> None:
    """Refuse a strategy under which a stage would train wrongly.

    Args:
        strategy: of the trainer.
        lora: of the module; None trains full models.
        quantize: of the module.

    Raises:
        UserError: naming another.
    """
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy):
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} wraps the whole module, which trains wrongly with manual "
            "optimization; use ddp or fsdp2."
        )
    if isinstance(strategy, FSDP2Strategy) and quantize is not None and quantize.kind == "int8":
        raise UserError(
            "FSDP does not shard a base in int8, whose layers keep scales beside their weights; set "
            "model.quantize.kind: nf4, or trainer.strategy: ddp, where each device holds the base whole."
        )


def shard(backbone: Backbone, mesh: DeviceMesh, gather: Gather) -> None:
    """Keep this process's part of the models alone: of every layer, and of the rest (embeddings, norm, LM head).

    Args:
        backbone: with its roles.
        mesh: of the devices that share the base.
        gather: when passes without gradient gather it.

    Raises:
        UserError: a base whose rows run by equal length, in as many passes as there are lengths in a process's rows.
    """
    if backbone.by_length:
        raise UserError(
            "FSDP needs equally many passes in all processes, and the rows of this base run by equal length: it "
            "carries a state along the sequence. Set trainer.strategy: ddp."
        )
    unsharded = {p for name, p in backbone.named_parameters() if "lora_" in name or name.startswith("heads.")}
    make_shardable(backbone.model)
    layers = [m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=unsharded)
    fully_shard(backbone, mesh=mesh, ignored_params=unsharded)
    for method in (
        "encode",
        "encode_padded",
        "scores",
        "prefill",
        "next_token_logits",
        "plain_logits",
        "drift_of_base",
    ):
        register_fsdp_forward_method(backbone, method)
    for module in backbone.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by counts over all processes
            module.set_force_sum_reduction_for_comms(True)
    backbone.gather, backbone.synchronised, backbone.sharded = gather, True, True


@contextmanager
def gathered(backbone: Backbone) -> Iterator[None]:
    """Gather the sharded base once and hold it until the block ends: passes inside then need no collective.

    Does nothing for a base that is not sharded, or with `gather: layer`.

    Args:
        backbone: sharded or not.
    """
    if not backbone.synchronised or backbone.gather == "layer":
        yield
        return
    sharded = [module for module in backbone.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    backbone.synchronised = False
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not backbone, recurse=False)
            module.reshard()
        backbone.synchronised = True
