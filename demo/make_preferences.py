"""How demo/data/preferences.jsonl was made: VADER's two best against its two worst of eight responses of the SFT model.

    python demo/make_preferences.py runs/demo/sft/handover

Run it again only to make other data; the file it writes ships with the project.
"""

import json
import sys
from pathlib import Path

import torch

from lrlhf.datamodules import AlpacaDataModule, TextTemplate
from lrlhf.functional.randomness import generator
from lrlhf.model.backbone import Backbone
from lrlhf.model.generation import Sampling, sample_responses
from lrlhf.rewards import vader_sentiment
from lrlhf.run.handover import Handover

DATA = Path(__file__).parent / "data"
TEMPLATE = TextTemplate(
    without_input="### Instruction:\n{instruction}\n\n### Response:\n",
    with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
)
SAMPLING = Sampling(max_new_tokens=48, temperature=0.8)
SAMPLES = 8
PAIRS = 2
SMALLEST_DIFFERENCE = 0.4
BATCH = 96


def score(gold: torch.Tensor, sample: int, row: int) -> float:
    return round(float(gold[sample, row]), 4)


def main(folder: str) -> None:
    handover = Handover.read(folder)
    backbone = Backbone(handover.base_model, dtype="bfloat16")
    backbone.load_role("sft", handover.stack, handover.folder, head=False)
    data = AlpacaDataModule(
        predict=str(DATA / "prompts.jsonl"), template=TEMPLATE, task="prompts", val_batch_size=BATCH
    )
    data.setup("predict")
    prompts = [json.loads(line) for line in (DATA / "prompts.jsonl").open()]
    stop = torch.tensor([data.tokenizer.eos_token_id])
    rows = []
    for number, batch in enumerate(data.predict_dataloader()):
        samples = []
        for sample in range(SAMPLES):
            draws = torch.rand(len(batch), SAMPLING.max_new_tokens, generator=generator(0, "pairs", number, sample))
            with backbone.role("sft"):
                ids, mask = sample_responses(
                    backbone, batch.prompt_ids, batch.prompt_mask, sampling=SAMPLING, stop_ids=stop, uniforms=draws
                )
            samples.append(
                [data.tokenizer.decode(r[m], skip_special_tokens=True).strip() for r, m in zip(ids, mask, strict=True)]
            )
        gold = torch.stack([vader_sentiment([], texts) for texts in samples])
        for i in range(len(batch)):
            ranked = gold[:, i].argsort(descending=True).tolist()
            for better, worse in zip(ranked[:PAIRS], ranked[::-1][:PAIRS], strict=True):
                if gold[better, i] - gold[worse, i] < SMALLEST_DIFFERENCE:
                    continue
                first, second = (better, worse) if len(rows) % 2 == 0 else (worse, better)
                row = {**prompts[number * BATCH + i], "output_1": samples[first][i], "output_2": samples[second][i]}
                row["preference"] = 1 if first == better else 2
                rows.append(row | {"gold_1": score(gold, first, i), "gold_2": score(gold, second, i)})
        print(f"{len(rows)} pairs of {(number + 1) * BATCH} prompts", flush=True)
    (DATA / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1])
