"""`lrlhf match`: coefficients under which penalties pull equally hard at the drift of a policy that was trained.

Equal coefficients are not equal strengths: at small drift js is a quarter of kl, and js_paper far above js. So a study
of shapes compares coefficient_i = coefficient * mean(d_to) / mean(d_i), means per token over responses of one policy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt
from tqdm import tqdm

from lrlhf.align.comparison import load_run
from lrlhf.callbacks.divergence import measure, name_of
from lrlhf.cli.messages import CommandParser
from lrlhf.errors import UserError
from lrlhf.files import write_json
from lrlhf.functional import exact_kl, kl
from lrlhf.functional.divergence import Divergence
from lrlhf.types import Sequences

DESCRIPTION = """The coefficient of each divergence at which its mean penalty equals that of one divergence at one
coefficient, for the drift that a trained policy has; measured again on fresh responses."""


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a folder without a run, or a divergence whose mean is not positive there.
    """
    parser = CommandParser("match", DESCRIPTION)
    parser.add_argument("run", type=str, help="folder of lrlhf align, whose policy has drifted as far as matters")
    parser.add_argument("--divergences", type=list[Divergence], required=True, help="import paths")
    parser.add_argument("--to", type=Divergence, default=kl, help="the divergence whose strength they get")
    parser.add_argument("--coefficient", type=PositiveFloat, default=0.02, help="of that divergence")
    parser.add_argument("--count", type=PositiveInt, default=96, help="held-out prompts at most")
    parser.add_argument("--responses", type=PositiveInt, default=8, help="to each prompt, in each of two rounds")
    parser.add_argument("--out", type=str | None, help="JSON file of the result")
    given = parser.instantiate_classes(parser.parse_args(arguments))
    found = match(
        Path(given.run).expanduser(), given.divergences, given.to, given.coefficient, given.count, given.responses
    )
    print(f"At an exact KL of {found['exact_kl']:.4f} nats a token, like {name_of(given.to)} at {given.coefficient}:")
    for name, line in found["matched"].items():
        print(f"  {name:24} coefficient {line['coefficient']:<10.4g} pull again {line['pull_again']:.3f} of it")
    if given.out:
        write_json(Path(given.out).expanduser(), found)


def match(
    run: Path,
    divergences: Sequence[Divergence],
    to: Divergence = kl,
    coefficient: float = 0.02,
    count: int = 96,
    responses: int = 8,
) -> dict[str, Any]:
    """Coefficients of equal pull, and that pull on fresh responses.

    Args:
        run: folder of an align run, or of its last stage.
        divergences: to match.
        to: what they are matched to.
        coefficient: of `to`.
        count: held-out prompts at most.
        responses: to each prompt, in each round.

    Returns:
        exact_kl, nats a token; and matched, by name: mean (per token), coefficient, and pull_again: the mean penalty
        on fresh responses, divided by that of `to`.

    Raises:
        UserError: no run, or a mean that is not positive.
    """
    config, module, data = load_run(run / "rl" if (run / "rl").is_dir() else run)
    data.task, data.val_limit = "prompts", count
    data.setup("validate")
    module.seed = int(config.get("seed_everything") or 0)
    functions = list({name_of(f): f for f in (to, *divergences, exact_kl)}.values())
    first, again = (_means(module, data, functions, draws, responses) for draws in ("match", "match again"))
    if bad := [name for name, mean in first.items() if not mean > 0]:
        raise UserError(
            f"match: the mean of {', '.join(bad)} is not positive over the responses of {run}; take a policy that has "
            "drifted further, or more prompts."
        )
    aim, aim_again = first[name_of(to)], again[name_of(to)]
    matched = {}
    for name in map(name_of, divergences):
        found = coefficient * aim / first[name]
        pull = found * again[name] / (coefficient * aim_again)
        matched[name] = {"mean": first[name], "coefficient": found, "pull_again": pull}
    return {"exact_kl": first["exact_kl"], "to": name_of(to), "coefficient": coefficient, "matched": matched}


def _means(module: Any, data: Any, functions: Sequence[Divergence], draws: str, responses: int) -> dict[str, float]:
    """Of each divergence per token, over responses of the policy."""
    sums, tokens = dict.fromkeys(map(name_of, functions), 0.0), 0
    batches = (batch for _ in range(responses) for batch in data.val_dataloader())
    for number, batch in enumerate(tqdm(batches, desc=draws, total=responses * len(data.val_dataloader()))):
        sequences = Sequences(batch.prompt_ids, batch.prompt_mask, *module.sample(batch, "policy", draws, number))
        for name, values in measure(module, sequences, module.logprobs(sequences, "policy"), functions).items():
            sums[name] += float(values.sum())
        tokens += int(sequences.response_mask.sum())
    return {name: value / tokens for name, value in sums.items()}
