"""A base that is sharded over one process: all of it in DTensors, and the numbers of the whole base.

What two processes do with it is in tests/integration/test_distributed.py.
"""

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import StrategyRegistry
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lrlhf import FSDP2Strategy, LoRA, UserError
from lrlhf.model.backbone import Backbone
from lrlhf.model.sharding import gathered, shard
from lrlhf.types import Sequences


def made(base: str) -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(base, lora=LoRA(r=2)).eval()
    backbone.add_role("policy", ("policy",), trainable=True)
    backbone.add_role("critic", ("critic",), trainable=True, head="random")
    for parameter in backbone.trainable():
        torch.nn.init.normal_(parameter, std=0.1)
    return backbone


def text() -> Sequences:
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Sequences(ids[:, :4], mask[:, :4], ids[:, 4:], mask[:, 4:])


def states(backbone: Backbone) -> torch.Tensor:
    with torch.no_grad(), backbone.role("policy"):
        return backbone.encode(text())


def sharded_names(backbone: Backbone) -> set[str]:
    return {name for name, p in backbone.named_parameters() if isinstance(p, DTensor)}


def of_layers(backbone: Backbone) -> set[str]:
    """The sharded ones that a pass gives up; FSDP2 keeps embeddings and norm after a pass."""
    return {name for name in sharded_names(backbone) if ".layers." in name}


@pytest.fixture(scope="module")
def mesh():
    """One process that is a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# The strategy


@pytest.mark.parametrize(("name", "gather"), [("fsdp2", "rollout"), ("fsdp2_by_layer", "layer")])
def test_a_short_name_is_the_strategy_with_its_gather(name, gather):
    strategy = StrategyRegistry.get(name)
    assert type(strategy) is FSDP2Strategy
    assert strategy.gather == gather
    of_a_trainer = L.Trainer(accelerator="cpu", devices=1, strategy=name, logger=False).strategy
    assert (type(of_a_trainer), of_a_trainer.gather) == (FSDP2Strategy, gather)


# Sharding


def test_a_base_whose_rows_run_by_equal_length_is_refused(tiny_llama):
    backbone = made(tiny_llama)
    backbone.by_length = True
    with pytest.raises(UserError, match=r"carries a state along the sequence\. Set trainer\.strategy: ddp"):
        shard(backbone, None, "rollout")
    assert not backbone.synchronised


def test_the_base_is_sharded_and_what_trains_lies_whole(tiny_llama, mesh):
    backbone = made(tiny_llama)
    trained = {name for name, _ in backbone.named_parameters() if "lora_" in name or name.startswith("heads.")}
    assert len(trained) == 2 * 2 * 8 + 1, "A and B of two adapters on q, k, v, o of two layers, and a head without bias"
    shard(backbone, mesh, "rollout")
    assert sharded_names(backbone) == {name for name, _ in backbone.named_parameters()} - trained
    assert (backbone.gather, backbone.synchronised) == ("rollout", True)


@pytest.mark.parametrize("gather", ["rollout", "layer"])
def test_states_values_and_gradients_are_those_of_the_whole_base(tiny_llama, mesh, gather):
    def measure(backbone: Backbone) -> list[torch.Tensor]:
        with backbone.role("critic"), backbone.training_pass(dropout=False):
            values = backbone.values(backbone.encode(text()))
            values.square().sum().backward()
        return [states(backbone), values.detach(), *(p.grad for p in backbone.trainable("critic"))]

    whole, sharded = made(tiny_llama), made(tiny_llama)
    shard(sharded, mesh, gather)
    for mine, expected in zip(measure(sharded), measure(whole), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)


# Saving


def test_a_full_model_is_gathered_tensor_by_tensor_to_be_saved(tiny_llama, mesh):
    """No device ever holds it whole: the model stays sharded, and what is saved lies on the processor."""
    backbone = Backbone(tiny_llama).eval()
    backbone.add_role("policy", trainable=True)
    backbone.add_role("critic", trainable=True, head="random")
    expected = {name: p.detach().clone() for name, p in backbone.copies["policy"].named_parameters()}
    assert backbone.whole_weights("policy") is None, "it is whole already"
    shard(backbone, mesh, "layer")
    layers = of_layers(backbone)
    weights = backbone.whole_weights("policy")
    assert of_layers(backbone) == layers
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor)
        assert not isinstance(weights[name], DTensor)


def test_a_sharded_base_is_no_model_that_is_saved(tiny_llama, mesh):
    backbone = made(tiny_llama)
    shard(backbone, mesh, "layer")
    assert backbone.whole_weights("policy") is None


# Gathering


def test_a_base_that_is_not_sharded_is_left_alone(tiny_llama):
    backbone = made(tiny_llama)
    before, places = states(backbone), [p.data_ptr() for p in backbone.parameters()]
    with gathered(backbone):
        assert not backbone.synchronised
        assert [p.data_ptr() for p in backbone.parameters()] == places
        assert torch.equal(states(backbone), before)
    assert not backbone.synchronised


@pytest.mark.parametrize(("gather", "whole"), [("rollout", True), ("layer", False)])
def test_inside_the_block_the_base_is_whole_unless_it_gathers_by_layer(tiny_llama, mesh, gather, whole):
    backbone = made(tiny_llama)
    shard(backbone, mesh, gather)
    layers, expected = of_layers(backbone), states(backbone)
    assert len(layers) == 2 * 9, "two layers of seven products and two norms"
    with gathered(backbone):
        assert backbone.synchronised is not whole
        for _ in range(2):  # a pass does not give it up
            assert of_layers(backbone) == (set() if whole else layers)
            assert torch.equal(states(backbone), expected)
    assert of_layers(backbone) == layers
    assert backbone.synchronised is True
    assert torch.equal(states(backbone), expected)


def test_an_error_inside_the_block_leaves_the_base_sharded(tiny_llama, mesh):
    backbone = made(tiny_llama)
    shard(backbone, mesh, "rollout")
    parts = sharded_names(backbone)
    with pytest.raises(ZeroDivisionError), gathered(backbone):
        raise ZeroDivisionError
    assert sharded_names(backbone) == parts
    assert backbone.synchronised is True
