"""Steps of GRPOTrainer, six unless told otherwise, on a tiny Llama; its losses and weights.

As a script, one rank of several: it writes a run with TRL's head and one with ours.
"""

import json
import sys
import tempfile

import torch
from transformers import LlamaForCausalLM

from benchmarks.trl_step import build_tokenizer, build_trainer
from spo_kernels.integrations import patch_trl_head

VOCAB = 60


def run(policy, patched: bool, prob_threshold: float | None = None, **options):
    """Losses of the steps, and the weights after and before them as long vectors.

    Plain gradient descent: Adam would divide the rounding of a small gradient by its size.
    """
    model = LlamaForCausalLM.from_pretrained(policy)  # TRL loads its reference from there too
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    defaults = dict(optim="sgd", learning_rate=1.0, max_completion_length=12)
    undo = patch_trl_head(prob_threshold) if patched else lambda: None
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(model, build_tokenizer(VOCAB), folder, **defaults | options)
        try:
            trainer.train()
        finally:
            undo()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == trainer.args.max_steps
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()]), start


def main(policy: str, file: str, options: str) -> None:
    runs = [run(policy, patched, **json.loads(options)) for patched in (False, True)]
    if torch.distributed.get_rank() == 0:
        torch.save({"runs": runs, "ranks": torch.distributed.get_world_size()}, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
