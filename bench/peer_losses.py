"""Losses and gradients of TRL's own code on small tensors, written to tests/functional/peer_losses.json.

The tests compare ours with them, so that they need no TRL. Run it in TRL's environment (see bench/README.md):

.venv-peer/bin/python bench/peer_losses.py
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

FILE = Path(__file__).parent.parent / "tests/functional/peer_losses.json"
ROWS, PROMPT, RESPONSE, VOCABULARY = 4, 3, 5, 7
LENGTHS = torch.tensor([5, 2, 4, 1])


def listed(tensor: torch.Tensor) -> Any:
    return tensor.detach().double().tolist()


def stub(**settings: Any) -> Any:
    """As much of a trainer as its loss asks for."""
    same = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction=None: x,
        unwrap_model=lambda x: x,
    )
    return SimpleNamespace(
        accelerator=same,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _entropy_bonus_enabled=False,
        _step=0,
        **settings,
    )


def groups() -> dict[str, Any]:
    """GRPO's and RLOO's losses of log-probs that lie near those of the policy that sampled."""
    torch.manual_seed(0)
    mask = (torch.arange(RESPONSE) < LENGTHS[:, None]).long()
    old, ref = (torch.randn(ROWS, RESPONSE) - 2 for _ in range(2))
    advantages = torch.tensor([1.0, -0.5, 0.3, -2.0])
    new = (old + 0.4 * torch.randn(ROWS, RESPONSE)).requires_grad_()
    prompt = torch.ones(ROWS, PROMPT, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.ones(ROWS, RESPONSE, dtype=torch.long),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "old_logps": (old * mask).sum(1),
        "num_items_in_batch": mask.sum(),
    }
    statistics = {"_get_per_token_logps_and_entropies": lambda *_, **__: (new, torch.zeros_like(new), None)}
    common = {
        "epsilon_low": 0.2,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        **statistics,
    }
    more = {
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": 8,
    }
    found = {}
    for name, kind, settings in (
        ("grpo", GRPOTrainer, {"loss_type": "grpo", "beta": 0.04, "epsilon_high": 0.2}),
        ("dapo", GRPOTrainer, {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.28}),
        ("dr_grpo", GRPOTrainer, {"loss_type": "dr_grpo", "beta": 0.0, "epsilon_high": 0.2}),
        ("rloo", RLOOTrainer, {"epsilon_high": 0.2}),
    ):
        new.grad = None
        loss = kind._compute_loss(stub(**common, **more, **settings), None, dict(inputs))
        loss.backward()
        found[name] = {"loss": float(loss), "gradient": listed(new.grad)}
    tensors = {"old": old, "new": new, "ref": ref, "advantages": advantages, "mask": mask}
    return {"tensors": {name: listed(tensor) for name, tensor in tensors.items()}, "losses": found}


def pairs() -> dict[str, Any]:
    """DPO's losses of every loss and divergence that we have too."""
    torch.manual_seed(1)
    length = PROMPT + RESPONSE
    ids = torch.randint(VOCABULARY, (2 * ROWS, length))
    lengths = torch.cat([LENGTHS, LENGTHS.flip(0)])
    completion = ((torch.arange(length) >= PROMPT) & (torch.arange(length) < PROMPT + lengths[:, None])).long()
    logits = (2 * torch.randn(2 * ROWS, length, VOCABULARY)).requires_grad_()
    ref = -3 * torch.rand(2, ROWS) - 4
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": completion,
        "ref_chosen_logps": ref[0],
        "ref_rejected_logps": ref[1],
    }
    found = {}
    for loss_type in ("sigmoid", "ipo", "hinge", "sigmoid_norm"):
        for divergence in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"):
            logits.grad = None
            trainer = stub(
                ld_alpha=None,
                precompute_ref_logps=True,
                f_divergence_type=divergence,
                f_alpha_divergence_coef=0.5,
                loss_types=[loss_type],
                loss_weights=[1.0],
                beta=0.3,
                use_weighting=False,
                label_smoothing=0.0,
            )
            loss = DPOTrainer._compute_loss(
                trainer, lambda **_: SimpleNamespace(logits=logits), dict(inputs), return_outputs=False
            )
            loss.backward()
            found[f"{loss_type} {divergence}"] = {"loss": float(loss), "gradient": listed(logits.grad)}
    tensors = {"ids": ids, "mask": completion, "logits": logits, "ref": ref}
    return {"tensors": {name: listed(tensor) for name, tensor in tensors.items()}, "losses": found}


if __name__ == "__main__":
    FILE.write_text(json.dumps({"trl": trl.__version__, "groups": groups(), "pairs": pairs()}) + "\n")
    print(f"Wrote {FILE.name} by TRL {trl.__version__}")
