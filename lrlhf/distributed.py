"""Sums and agreements between the processes of a run. Collective: every process calls them equally often.

With one process each returns what it was given.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if world_size() > 1 else 0


def total(values: Tensor) -> Tensor:
    """The sum over processes of a tensor without gradient, of one shape everywhere."""
    if world_size() == 1:
        return values
    result = values.detach().clone()
    dist.all_reduce(result)
    return result


def total_number(number: float) -> float:
    """The sum of the processes' numbers."""
    return float(total(torch.tensor(number, dtype=torch.float64, device=device()))) if world_size() > 1 else number


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    if world_size() == 1:
        return number
    result = torch.tensor(number, device=device())
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return int(result)


def missing_passes(passes: int) -> int:
    """How many more passes another process makes than this one."""
    return largest(passes) - passes


def any_process(flag: bool) -> bool:
    """Whether the flag is true in at least one process."""
    return bool(largest(int(flag)))


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace each gradient by its sum over processes, in one collective; a missing gradient counts as 0.

    Losses are divided by counts over all processes, so their gradients add up, they are not averaged. FSDP has summed
    those of sharded parameters.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if world_size() == 1 or not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.float().flatten() for gradient in gradients])
    flat = total(torch.cat([flat, torch.tensor([p.grad is not None for p in parameters], device=flat.device)]))
    pieces = flat[: -len(parameters)].split([p.numel() for p in parameters])
    for parameter, piece, used in zip(parameters, pieces, flat[-len(parameters) :].tolist(), strict=True):
        parameter.grad = piece.view_as(parameter).to(parameter.dtype) if used else None


def clip_gradients(parameters: list[torch.nn.Parameter], limit: float) -> float:
    """Scale gradients so that the norm of all together is at most the limit.

    Returns:
        The norm before.
    """
    if not any(isinstance(p, DTensor) for p in parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.zeros(2, device=device())  # of what is sharded, and of what every process has
    for gradient in gradients:
        squares[0 if isinstance(gradient, DTensor) else 1] += _local(gradient).float().square().sum()
    norm = float((total(squares[:1]) + squares[1:]).sqrt())
    if norm > limit:
        torch._foreach_mul_([_local(gradient) for gradient in gradients], limit / (norm + 1e-6))
    return norm


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def broadcast(parameters: list[torch.nn.Parameter]) -> None:
    """Give every process the parameters of the first; those that are sharded were cut from equal ones."""
    if world_size() > 1:
        for parameter in [p for p in parameters if not isinstance(p, DTensor)]:
            dist.broadcast(parameter.data, 0)


def whole(value: Any) -> Any:
    """A sharded tensor in one piece on the processor of the first process, empty on the others; anything else as it is.

    So no device ever holds more than one whole tensor of a model that is gathered to be saved.
    """
    if not isinstance(value, DTensor):
        return value
    gathered = value.full_tensor()
    return gathered.cpu() if rank() == 0 else gathered.new_empty(0, device="cpu")


def gather_objects(item: object) -> list:
    """One small picklable item of every process, in the order of ranks."""
    if world_size() == 1:
        return [item]
    items: list = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def device() -> torch.device:
    """The device on which a tensor must lie to take part in a collective."""
    nccl = world_size() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
