"""Sharding the frozen base over devices (PyTorch's FSDP2): each holds a part and gathers the rest when it is needed.

Only the base is sharded: it is nearly all of the memory. What trains (adapters, heads, their gradients and optimizer)
lies whole on every process, and its gradients are summed by `lrlhf.distributed`, as without sharding. So checkpoints,
clipping and optimizers are those of one device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers.modeling_layers import GradientCheckpointingLayer

from lrlhf.config import Gather, LoRA, Quantization
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

    # Whatever is saved lies whole on every process, so nothing needs gathering: as under DDP.
    restore_checkpoint_after_setup = ParallelStrategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = ParallelStrategy.lightning_restore_optimizer
    lightning_module_state_dict = ParallelStrategy.lightning_module_state_dict
    load_model_state_dict = ParallelStrategy.load_model_state_dict
    optimizer_state = ParallelStrategy.optimizer_state
    load_optimizer_state_dict = ParallelStrategy.load_optimizer_state_dict
    save_checkpoint = ParallelStrategy.save_checkpoint
    load_checkpoint = ParallelStrategy.load_checkpoint


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
    if isinstance(strategy, FSDP2Strategy) and lora is None:
        raise UserError("FSDP shards the frozen base, and with model.lora: null nothing is frozen; use ddp.")


def shard(backbone: Backbone, mesh: DeviceMesh, gather: Gather) -> None:
    """Keep this process's part of the base alone: of every layer, and of the rest (embeddings, norm, LM head).

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
    whole = {p for name, p in backbone.named_parameters() if "lora_" in name or name.startswith("heads.")}
    make_shardable(backbone.model)
    layers = [m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(backbone, mesh=mesh, ignored_params=whole)
    for method in ("encode", "scores", "prefill", "next_token_logits", "plain_logits", "drift_of_base"):
        register_fsdp_forward_method(backbone, method)
    backbone.gather, backbone.synchronised = gather, True


@contextmanager
def gathered(backbone: Backbone, *, always: bool = False) -> Iterator[None]:
    """Gather the sharded base once and hold it until the block ends: passes inside then need no collective.

    Does nothing for a base that is not sharded, or, unless `always`, with `gather: layer`.

    Args:
        backbone: sharded or not.
        always: also with `gather: layer`.
    """
    if not backbone.synchronised or (backbone.gather == "layer" and not always):
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
