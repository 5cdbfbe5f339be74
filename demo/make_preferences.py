"""How demo/data/preferences.jsonl was made: two responses of the demo's SFT model to each prompt, labelled by VADER.

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
SMALLEST_DIFFERENCE = 0.15


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
        sides = []
        for side in range(2):
            draws = torch.rand(len(batch), SAMPLING.max_new_tokens, generator=generator(0, "pairs", number, side))
            with backbone.role("sft"):
                ids, mask = sample_responses(
                    backbone, batch.prompt_ids, batch.prompt_mask, sampling=SAMPLING, stop_ids=stop, uniforms=draws
                )
            sides.append([data.tokenizer.decode(r[m], skip_special_tokens=True).strip() for r, m in zip(ids, mask)])
        gold = [vader_sentiment([], side) for side in sides]
        for i in range(len(batch)):
            source = prompts[number * 32 + i]
            difference = float(gold[0][i] - gold[1][i])
            if abs(difference) >= SMALLEST_DIFFERENCE:
                pair = {"output_1": sides[0][i], "output_2": sides[1][i], "preference": 1 if difference > 0 else 2}
                rows.append(
                    {**source, **pair, "gold_1": round(float(gold[0][i]), 4), "gold_2": round(float(gold[1][i]), 4)}
                )
        print(f"{len(rows)} pairs of {(number + 1) * 32} prompts", flush=True)
    (DATA / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1])
