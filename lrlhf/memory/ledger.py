"""Counts the bytes of live tensors while code runs on fake ones, which have a shape and a type but no values.

Integers and masks stay real, because control flow asks for them: which tokens count, how many rows there are.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


class Ledger(TorchDispatchMode):
    """Enter it inside a FakeTensorMode(allow_non_fake_inputs=True).

    Args:
        vocabulary: the last axis of logits, which are counted by themselves.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._entries: dict[int, tuple[Any, list[str], int]] = {}

    @contextmanager
    def phase(self) -> Iterator[Counter[str]]:
        """Yields a counter that holds, when the block has ended, the bytes by kind at its peak."""
        self.peak, result = self.now.copy(), Counter[str]()
        yield result
        result.update(self.peak)

    def own(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these tensors as `kind` from now on."""
        for tensor in tensors:
            self._see(tensor)
            _, kinds, size = self._entries[tensor.untyped_storage()._cdata]
            self.now[kinds[0]] -= size
            self.now[kind] += size
            kinds[0] = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run on real tensors what is known, on fake ones the rest, and see what came out."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            result = self._fake(func, args, kwargs or {})
        elif tensors or not _makes_floats(func, args, kwargs or {}):
            with unset_fake_temporarily():
                result = func(*args, **kwargs or {})
        else:
            result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _fake(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            return args[0]
        if name in INDEXING:
            args = (args[0], [part for index in args[1] for part in _positions(index)], *args[2:])
        return func(*args, **kwargs)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._entries:
            return
        wide = tensor.is_floating_point() and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
        kinds, size = ["logits" if wide else "activations"], storage.nbytes()

        def free(_: Any) -> None:
            del self._entries[key]
            self.now[kinds[0]] -= size

        self._entries[key] = weakref.ref(storage, free), kinds, size
        self.now[kinds[0]] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()


def _makes_floats(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a function without tensor inputs makes floating-point numbers: those are fake."""
    dtype = kwargs.get("dtype")
    if dtype is None and "arange" in func.overloadpacket.__name__:
        return any(isinstance(argument, float) for argument in args)
    return (dtype or torch.get_default_dtype()).is_floating_point


def _positions(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A real mask as the positions where it is true: the shape of what it picks is then known."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return (index,)
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)
