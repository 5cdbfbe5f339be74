"""Write demo/data/numbers.jsonl and val_numbers.jsonl: a question whose answer can be checked.

python demo/make_numbers.py

Every pair of different numbers from 10 to 99 is asked about once at most, so that no question is in both files.
"""

import json
import random
from itertools import combinations
from pathlib import Path

DATA = Path(__file__).parent / "data"
COUNTS = {"numbers": 480, "val_numbers": 96}


def main() -> None:
    """Draw the pairs, in random order inside each."""
    draw = random.Random(0)
    pairs = draw.sample(list(combinations(range(10, 100), 2)), sum(COUNTS.values()))
    for name, count in COUNTS.items():
        lines = []
        for pair in pairs[:count]:
            first, second = draw.sample(pair, 2)
            question = f"Which number is larger, {first} or {second}? Answer with the number only."
            lines.append(json.dumps({"instruction": question, "answer": str(max(pair))}))
        del pairs[:count]
        (DATA / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
