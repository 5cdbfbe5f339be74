"""Best of n: answer n times, keep the answer that scores best. No training, and hard to beat at a small n.

What it costs: n times the sampling, for each answer. What it moves: at most log n - (n - 1) / n nats a response.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrlhf.config import TwoOrMore, Updates, check_ranges
from lrlhf.errors import UserError
from lrlhf.functional import best_of_n_kl, best_of_n_kl_bound
from lrlhf.modules.reward_source import Aggregate
from lrlhf.modules.rollouts import RolloutModule
from lrlhf.rewards import Reward, RewardFunction
from lrlhf.types import Prompts, Sequences


class BestOfN(RolloutModule):
    """`predict` with the reference, each answer the best of n by the reward model or the reward function.

    Writes best_of_n.json beside the answers: mean score of the best and of all, and how far that is from the reference.

    Args:
        n: answers to each prompt, of which the best is kept.
        reward_model: see RolloutModule.
        reward_function: see RolloutModule.
        aggregate: see RolloutModule.
        kwargs: see AlignmentModule.
    """

    role = "reference"
    trained_roles = ()
    trains = False

    def __init__(
        self,
        n: TwoOrMore = 16,
        reward_model: str | None = None,
        reward_function: RewardFunction | list[Reward] | None = None,
        aggregate: Aggregate | None = None,
        **kwargs: Any,
    ):
        super().__init__(reward_model, reward_function, aggregate, Updates(), **kwargs)
        self.n = n
        check_ranges(self)
        self._found: list[tuple[float, float, float]] = []

    def build_roles(self) -> None:
        """The reward model's roles, and the reference."""
        self.source.build(self)
        self.backbone.add_role("reference", self.load_sft())

    def setup(self, stage: str) -> None:
        """It predicts, and nothing else.

        Raises:
            UserError: another command, or answers that are all the same.
        """
        if stage != "predict":
            raise UserError("BestOfN trains nothing and validates nothing; use lrlhf predict.")
        if self.sampling.truncates:
            raise UserError(
                "BestOfN measures its distance from the whole distribution: leave sampling.top_k at 0, top_p at 1, "
                "temperature above 0."
            )
        super().setup(stage)
        self._found = []

    @torch.no_grad()
    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, Any]]:
        """AlpacaEval rows of the best answers, each with its score.

        The draws depend on the seed, the batch and the row, so a larger n sees the answers of no smaller one.
        """
        rows = batch.repeat(self.n)
        self.source.check_columns(rows)
        sequences = Sequences(rows.prompt_ids, rows.prompt_mask, *self.sample(rows, self.role, "predict", batch_idx))
        scores = self.score(sequences, rows).view(-1, self.n)
        if not scores.isfinite().all():
            raise UserError("a score is not finite; look at the reward model or the reward function.")
        best, place = scores.max(1)
        taken = sequences.rows(torch.arange(0, len(rows), self.n, device=place.device) + place)
        divergence = best_of_n_kl(self.logprobs(taken, self.role).sum(1), self.n)
        self._found += zip(best.tolist(), scores.mean(1).tolist(), divergence.tolist(), strict=True)
        texts = self.decode(taken.response_ids, taken.response_mask)
        return [
            {**source, "output": text, "generator": f"lrlhf-best-of-{self.n}", "score": score}
            for source, text, score in zip(batch.sources, texts, best.tolist(), strict=True)
        ]

    def on_predict_epoch_end(self) -> None:
        """Write and say what the best of n gained, and how far it is from the reference."""
        best, every, divergence = (float(column.mean()) for column in torch.tensor(self._found).double().unbind(1))
        report = {
            "n": self.n,
            "prompts": len(self._found),
            "score": best,
            "score_of_all": every,
            "kl_bound": best_of_n_kl_bound(self.n),
            "kl_estimate": divergence,
        }
        path = Path(self.trainer.default_root_dir) / "best_of_n.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(
            f"Best of {self.n} on {len(self._found)} prompts: score {best:.3f}, of all answers {every:.3f}; KL to the "
            f"reference at most {report['kl_bound']:.2f} nats a response, by estimate {divergence:.2f}"
        )

    def estimate_advantages(self, rollout: Any, rewards: Tensor) -> Any:
        """Nothing is trained."""
        raise NotImplementedError
