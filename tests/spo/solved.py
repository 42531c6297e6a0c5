"""A table of problems of which some are solved, and what dynamic sampling chooses of it."""

import json
import random

from spo.config.recipe import load_recipe
from spo.grow.curriculum import key_of
from spo.models.tokenizer import load_tokenizer
from spo.tasks import prompts_of

ROWS, SOLVED, BROKEN = 14, 6, 13  # problems 0 to 5 are solved; the last one has no rewards
REWARD = f"""
import zlib

def reward(response, answer, truncated):
    if answer == {BROKEN}:
        return None
    return 1.0 if answer < {SOLVED} else zlib.crc32(response.encode()) / 2**32
"""
SMALL = [
    "task=rows",
    "data.test=same",
    "engine={name: hf, max_num_seqs: 64, max_model_len: 64}",
    "sampling={max_new_tokens: 8, temperature: 2, truncated: reward}",
    "shape={kind: star, group_size: 4}",
    "train={prompts: 4, minibatches: 2, iterations: 4, seed: 6}",
    "train.learning_rate=1e-4",
    "train.decay=constant",
    "train.warmup_share=0",
    "eval={every: 0, problems: 1, sampled: false}",
]


def settings(folder):
    """`SMALL` on the table, which is written into the folder."""
    rows = [{"question": f"arithmetic {i} + 4\n", "answer": i} for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "earned.py").write_text(REWARD)
    return [*SMALL, f"data.train={folder / 'rows.jsonl'}", f"reward={folder / 'earned.py'}:reward"]


def chosen(overrides):
    """Of every iteration whose replacements have no limit: the prompts of its forest, of those how
    many replace others, the prompts taken and passed over, and the keys with zero variance then.

    They are the first in the order that vary.
    """
    recipe = load_recipe(None, overrides)
    size, iterations, seed = recipe.train.prompts, recipe.train.iterations, recipe.train.seed
    zero, found = set(), []
    taken, passed = [], 0
    raw = prompts_of(recipe, "train", load_tokenizer(recipe.policy), seed)
    for index, prompt in enumerate(raw):
        drawn = random.Random(f"difficulty {seed} {index}").random()
        if prompt in zero and drawn >= recipe.data.difficulty:
            passed += 1
            continue
        taken.append(prompt)
        varied = [p for p in taken if SOLVED <= p.answer < BROKEN]
        if len(varied) < size:
            continue
        refilled = size - sum(p in varied for p in taken[:size])
        zero |= {p for p in taken if p.answer < SOLVED}
        keys = sorted(map(key_of, zero)) if recipe.data.difficulty else []
        found.append((varied, refilled, len(taken), passed, keys))
        if len(found) == iterations:
            return found
        taken, passed = [], 0
