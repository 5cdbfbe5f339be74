"""How demo/data/preferences.jsonl was made: VADER's best and worst of four responses of the demo's SFT model.

    python demo/make_preferences.py runs/demo/sft/handover

Run it again only to make other data; the file it writes ships with the project.
"""

import json
import sys
from pathlib import Path

import torch

from lrlhf.backbone import Backbone
from lrlhf.datamodules import AlpacaDataModule, TextTemplate
from lrlhf.functional.randomness import generator
from lrlhf.generation import Sampling, sample_responses
from lrlhf.handover import Handover
from lrlhf.rewards import vader_sentiment

DATA = Path(__file__).parent / "data"
TEMPLATE = TextTemplate(
    without_input="### Instruction:\n{instruction}\n\n### Response:\n",
    with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
)
SAMPLING = Sampling(max_new_tokens=48, temperature=0.8)
SAMPLES = 4
SMALLEST_DIFFERENCE = 0.3


def score(gold: torch.Tensor, sample: int, row: int) -> float:
    return round(float(gold[sample, row]), 4)


def main(folder: str) -> None:
    handover = Handover.read(folder)
    backbone = Backbone(handover.base_model, dtype="bfloat16")
    backbone.load_role("sft", handover.stack, handover.folder, head=False)
    data = AlpacaDataModule(predict=str(DATA / "prompts.jsonl"), template=TEMPLATE, task="prompts", val_batch_size=32)
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
            best, worst = int(gold[:, i].argmax()), int(gold[:, i].argmin())
            if gold[best, i] - gold[worst, i] < SMALLEST_DIFFERENCE:
                continue
            first = (number + i) % 2
            pair = (best, worst) if first == 0 else (worst, best)
            row = {**prompts[number * 32 + i], "output_1": samples[pair[0]][i], "output_2": samples[pair[1]][i]}
            rows.append(
                row | {"preference": 1 + first, "gold_1": score(gold, pair[0], i), "gold_2": score(gold, pair[1], i)}
            )
        print(f"{len(rows)} pairs of {(number + 1) * 32} prompts", flush=True)
    (DATA / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1])
