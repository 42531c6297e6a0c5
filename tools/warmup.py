"""Re-create a small policy and its tokenizer: `python tools/warmup.py --out DIR [--plan NAME]`.

A small model learns to imitate the worked solutions of some tasks, imperfect habits included, so
that reinforcement learning starts from a policy that is right about half of the time. Everything
follows from the seed; training is in fp32, the weights are stored in bf16. The model is Qwen2 in
all but its type: seed_oss has no tokenizer class of its own, so AutoTokenizer reads tokenizer.json
unchanged.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SeedOssConfig, SeedOssForCausalLM

from spo.config.policy import EMBEDDED
from spo.tasks import arithmetic, countdown, get_task, knights_knaves, prompts
from spo.tasks.problem import CLOSE, OPEN

IMITATED = {module.NAME: module for module in (arithmetic, countdown, knights_knaves)}
"""Task -> where its vocabulary and its worked solutions are."""

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CONTEXT = 512
POOL = 32  # batches whose examples are sorted by length together, to save padding
RAMP = 50  # steps in which the learning rate rises; then it falls linearly to zero
LOG_EVERY = 100  # steps
MAX_NEW_TOKENS, EVAL_BATCH = 128, 250


@dataclass(frozen=True)
class Plan:
    """What a policy imitates, and for how long."""

    mixture: Mapping[str, float]
    """Task -> its share of the examples."""
    cycles: tuple[tuple[int, float], ...]
    """Steps and peak learning rate of each cycle, which starts from the stored weights."""
    start: str | None = None
    """Folder of the weights to start from; None draws new ones."""
    problems: Mapping[str, object] = field(default_factory=dict)
    """Settings of the tasks."""
    solutions: Mapping[str, object] = field(default_factory=dict)
    """Options of the tasks' `solution`."""


PLANS = {
    "embedded": Plan(
        {"arithmetic": 0.47, "countdown": 0.47, "knights_knaves": 0.06}, ((3000, 2e-3), (800, 1e-3))
    ),
    # Twice the operations, and any line may merge two: many lines decide.
    "long-arithmetic": Plan(
        {"arithmetic": 1.0},
        ((1200, 1e-3),),
        start=str(EMBEDDED),
        problems={"operations": 10},
        solutions={"merge": 0.2, "most": 10},
    ),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, number or line break; decoding restores the text exactly."""
    words = dict.fromkeys([PAD, EOS, UNKNOWN, "\n", OPEN, CLOSE])
    for task in PLANS["embedded"].mixture:
        words.update(dict.fromkeys(IMITATED[task].VOCABULARY))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    # WordPiece puts a space before every word but the first; those around line breaks go again.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(" ?\n ?"), "\n"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save its files, with the name of its class that transformers 4 knows as well as 5."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    del settings["backend"]
    path.write_text(json.dumps(settings, indent=2) + "\n")


def build_model(tokenizer: PreTrainedTokenizerFast) -> SeedOssForCausalLM:
    """An untrained policy in fp32, 1.9 million parameters, drawn from torch's global seed."""
    config = SeedOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        attention_dropout=0.0,
        residual_dropout=0.0,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,  # near 1 / sqrt(hidden size); 0.02 learns much more slowly
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # its backward is the fastest on a CPU at this size
    )
    return SeedOssForCausalLM(config)


