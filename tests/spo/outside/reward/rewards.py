"""Reward functions as users have them: of this package's signature, of TRL's and of verl's."""

import asyncio
import time


def share(prompt, response, answer, **columns):
    """The share of the prompt's words that the response repeats."""
    words = prompt.split()
    return sum(word in response.split() for word in words) / len(words)


def shorter(response_ids, num_tokens, truncated, most=10):
    assert len(response_ids) == num_tokens
    return -num_tokens / most - truncated


def trl(prompts, completions, answer, **kwargs):
    return [float(c.strip().endswith(str(a))) for c, a in zip(completions, answer, strict=True)]


def trl_without_prompts(completions, **kwargs):
    assert {"prompts", "completion_ids"} <= kwargs.keys()
    return [len(completion) for completion in completions]


def trl_chat(prompts, completions, **kwargs):
    assert prompts[0][-1]["role"] == "user" and "prompt" not in kwargs
    return [len(completion[0]["content"]) for completion in completions]


def trl_of_some(prompts, completions, kind, **kwargs):
    """None for rows of another kind."""
    return [1.0 if k == "mine" else None for k in kind]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    right = solution_str.strip() == str(ground_truth)
    return {"score": float(right), "acc": right} if data_source == "mine" else 0.0


def compute_scores(data_sources, solution_strs, ground_truths, extra_infos):
    return [float(s.strip() == str(g)) for s, g in zip(solution_strs, ground_truths, strict=True)]


async def judge(response):
    await asyncio.sleep(0.05)
    return len(response) / 10


async def judges(prompts, completions, **kwargs):
    await asyncio.sleep(0.05)
    return [len(completion) / 10 for completion in completions]


def of_columns(response, level, hints=()):
    return level + len(hints)


def unruly(response):
    if response == "raise":
        raise KeyError("lost")
    if response == "hang":
        time.sleep(1000)
    return {"nan": float("nan"), "text": "much", "none": None}.get(response, 0.5)


def positional(response, /):
    return 0.0


def any_positional(*everything):
    return 0.0


NOT_A_FUNCTION = 3
