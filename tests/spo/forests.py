"""Random forests, and models in fp64 to train on them."""

import math

import torch
from transformers import AutoModelForCausalLM

from spo.credit.nodes import of_tokens
from spo.grow.assemble import assemble
from spo.grow.shapes import Node, Tree
from spo.learn.pack import pack
from spo.records import LENGTH, PROMPT, SEGMENT, STOP, Forest, Prompt

RHO = 0.9


def forest_of(parent, sizes, **fields):
    """One tree of nodes with these parents and lengths; what is not given is the same for all."""
    n = len(parent)
    plain = {
        "token_ids": torch.arange(2, 2 + sum(sizes), dtype=torch.int32),
        "rewards": torch.full((n,), math.nan),
        "in_value": torch.ones(n, dtype=torch.bool),
        "finish": torch.full((n,), STOP, dtype=torch.int8),
        "weight": torch.ones(n, dtype=torch.int32),
        "prompt": torch.zeros(n, dtype=torch.int32),
        "born": torch.zeros(n, dtype=torch.int32),
        "prompts": (Prompt((), None, "arithmetic"),),
    }
    cu_tokens = torch.tensor([0, *sizes]).cumsum(0)
    parent = torch.tensor(parent, dtype=torch.int32)
    return Forest(cu_tokens=cu_tokens, parent=parent, **plain | fields)


def packed(forest, advantages, budget, threshold=RHO, **options):
    """Batches and figures of a forest with (S,) advantages."""
    credit = of_tokens(forest, advantages)
    return pack(forest, credit, prob_threshold=threshold, tokens_per_batch=budget, **options)


def random_forest(seed, trees=2, nodes=9, longest=5, weights=False):
    """Trees with random parents, lengths and logprobs; about half the tokens pass the mask."""
    g = torch.Generator().manual_seed(seed)

    def draw(high):
        return int(torch.randint(high, (1,), generator=g))

    parent, prompt, sizes, finish = [], [], [], []
    for tree in range(trees):
        first = len(parent)
        for i in range(nodes):
            parent.append(-1 if i == 0 else first + draw(i))
            prompt.append(tree)
            sizes.append(1 + draw(longest))
            finish.append(PROMPT if i == 0 else SEGMENT)
    total = sum(sizes)
    roots = torch.tensor(parent) < 0
    logprobs = math.log(RHO) + 0.2 * torch.randn(total, generator=g).float()
    forest = forest_of(
        parent,
        sizes,
        token_ids=torch.randint(2, 48, (total,), generator=g, dtype=torch.int32),
        rollout_logprobs=logprobs.clamp(max=-1e-3),
        in_value=~roots,
        trained=~roots & (torch.rand(len(parent), generator=g) < 0.7),
        finish=torch.tensor(finish, dtype=torch.int8),
        weight=torch.tensor([1 + draw(3) if weights else 1 for _ in parent], dtype=torch.int32),
        prompt=torch.tensor(prompt, dtype=torch.int32),
        prompts=tuple(Prompt((), None, "arithmetic") for _ in range(trees)),
    )
    advantages = torch.randn(len(parent), generator=g)
    advantages[torch.rand(len(parent), generator=g) < 0.2] = 0.0
    return forest, torch.where(forest.trained, advantages, 0.0)


def stars(*prompts):
    """One star per prompt, of (token_ids, reward) responses; a NaN reward does not train."""
    trees = []
    for index, leaves in enumerate(prompts):
        trees.append(Tree(index, Prompt((2, 3 + index), "1", "arithmetic")))
        for ids, reward in leaves:
            known = reward == reward
            finish = STOP if known else LENGTH
            logprobs = (-1.0,) * len(ids)
            trees[-1].nodes.append(Node(0, ids, logprobs, known, known, finish, 0, reward))
    return assemble(trees, 1.0)


class Norm(torch.nn.Module):
    """transformers' RMSNorm computes in fp32 whatever it is given; this one stays in fp64."""

    def __init__(self, old):
        super().__init__()
        self.weight, self.eps = old.weight, old.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def load_fp64(folder, attention):
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float64
    )
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Qwen2RMSNorm":
            model.set_submodule(name, Norm(module))
    return model
