"""Rewards of sums, for verl.

    python -m verl.trainer.main_ppo data.train_files=sums.parquet \\
        custom_reward_function.path=verl_script.py
"""

import re

ANSWER = re.compile(r"<answer> (\d+) </answer>")


def extract(solution_str):
    """The last answer, or None."""
    found = ANSWER.findall(solution_str)
    return found[-1] if found else None


def strict_score(solution_str, ground_truth):
    return 1.0 if extract(solution_str) == ground_truth else 0.0


def shaped_score(solution_str, ground_truth, extra_info):
    """The score that trains, and figures that are only logged."""
    answer = extract(solution_str)
    right, formatted = answer == ground_truth, answer is not None
    steps = solution_str.count("=")
    score = right + extra_info.get("bonus", 0.0) * formatted + 0.05 * steps
    return {"score": score, "acc": right, "format": formatted, "steps": steps}


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if data_source == "sums/strict":
        return strict_score(solution_str, ground_truth)
    if data_source in ("sums/shaped", "sums/long"):
        return shaped_score(solution_str, ground_truth, extra_info)
    raise NotImplementedError(f"Reward function is not implemented for {data_source=}")