def examples(
    tokenizer: PreTrainedTokenizerFast, seed: int, plan: Plan
) -> Iterator[tuple[list[int], int]]:
    """Endless mixture of (prompt + solution + end, prompt length) over the training splits."""
    rng = random.Random(seed)
    streams = {task: get_task(task, plan.problems).problems("train", seed) for task in plan.mixture}
    while True:
        (task,) = rng.choices(list(plan.mixture), list(plan.mixture.values()))
        problem = next(streams[task])
        prompt = tokenizer(problem.text)["input_ids"]
        solution = tokenizer(IMITATED[task].solution(problem, rng, **plan.solutions))["input_ids"]
        yield [*prompt, *solution, tokenizer.eos_token_id], len(prompt)


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int, plan: Plan = PLANS["embedded"]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless right-padded `token_ids (N, L)` and `is_solution (N, L)`, equal lengths together."""
    rng, source = random.Random(seed), examples(tokenizer, seed, plan)
    while True:
        pool = sorted(islice(source, POOL * batch_size), key=lambda example: len(example[0]))
        groups = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            token_ids = torch.full((batch_size, len(group[-1][0])), tokenizer.pad_token_id)
            is_solution = torch.zeros_like(token_ids, dtype=torch.bool)
            for row, (ids, prompt_length) in enumerate(group):
                token_ids[row, : len(ids)] = torch.tensor(ids)
                is_solution[row, prompt_length : len(ids)] = True
            yield token_ids, is_solution


def warm_up(
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    plan: Plan = PLANS["embedded"],
    model: SeedOssForCausalLM | None = None,
) -> SeedOssForCausalLM:
    """Imitate worked solutions for `steps` AdamW steps; loss on the solutions' tokens only.

    `model` goes on from where it stands; by default a new one is drawn.
    """
    torch.manual_seed(seed)
    model = build_model(tokenizer) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), fused=True)
    start = time.monotonic()
    seen, running = 0, 0.0
    for step, (token_ids, is_solution) in enumerate(
        islice(batches(tokenizer, seed, batch_size, plan), steps)
    ):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / RAMP, 1 - step / steps)
        # Padding stands right of every real token, so the causal mask alone hides it.
        hidden = model.model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state
        targets = is_solution[:, 1:]
        logits = model.lm_head(hidden[targets])
        loss = torch.nn.functional.cross_entropy(logits, token_ids[:, 1:][targets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += token_ids.numel()
        running += loss.item()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            seconds = time.monotonic() - start
            mean = running / (step % LOG_EVERY + 1)
            print(
                f"step {step + 1}/{steps} loss {mean:.3f} tokens {seen} {seconds:.0f} s", flush=True
            )
            running = 0.0
    return model


@torch.no_grad()
def pass_at_1(
    model: SeedOssForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    *,
    count: int,
    temperature: float = 0.0,
    seed: int = 0,
    **options: object,
) -> float:
    """Share of the first `count` test problems solved by one sample; temperature 0 is greedy.

    `options` are the task's settings.
    """
    torch.manual_seed(seed)
    grade = get_task(task, options).grade
    tested = list(islice(prompts(task, "test", 0, tokenizer, **options), count))
    right = 0
    for start in range(0, count, EVAL_BATCH):
        batch = tested[start : start + EVAL_BATCH]
        inputs = tokenizer.pad(
            {"input_ids": [list(p.prompt_ids) for p in batch]},
            padding_side="left",
            return_tensors="pt",
        )
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        output = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
        texts = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(grade(t, p.answer) for t, p in zip(texts, batch, strict=True))
    return right / count


def stored(folder: Path | str) -> SeedOssForCausalLM:
    """The policy of a folder in fp32."""
    return SeedOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--plan", choices=list(PLANS), default="embedded", help="which policy")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="the shipped policy took 2")
    parser.add_argument("--eval", type=int, default=500, help="test problems per task")
    args = parser.parse_args()

    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is a file; name a folder")
    torch.set_num_threads(args.threads)
    plan = PLANS[args.plan]
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, args.out)
    model = stored(plan.start) if plan.start else None
    for cycle, (steps, lr) in enumerate(plan.cycles):
        model = warm_up(
            tokenizer,
            steps=steps,
            batch_size=args.batch_size,
            lr=lr,
            seed=args.seed + cycle,
            plan=plan,
            model=model,
        )
        model.to(torch.bfloat16).save_pretrained(args.out)
        model = stored(args.out)
    for task in plan.mixture:
        greedy, sampled = (
            pass_at_1(model, tokenizer, task, count=args.eval, temperature=t, **plan.problems)
            for t in (0.0, 1.0)
        )
        print(f"{task}: Pass@1 {greedy:.3f} greedy, {sampled:.3f} at T = 1, n = {args.eval}")


if __name__ == "__main__":
    main()
