"""The losses of TRL's DPOTrainer: `loss_type` of DPOConfig."""

from __future__ import annotations

import tempfile

import torch
from rows import Row
from rows_others import DPO, SCORES
from rows_trl import policy
from snippets import LOGPROBS
from torch import Tensor


def dpo(**options):
    """`DPOTrainer._compute_loss` over the logprobs of a row, and the reference's."""

    def theirs(names: dict, logprobs: Tensor, entropies: Tensor) -> Tensor:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
        from trl.trainer.utils import FusedCausalLMOutput

        model, tokenizer = policy()
        pair = {"prompt": ["w3"], "chosen": [" w4"], "rejected": [" w5"]}
        common = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no")
        with tempfile.TemporaryDirectory() as folder:
            trainer = DPOTrainer(
                model=model, ref_model=policy()[0], train_dataset=Dataset.from_dict(pair),
                processing_class=tokenizer,
                args=DPOConfig(output_dir=folder, **common, **options),
            )  # fmt: skip
        trainer.precompute_ref_logps = True  # they are in the inputs
        mask = names["mask"]
        first = mask.new_zeros(len(mask), 1)  # a token of the prompt predicts the first one
        chosen, rejected = (names["ref"] * mask).sum(-1).chunk(2)
        inputs = {
            "input_ids": torch.cat([first.long(), names["ids"]], 1),
            "attention_mask": torch.cat([~first, mask], 1).int(),
            "completion_mask": torch.cat([first, mask], 1).int(),
            "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
        }  # fmt: skip
        nothing = torch.zeros_like(logprobs)
        output = FusedCausalLMOutput(
            log_probs=logprobs * mask, entropy=entropies, mean_logits=nothing,
            is_top1=mask, label_mask=mask,
        )  # fmt: skip
        return trainer._compute_loss(lambda **inputs: output, inputs, return_outputs=False)

    return theirs


def logistic(argument: str) -> str:
    return f"torch.nn.functional.logsigmoid({argument})"


PLUS, MINUS = logistic("margin"), logistic("-margin")
MARGIN = SCORES + "margin = 0.1 * (chosen - rejected)\n"
HEAT = SCORES + "chosen, rejected = 0.1 * chosen, 0.1 * rejected\n"
MEANS = SCORES + "chosen, rejected = (scores / lengths[:, 0]).chunk(2)\n"
CODES = {
    "sigmoid": DPO,
    "hinge": SCORES + "loss = torch.relu(1 - 0.1 * (chosen - rejected)).mean()",
    "ipo": MEANS + "loss = (chosen - rejected - 1 / (2 * 0.1)).square().mean()",
    "exo_pair": MARGIN
    + f"p = margin.sigmoid()\nloss = p * ({PLUS} - torch.tensor(0.9).log())\n"
    + f"loss = (loss + (1 - p) * ({MINUS} - torch.tensor(0.1).log())).mean()",
    "nca_pair": HEAT
    + f"loss = -{logistic('chosen')} - {logistic('-chosen')} / 2\n"
    + f"loss = (loss - {logistic('-rejected')} / 2).mean()",
    "robust": MARGIN + f"loss = 0.1 * {MINUS} - 0.9 * {PLUS}\nloss = loss.mean() / (1 - 2 * 0.1)",
    "bco_pair": HEAT + f"loss = -({logistic('chosen')} + {logistic('-rejected')}).mean()",
    "sppo_hard": SCORES
    + "loss = ((chosen - 0.5 / 0.1).square() + (rejected + 0.5 / 0.1).square()).mean()",
    "aot": LOGPROBS
    + """\
ours, theirs = ((x * mask).sum(-1).chunk(2) for x in (logprobs, ref))
margin = 0.1 * ((ours[0] - ours[1]).sort()[0] - (theirs[0] - theirs[1]).sort()[0])
"""
    + f"loss = -{PLUS}.mean()",
    "aot_unpaired": SCORES
    + f"margin = 0.1 * (chosen.sort()[0] - rejected.sort()[0])\nloss = -{PLUS}.mean()",
    "apo_zero": HEAT + "loss = (1 - chosen.sigmoid() + rejected.sigmoid()).mean()",
    "apo_down": HEAT + "loss = (chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()).mean()",
    "discopop": MARGIN
    + "blend = (margin / 0.05).sigmoid()\n"
    + f"loss = ((-margin).exp() * blend - {PLUS} * (1 - blend)).mean()",
    "sft": LOGPROBS
    + "chosen = mask & (torch.arange(len(mask), device=mask.device) < len(mask) // 2)[:, None]\n"
    + "loss = -logprobs[chosen].mean()",
    "sigmoid_norm": MEANS + f"loss = -{logistic('0.1 * (chosen - rejected)')}.mean()",
}
SMOOTHED = ("exo_pair", "robust")


def row_of(kind: str, code: str) -> Row:
    options = {"label_smoothing": 0.1} if kind in SMOOTHED else {}
    extra = "".join(f", {name}={value}" for name, value in options.items())
    option = f'DPOTrainer, loss_type="{kind}"{extra}'
    return Row("TRL 1.16", option, dpo(loss_type=[kind], beta=0.1, **options), code)


ROWS = [row_of(kind, code) for kind, code in CODES.items()]
