"""Sampling responses: a plain loop over a key-value cache, rows leaving when they have ended."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lrlhf import distributed
from lrlhf.config import Sampling
from lrlhf.functional import equally_long, response_mask
from lrlhf.model.backbone import Backbone
from lrlhf.model.decoding import Decoder, StaticDecoder


def choose(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """One token a row by inverting the cumulative distribution: logits [B, V], uniforms [B] in [0, 1) to int64 [B].

    A row's token depends on its own logits and its own uniform alone, never on its neighbours.

    Args:
        logits: [B, V], of the next token.
        uniforms: [B] in [0, 1), one draw a row.
        sampling: temperature, top_k and top_p.

    Returns:
        int64 [B].
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits if sampling.temperature == 1 else logits.float() / sampling.temperature
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    if sampling.top_k or sampling.top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= sampling.top_p
        if sampling.top_k:
            beyond[:, sampling.top_k :] = True
        probabilities = torch.zeros_like(ranked).scatter(-1, order, ranked.masked_fill(beyond, 0))
    cumulative = probabilities.cumsum(-1)
    targets = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def respond(
    backbone: Backbone,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    sampling: Sampling,
    stop_ids: Tensor,
    generator: torch.Generator,
    group_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Responses of the backbone's current role to this process's rows of a batch, `sampling.batch_size` at a time.

    What is drawn depends on the generator and on the row's number in the batch over all processes, on nothing else.

    Args:
        backbone: inside `with backbone.role(...)`.
        prompt_ids: [B, P] int64, left-padded; process i holds groups i, i + n, i + 2n, ... of n processes' batch.
        prompt_mask: [B, P] bool.
        sampling: temperature and limits.
        stop_ids: [S] int64, the tokens that end a response.
        generator: in the same state in all processes.
        group_size: rows next to each other that hold one prompt, which then runs once.

    Returns:
        response_ids [B, R] int64, 0 off the mask, and response_mask [B, R] bool, R <= max_new_tokens.
    """
    rows, world, group = len(prompt_ids), distributed.world_size(), group_size
    size = max(1, sampling.batch_size // group) * group
    every = torch.rand(distributed.largest(rows) * world, sampling.max_new_tokens, generator=generator)
    mine = every.view(-1, group, sampling.max_new_tokens)[distributed.rank() :: world].flatten(0, 1)[:rows]
    columns = (prompt_ids, prompt_mask, mine.to(prompt_ids.device))
    pieces = list(zip(*(x.split(size) for x in columns), strict=True)) if rows else []
    if backbone.synchronised:
        blank = tuple(x.new_ones(group, x.shape[1]) for x in columns)
        pieces += [blank] * distributed.missing_passes(len(pieces))
    settings: Any = {"sampling": sampling, "stop_ids": stop_ids, "group_size": group}
    sampled = [sample_responses(backbone, ids, mask, uniforms=uniforms, **settings) for ids, mask, uniforms in pieces]
    responses = [(ids, mask) for piece in sampled for ids, mask in zip(*piece, strict=True)][:rows]
    if not responses:
        return prompt_ids.new_zeros(0, 1), prompt_mask.new_zeros(0, 1)
    ids, mask = (pad_sequence(list(x), batch_first=True) for x in zip(*responses, strict=True))
    return ids, mask


@torch.no_grad()
def sample_responses(
    backbone: Backbone,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    sampling: Sampling,
    stop_ids: Tensor,
    uniforms: Tensor,
    group_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Responses of the backbone's current role.

    Args:
        backbone: inside `with backbone.role(...)`.
        prompt_ids: [B, P] int64, left-padded.
        prompt_mask: [B, P] bool.
        sampling: temperature and limits.
        stop_ids: [S] int64, the tokens that end a response.
        uniforms: [B, max_new_tokens] in [0, 1), all the randomness there is: a response depends on its own row alone,
            not on how the batch is cut or on when others end.
        group_size: rows next to each other that hold one prompt, which then runs once.

    Returns:
        response_ids [B, R] int64, 0 off the mask, and response_mask [B, R] bool, R <= max_new_tokens.
    """
    if backbone.by_length and not prompt_mask.all():
        return _by_length(backbone, prompt_ids, prompt_mask, sampling=sampling, stop_ids=stop_ids, uniforms=uniforms)
    rows, device = len(prompt_ids), prompt_ids.device
    tokens = torch.zeros(rows, sampling.max_new_tokens, dtype=torch.long, device=device)
    active = torch.arange(rows, device=device)
    ids, mask, positions, cache = backbone.prefill(prompt_ids, prompt_mask, group_size)
    if sampling.engine == "static":
        decoder: Decoder = StaticDecoder(backbone, mask, positions, cache, sampling.max_new_tokens)
    else:
        decoder = Decoder(backbone, mask, positions, cache)
    alive = torch.ones(rows, dtype=torch.bool, device=device)
    for step in range(sampling.max_new_tokens):
        chosen = choose(decoder(ids), uniforms[active, step], sampling)
        tokens[active[alive], step] = chosen[alive]
        alive = alive & ~torch.isin(chosen, stop_ids)
        unfinished = bool(alive.any())
        if not (distributed.any_process(unfinished) if backbone.synchronised else unfinished):
            break
        if unfinished and alive.sum() <= 0.75 * len(alive):
            keep = alive.nonzero().squeeze(-1)
            if decoder.keep(keep):
                active, chosen, alive = (x[keep] for x in (active, chosen, alive))
        ids = chosen[:, None]
    tokens = tokens[:, : step + 1]
    ended = response_mask(tokens, stop_ids)
    return tokens.masked_fill(~ended, 0), ended


@torch.no_grad()
def stream_tokens(
    backbone: Backbone, prompt_ids: Tensor, *, sampling: Sampling, stop_ids: Tensor, uniforms: Tensor
) -> Iterator[int]:
    """`sample_responses` of one prompt [1, P], token by token as they are drawn; the one that ends it is the last.

    Args:
        backbone: inside `with backbone.role(...)` until the last token.
        prompt_ids: [1, P] int64, without padding.
        sampling: temperature and limits.
        stop_ids: [S] int64, the tokens that end a response.
        uniforms: [1, max_new_tokens] in [0, 1).
    """
    ids, *prefilled = backbone.prefill(prompt_ids, torch.ones_like(prompt_ids, dtype=torch.bool))
    decoder = Decoder(backbone, *prefilled)
    for step in range(sampling.max_new_tokens):
        chosen = choose(decoder(ids), uniforms[:, step], sampling)
        yield int(chosen)
        if torch.isin(chosen, stop_ids):
            return
        ids = chosen[:, None]


def _by_length(
    backbone: Backbone, prompt_ids: Tensor, prompt_mask: Tensor, *, uniforms: Tensor, **settings: Any
) -> tuple[Tensor, Tensor]:
    """`sample_responses` for a base that padding would change: prompts of equal length run together, unpadded."""
    groups, pieces = equally_long(prompt_mask), []
    for rows in groups:
        length = int(prompt_mask[rows[0]].sum())
        ids, mask = (x[rows][:, -length:] for x in (prompt_ids, prompt_mask))
        pieces.append(sample_responses(backbone, ids, mask, uniforms=uniforms[rows], **settings))
    order = torch.cat(groups).argsort().tolist()
    columns = ([row for piece in pieces for row in piece[which]] for which in (0, 1))
    ids, mask = (pad_sequence([column[i] for i in order], batch_first=True) for column in columns)
    return ids, mask
