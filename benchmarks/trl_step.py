"""A training step of TRL's GRPOTrainer with TRL's head and with ours, in turn.

    TRL                      TRL's own chunked head
    patched                  patch_trl_head(): the same losses
    patched, 10 % kept       patch_trl_head(prob_threshold): nine of ten tokens send no gradient

Completions are given, as by a sampling server, so a step is the loss, its gradients and AdamW. The
policy is a small untrained Llama, and the threshold is the one that keeps the share asked for.
`--old` takes two steps from each batch of completions: TRL then computes old logprobs first, and
dropped tokens are not projected at all. The figure is the median over the steps of all rounds, of
which the first step of a round is left out.

    python -m benchmarks.trl_step [--vocab 32000] [--hidden 512] [--old] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import write_json
from benchmarks.provenance import environment
from spo_kernels.integrations import patch_trl_head

PROMPTS = ["w3 w4 w5", "w6", "w7 w8", "w9 w10 w11 w12"]
GROUP = 4


def build_tokenizer(vocab: int) -> Any:
    """Words w3, w4, ... as tokens of one word each; made in memory, without any file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def build_model(vocab: int, hidden: int, layers: int, seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, pad_token_id=0,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1,
        eos_token_id=2, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def reward(completion_ids: list[list[int]], **others: Any) -> list[float]:
    """The share of even tokens: it differs between completions of one prompt."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def build_trainer(
    model: Any,
    tokenizer: Any,
    folder: Path | str,
    rollout: Callable[..., Any] | None = None,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> Any:
    """A GRPOTrainer on the CPU over `PROMPTS`, `GROUP` completions each."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    defaults: dict[str, Any] = dict(
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1, seed=0,
        num_generations=GROUP, per_device_train_batch_size=len(PROMPTS) * GROUP, max_steps=6,
        lr_scheduler_type="constant", disable_tqdm=True, gradient_checkpointing=False,
        temperature=1.0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder), **defaults | options),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        rollout_func=rollout,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def completions_of(vocab: int, length: int) -> dict[str, list[list[int]]]:
    """By prompt, GROUP completions of random words."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(PROMPTS), GROUP, length)
    ids = torch.randint(3, vocab, shape, generator=generator).tolist()
    return dict(zip(PROMPTS, ids, strict=True))


def threshold_for(model: Any, tokenizer: Any, completions: dict[str, Any], kept: float) -> float:
    """The probability below which a share `kept` of the tokens lies."""
    logprobs: list[Tensor] = []
    with torch.no_grad():
        for prompt, group in completions.items():
            head = tokenizer(prompt)["input_ids"]
            ids = torch.tensor([head + c for c in group])
            log_p = model(input_ids=ids).logits[:, len(head) - 1 : -1].log_softmax(-1)
            logprobs.append(log_p.gather(-1, ids[:, len(head) :, None]).flatten())
    return math.exp(float(torch.cat(logprobs).quantile(kept)))


def step_times(build: Callable[[list[Any]], Any]) -> list[float]:
    """Seconds of each step of a trainer but the first."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        begun, times = 0.0, []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter() - self.begun)

    clock = Clock()
    clock.times = []
    build([clock]).train()
    return clock.times[1:]


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the steps, by the way that the head runs."""
    tokenizer = build_tokenizer(options.vocab)
    model = build_model(options.vocab, options.hidden, options.layers)
    completions = completions_of(options.vocab, options.length)
    threshold = threshold_for(model, tokenizer, completions, options.kept)
    ways = {
        "TRL": contextlib.nullcontext,
        "patched": patch_trl_head,
        f"patched, {options.kept:.0%} kept": lambda: patch_trl_head(prob_threshold=threshold),
    }

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        turn: dict[str, int] = {}
        chosen = []
        for prompt in prompts:
            turn[prompt] = turn.get(prompt, -1) + 1
            chosen.append(completions[prompt][turn[prompt] % GROUP])
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": chosen, "logprobs": None}

    times: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:

        def build(callbacks: list[Any]) -> Any:
            return build_trainer(
                model, tokenizer, folder, rollout, callbacks, learning_rate=0.0,
                max_completion_length=options.length, max_steps=options.steps,
                num_iterations=2 if options.old else 1, loss_type=options.loss_type,
            )  # fmt: skip

        for _ in range(options.rounds):
            for way, patched in ways.items():
                with patched():
                    times[way] += step_times(build)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--kept", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--old", action="store_true")
    parser.add_argument("--loss-type", default="dapo")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    medians = {way: statistics.median(times) for way, times in measure(options).items()}
    for way, seconds in medians.items():
        print(f"{way:24} {seconds * 1e3:8.0f} ms  {seconds / medians['TRL']:.2f} of TRL's")
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        shared = settings | environment("training code")
        rows = [{"implementation": k, "ms": 1e3 * x} | shared for k, x in medians.items()]
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
