"""What the nodes of a forest are worth, without the run that grew it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spo import named
from spo.config.credit import Rule
from spo.config.recipe import Recipe
from spo.credit.nodes import check_credit, of_nodes
from spo.credit.values import Values
from spo.records import Forest, Origin

RuleLike = Rule | Recipe | str
"""A rule, a recipe that has one, or a rule's name: `values`, `module:Name`, `./file.py:Name`."""


class NeedsModels(ValueError):
    """A rule asks for the models of the run, which a forest does not hold."""


class _NoModels:
    def score(self, names: Sequence[str], *_: Any, **__: Any) -> list[Tensor]:
        raise NeedsModels(
            "credit: expected a rule that reads the forest alone, such as values, found one that "
            f"asks for the run's models ({', '.join(names)})"
        )


def rule_of(rule: RuleLike) -> Rule:
    """The rule that is meant, with its default settings if it is named.

    Raises ValueError if there is none.
    """
    if isinstance(rule, str):
        return named.build(named.find("credit.type", rule), {}, "credit", f"credit.type={rule}")
    found = rule.credit if isinstance(rule, Recipe) else rule
    if not isinstance(found, Rule):
        raise ValueError(f"rule: expected a name, a Rule or a Recipe, found {found!r}")
    return found


def rule_of_origin(origin: Origin | None) -> Rule:
    """The rule of a forest's recipe; `Values()` if it is not known or a model must be trained.

    A rule from outside of the package counts as not known: reading a file imports no code.
    """
    settings = dict(origin.credit) if origin is not None else {}
    name = settings.pop("type", None)
    if name not in named.OWN["credit.type"]:
        return Values()
    rule = named.build(named.find("credit.type", name), settings, "credit")
    return rule if rule.critic is None else Values()


def node_values(forest: Forest, rule: Rule) -> Tensor:
    """(S,) fp32, the values of `rule` if it is of differences of values, else of `Values()`."""
    return (rule if isinstance(rule, Values) else Values()).values(forest)


def node_advantages(forest: Forest, rule: Rule) -> Tensor:
    """(S,) fp32, each node's credit: the largest of its tokens' by magnitude, with its sign.

    Raises NeedsModels, or ValueError if the rule cannot credit the forest.
    """
    if not forest.num_nodes:
        return torch.zeros(0)
    credit = rule.assign(forest, _NoModels())
    check_credit(forest, credit)
    return of_nodes(forest, credit.tokens)
