"""GRPO on sums with TRL.

python trl_script.py --data sums.jsonl            # prompts are texts
python trl_script.py --data chats.jsonl --chat    # prompts are messages
"""

import argparse
import asyncio
import re

ANSWER = re.compile(r"<answer> (\d+) </answer>")


def format_reward(completions, **kwargs):
    """Whether each completion has an answer in its tags."""
    return [1.0 if ANSWER.search(completion) else 0.0 for completion in completions]


def accuracy_reward(completions, ground_truth, **kwargs):
    """Whether the answer is the column `ground_truth`."""
    matches = [ANSWER.search(completion) for completion in completions]
    found = [match.group(1) if match else "" for match in matches]
    return [1.0 if f == truth else 0.0 for f, truth in zip(found, ground_truth, strict=True)]


def length_reward(prompts, completions, **kwargs):
    """Less for a completion that is long beside its prompt."""
    return [-len(c) / len(p) for p, c in zip(prompts, completions, strict=True)]


def chat_format_reward(completions, **kwargs):
    """The same as `format_reward`, of chats."""
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if ANSWER.search(content) else 0.0 for content in contents]


def chat_accuracy_reward(prompts, completions, answer, **kwargs):
    """1 for the right number, 0.5 for one of the numbers of the question."""
    rewards = []
    for prompt, completion, truth in zip(prompts, completions, answer, strict=True):
        assert completion[0]["role"] == "assistant"
        match = ANSWER.search(completion[0]["content"])
        if match is None:
            rewards.append(0.0)
        elif int(match.group(1)) == truth:
            rewards.append(1.0)
        else:
            rewards.append(0.5 if match.group(1) in prompt[-1]["content"].split() else 0.0)
    return rewards


def hard_reward(completions, completion_ids, level, **kwargs):
    """Of hard problems only: working them out earns a bonus. Others are None, which is no zero."""
    return [
        None if kind == "easy" else min(len(ids), 20) / 20
        for ids, kind in zip(completion_ids, level, strict=True)
    ]


async def judge_reward(prompts, completions, completion_ids, **kwargs):
    """Asks a judge about all completions at the same time."""

    async def ask(prompt, ids):
        await asyncio.sleep(0.01)  # a request
        return (sum(ids) + len(prompt)) % 7 / 7

    asked = [ask(prompt, ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]
    return await asyncio.gather(*asked)


TEXT_REWARDS = {
    format_reward: 0.2,
    accuracy_reward: 1.0,
    length_reward: 0.01,
    hard_reward: 0.3,
    judge_reward: 0.1,
}
CHAT_REWARDS = {
    chat_format_reward: 0.2,
    chat_accuracy_reward: 1.0,
    hard_reward: 0.3,
    judge_reward: 0.1,
}


def main():
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer

    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--chat", action="store_true")
    arguments = parser.parse_args()
    rewards = CHAT_REWARDS if arguments.chat else TEXT_REWARDS
    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=list(rewards),
        args=GRPOConfig(output_dir="grpo", reward_weights=list(rewards.values())),
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
    )
    trainer.train()


if __name__ == "__main__":
    main()
