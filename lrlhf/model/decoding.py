"""What runs one token after another behind a prefilled cache: with a cache that grows, or at fixed shapes.

A growing cache computes least: it holds what there is, and rows leave when they have ended. Fixed shapes cost the
attention over tokens that are not there yet, but every token is the same sequence of kernels on the same memory, so on
a GPU it is captured once as a CUDA graph and replayed, which takes one launch instead of a thousand a token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from lrlhf.errors import UserError
from lrlhf.model.architecture import text_config
from lrlhf.model.backbone import Backbone
from lrlhf.model.pretrained import first_line


class Decoder:
    """Next-token logits of rows in the backbone's current role, over a cache that grows.

    Args:
        backbone: inside `with backbone.role(...)`, without gradients.
        mask: [B, S] bool over cached tokens and those of the first call, as `Backbone.prefill` gives it.
        positions: [B, N] int64 of the tokens of the first call.
        cache: of `Backbone.prefill`.
    """

    def __init__(self, backbone: Backbone, mask: Tensor, positions: Tensor, cache: Any):
        self.backbone, self.mask, self.positions, self.cache = backbone, mask, positions, cache

    def __call__(self, ids: Tensor) -> Tensor:
        """Run new tokens and predict the next.

        Args:
            ids: [B, N] int64; after the first call N is 1.

        Returns:
            Logits [B, V].
        """
        logits = self.backbone.next_token_logits(ids, self.mask, self.positions, self.cache)
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return logits

    def keep(self, rows: Tensor) -> bool:
        """Go on with these rows [N] int64 alone.

        Returns:
            Whether it does; else all rows run on.
        """
        if self.backbone.by_length:
            return False
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        return True


class StaticDecoder(Decoder):
    """The same at fixed shapes: one token a row, and a cache as long as it will ever be.

    Args:
        backbone: as in Decoder, of full attention in all layers, whole on its device.
        mask: as in Decoder.
        positions: as in Decoder.
        cache: as in Decoder.
        tokens: that will follow at most.

    Raises:
        UserError: another kind of base.
    """

    def __init__(self, backbone: Backbone, mask: Tensor, positions: Tensor, cache: Any, tokens: int):
        super().__init__(backbone, mask, positions, cache)
        if not backbone.packs() or backbone.synchronised:
            raise UserError(
                f"sampling.engine: static needs full attention in every layer and the whole base on each device; set "
                f"sampling.engine: dynamic for {backbone.base_model}."
            )
        self._length = mask.shape[1] + tokens
        self._fixed: StaticStep | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """As in Decoder; the first call runs the prompts, the second fixes the shapes."""
        if self._fixed is None:
            cached = self.mask.shape[1] - ids.shape[1]
            if ids.shape[1] > 1 or not cached:
                return super().__call__(ids)
            self._fixed = StaticStep(self.backbone, self.mask, self.positions, self.cache, self._length)
            self.cache = None
        return self._fixed(ids)

    def keep(self, rows: Tensor) -> bool:
        """As in Decoder, once half of the rows have ended: other shapes are captured anew."""
        if self._fixed is None or len(rows) > self._fixed.ids.shape[0] // 2:
            return False
        self.mask, self.positions, self.cache = self._fixed.rows(rows)
        self._fixed = None
        return True


class StaticStep:
    """One token a row, all of it on memory that stays where it is.

    Args:
        backbone: as in Decoder.
        mask: [B, S] bool over cached tokens and the next one.
        positions: [B, 1] int64 of the next one.
        cache: of S - 1 tokens.
        length: tokens that the fixed cache holds.
    """

    def __init__(self, backbone: Backbone, mask: Tensor, positions: Tensor, cache: Any, length: int):
        self.backbone, self.positions = backbone, positions.clone()
        self.ids = torch.zeros_like(self.positions)
        self.column = torch.tensor([mask.shape[1] - 1], device=mask.device)
        self.mask = mask.new_zeros(len(mask), 1, 1, length)
        self.mask[:, 0, 0, : mask.shape[1]] = mask
        self.cache = StaticCache(config=text_config(backbone.model), max_cache_len=length)
        held = mask.shape[1] - 1
        layers: Any = zip(self.cache.layers, cache.layers, strict=True)
        for fixed, layer in layers:
            fixed.lazy_initialization(layer.keys, layer.values)
            fixed.keys[:, :, :held], fixed.values[:, :, :held] = layer.keys[:, :, :held], layer.values[:, :, :held]
            fixed.cumulative_length.fill_(held)
            layer.keys = layer.values = None
        self.logits: Tensor | None = None
        self._graph: Any = None
        self._warm = False

    def __call__(self, ids: Tensor) -> Tensor:
        """[B, 1] int64 to logits [B, V], which the next call overwrites."""
        self.ids.copy_(ids)
        if self.ids.device.type != "cuda":
            return self._run()
        if not self._warm:  # kernels choose their algorithms and workspaces in a pass that is not captured
            self._warm = True
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                logits = self._run()
            torch.cuda.current_stream().wait_stream(stream)
            return logits
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self._graph):
                    self.logits = self._run()
            except RuntimeError as error:  # a kernel that asks the processor, such as those of int8
                raise UserError(
                    f"sampling.engine: static: {self.backbone.base_model} cannot be captured as a CUDA graph "
                    f"({first_line(error)}); set sampling.engine: dynamic."
                ) from error
        self._graph.replay()
        assert self.logits is not None
        return self.logits

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Mask, positions and cache of these rows [N] int64, as they are given to another StaticStep."""
        layers: Any = self.cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        mask = self.mask[rows, 0, 0, : int(self.column) + 1]
        return mask, self.positions[rows], self.cache

    def _run(self) -> Tensor:
        self.mask.index_fill_(-1, self.column, True)
        logits = self.backbone.next_token_logits(self.ids, self.mask, self.positions, self.cache)
        self.positions.add_(1)
        self.column.add_(1)
        return logits
