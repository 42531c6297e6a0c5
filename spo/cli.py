"""The command line: spo train | eval | rollout | view | compare.

Bad input ends with one sentence on stderr and exit code 2; a run that cannot go on, with 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 110  # files and pipes have no width of their own


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spo`; returns the exit code."""
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    several = getattr(arguments, "overrides", getattr(arguments, "recipes", None))
    if several is None or any(word.startswith("-") for word in more):
        arguments = parser.parse_args(argv)  # says what is unknown
    else:
        several += more  # those behind an option
    try:
        arguments.run(arguments)
    except (ValueError, TypeError) as error:
        return _fail(error, 2)
    except (RuntimeError, OSError, SafetensorError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        again = " --resume continues from the last checkpoint" if arguments.run is _train else ""
        return _fail(f"interrupted;{again}" if again else "interrupted", 130)
    return 0


def _fail(error: object, code: int) -> int:
    print(f"spo: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spo", description="Segment Policy Optimization")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run, text: str, recipe: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if recipe:
            sub.add_argument(
                "recipe", help="YAML file; every setting is documented in spo/config/recipe.py"
            )
            sub.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
        return sub

    sub = command("train", _train, "train a policy with a recipe")
    sub.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    sub.add_argument(
        "--dry-run", action="store_true", help="print downloads, memory and tokens, then stop"
    )
    sub = command("eval", _eval, "Pass@1 of a policy or of a run's checkpoint on the test split")
    sub.add_argument("--checkpoint", type=Path, help="run folder; default: the recipe's policy")
    sub.add_argument(
        "--samples", type=int, default=0, help="beside greedy, the mean over so many per problem"
    )
    sub.add_argument("--temperature", type=float, help="of --samples; default: the recipe's")
    sub.add_argument(
        "--max-new-tokens", default="", help="limits on the response, 2048,4096; default: recipe's"
    )
    sub.add_argument("--json", type=Path, help="also write the result there")
    sub = command("rollout", _rollout, "grow one iteration's forest and save it")
    sub.add_argument("-o", "--output", type=Path, default=Path("forest.safetensors"))
    sub = command("view", _view, "write an HTML page of a forest or of a run", recipe=False)
    sub.add_argument("path", type=Path, help="forest file, or a run folder")
    sub.add_argument("-o", "--output", type=Path, help="default: beside the input")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="of the forest's recipe")
    sub.add_argument(
        "--recipe", type=Path, help="what the forest was grown with; default: the run's around it"
    )
    sub = command(
        "compare",
        _compare,
        "train several recipes on one engine, report side by side",
        recipe=False,
    )
    sub.add_argument(
        "recipes", nargs="+", help="YAML files and key=value overrides for all of them"
    )
    sub.add_argument("--out", type=Path, help="default: runs/compare-<time>")
    sub.add_argument("--json", type=Path, help="also write every evaluation there")
    return parser


def _config(arguments):
    from spo.config.recipe import load_config

    return load_config(arguments.recipe, arguments.overrides)


def _quiet() -> None:
    """Keep libraries' progress bars out of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _train(arguments) -> None:
    from spo.loop import train

    _quiet()
    config = _config(arguments)
    if arguments.dry_run:
        from spo.plan import describe

        console.print(describe(config), markup=False)
        return
    train(config, resume=arguments.resume, report=lambda line: show(config.name, line))
    if int(os.environ.get("RANK", 0)):  # the first of torchrun's processes writes the files
        return
    console.print(f"run folder: {config.out_dir}")
    console.print(f"report:     {write_run_report(config.out_dir)}")


def _eval(arguments) -> None:
    from spo.grow.evaluate import accuracies
    from spo.grow.stream import RolloutOptions
    from spo.learn.checkpoint import latest_checkpoint, versions
    from spo.learn.model import load_tokenizer
    from spo.loop import engine_of
    from spo.metrics import finite
    from spo.tasks import prompts_of
    from spo.tasks.grading import Grader

    _quiet()
    config = _config(arguments)
    _writable(arguments.json)
    if arguments.samples < 0:
        raise ValueError(f"--samples: expected 0 or more, found {arguments.samples}")
    temperature = arguments.temperature
    if temperature is None:
        temperature = config.sampling.temperature
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature: expected 0 (greedy) or more, found {temperature:g}")
    limits = _limits(arguments.max_new_tokens) or [config.sampling.max_new_tokens]
    if arguments.checkpoint is not None:
        found = latest_checkpoint(arguments.checkpoint)
        if found is None:
            raise ValueError(f"--checkpoint: {arguments.checkpoint} holds no complete checkpoint")
        policy = dataclasses.replace(config.policy, path=str(found / "policy"))
        config = dataclasses.replace(config, policy=policy)
    tokenizer = load_tokenizer(config.policy)
    problems = list(islice(prompts_of(config, "test", tokenizer), config.eval.problems))
    found = []
    with closing(engine_of(config)) as engine, Grader() as grader:
        for heat, samples in ((0.0, 1), (temperature, arguments.samples)):
            if not samples:
                continue
            options = RolloutOptions(
                stop_token_ids=(tokenizer.eos_token_id,),
                temperature=heat,
                seed=config.train.seed,
            )
            found += accuracies(
                problems,
                engine,
                grader,
                lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
                options,
                limits,
                samples,
            )
    table = Table(title=f"{config.task}, {config.policy.path}: Pass@1")
    for column in ("max new tokens", "sampling", "Pass@1", "problems", "cut", "tokens"):
        table.add_column(column, justify="right")
    for row in found:
        table.add_row(
            f"{row.max_new_tokens:,}",
            f"{row.samples} at {row.temperature:g}" if row.temperature else "greedy",
            f"{row.pass_at_1:.3f} ± {row.stderr:.3f}",
            str(row.problems),
            f"{row.truncated:.1%}",
            f"{row.mean_tokens:.0f}",
        )
    console.print(table)
    if arguments.json is not None:
        result = {
            "task": config.task,
            "policy": config.policy.path,
            "engine": config.engine.name,
            "results": [
                {key: finite(value) for key, value in dataclasses.asdict(row).items()}
                for row in found
            ],
            "versions": versions(),
        }
        arguments.json.write_text(json.dumps(result, indent=1))


def _limits(text: str) -> list[int]:
    """The numbers of --max-new-tokens."""
    try:
        limits = [int(part) for part in text.split(",") if part]
    except ValueError:
        limits = [0]
    if any(limit < 1 for limit in limits):
        raise ValueError(f"--max-new-tokens: expected numbers such as 2048,4096, found {text!r}")
    return sorted(set(limits))


def _writable(path: Path | None) -> None:
    """Make the folder of a result before the work, so that the work is not lost for want of it."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)


def _rollout(arguments) -> None:
    from spo.grow.shapes import make_shape
    from spo.grow.stream import RolloutOptions, grow
    from spo.learn.model import load_policy, load_tokenizer, sequence_logprobs
    from spo.loop import engine_of
    from spo.tasks import prompts_of
    from spo.tasks.grading import Grader

    _quiet()
    config = _config(arguments)
    _writable(arguments.output)
    tokenizer = load_tokenizer(config.policy)
    model = load_policy(config.policy) if config.shape.rescore else None
    temperature = config.sampling.temperature
    stream = prompts_of(config, "train", tokenizer, config.train.seed)
    with closing(engine_of(config)) as engine, Grader() as grader:
        shape = make_shape(
            config.shape,
            config.advantage,
            config.sampling.max_new_tokens,
            tokenizer,
            rescore=lambda prefix, ids: sequence_logprobs(model, prefix, ids, temperature),
            align=engine.block_size if config.engine.align_segments else 1,
        )
        forest, cost = grow(
            list(islice(stream, config.train.prompts)),
            engine,
            shape,
            grader,
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            RolloutOptions(
                stop_token_ids=(tokenizer.eos_token_id,),
                temperature=temperature,
                seed=config.train.seed,
                truncated=config.sampling.truncated,
            ),
        )
    forest.save(arguments.output)
    counted = cost.engine
    console.print(
        f"{cost.trees} trees, {forest.num_nodes} nodes in {cost.seconds:.1f} s; "
        f"{cost.dropped_prompts} prompts dropped, {cost.truncated} responses cut"
    )
    console.print(
        f"{counted['generated']:,.0f} tokens generated, {counted['prefill']:,.0f} prefilled "
        f"(of them {cost.recomputed:,.0f} recomputed), {counted['cached']:,.0f} cached"
    )
    console.print(
        f"{counted['running'] / max(counted['steps'], 1):.1f} of {config.engine.max_num_seqs} "
        f"places in use per step; the loop itself took {cost.loop_seconds:.2f} s"
    )
    console.print(f"forest: {arguments.output}")


def _view(arguments) -> None:
    from spo.config.recipe import load_config
    from spo.learn.checkpoint import latest_checkpoint
    from spo.learn.model import load_tokenizer
    from spo.report import write_report

    _quiet()
    if not arguments.path.exists():
        raise ValueError(f"{arguments.path} does not exist")
    if arguments.path.is_dir():
        if arguments.recipe or arguments.overrides:
            raise ValueError(f"view: {arguments.path} is a run folder, which has its own recipe")
        console.print(f"report: {write_run_report(arguments.path, arguments.output)}")
        return
    run = latest_checkpoint(arguments.path.parent)
    config = load_config(arguments.recipe or (run and run / "recipe.yaml"), arguments.overrides)
    tokenizer = load_tokenizer(config.policy)
    view = tree_view(arguments.path.stem, arguments.path, config, tokenizer)
    output = arguments.output or arguments.path.with_suffix(".html")
    write_report(output, [], [view], title=arguments.path.name)
    console.print(f"report: {output}")


def _compare(arguments) -> None:
    from spo.config.recipe import load_config
    from spo.learn.checkpoint import versions
    from spo.loop import engine_of, train
    from spo.report import RunCurve, write_report
    from spo.report.compare import accuracy_table, verdict

    _quiet()
    recipes = [r for r in arguments.recipes if "=" not in r]
    overrides = [r for r in arguments.recipes if "=" in r]
    out = arguments.out or Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    configs = [load_config(recipe, overrides) for recipe in recipes]
    if not configs:
        raise ValueError("compare: expected at least one recipe")
    if len({config.name for config in configs}) < len(configs):
        raise ValueError("compare: the recipes' names must differ")
    configs = [dataclasses.replace(c, out=str(out / c.name)) for c in configs]
    shared = {(c.engine, c.policy) for c in configs}
    if len(shared) > 1:
        raise ValueError("compare: the recipes must agree on policy and engine")
    start = time.perf_counter()
    console.print(f"starting {configs[0].engine.name} …")
    engine = engine_of(configs[0])
    results = {}
    try:
        for config in configs:
            results[config.name] = train(
                config, engine=engine, report=lambda line, name=config.name: show(name, line)
            )
    finally:
        engine.close()
    views = []
    for config in configs:
        views += run_views(Path(config.out_dir), config.name)
    report = out / "report.html"
    curves = [RunCurve(name, lines) for name, lines in results.items()]
    write_report(report, curves, views, title="SPO: " + " and ".join(results))
    console.print(accuracy_table(results))
    console.print(verdict(results))
    if arguments.json is not None:
        evals = {n: [x for x in lines if x["stage"] == "eval"] for n, lines in results.items()}
        seconds = time.perf_counter() - start
        record = {"runs": evals, "engine": configs[0].engine.name, "seconds": seconds}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record | {"versions": versions()}, indent=1))
    console.print(f"{time.perf_counter() - start:.0f} s in all; report: {report.resolve()}")


def show(name: str, line: dict) -> None:
    """Print one metrics line as live progress."""
    head = f"{name:>10} {line['iteration']:4d} {line['generated_tokens'] / 1000:7.0f}k tokens "
    if line["stage"] == "eval":
        text = f"Pass@1 greedy {line['greedy']:.3f} ± {line['greedy_stderr']:.3f}"
        if "sampled" in line:
            text += f", sampled {line['sampled']:.3f} ± {line['sampled_stderr']:.3f}"
        console.print(f"[bold]{head}{text}[/bold]")
        return
    console.print(
        f"{head}reward {line['reward_mean']:.3f}  kept {line['kept_share']:.2f}  "
        f"zero-adv {line['zero_advantage_share']:.2f}  clip {line['clipfrac']:.3f}  "
        f"grad {line['grad_norm']:.2f}  {line['tokens_per_s']:.0f} tok/s  "
        f"{line['time_rollout']:.1f}+{line['time_train']:.1f} s"
    )


def write_run_report(run: Path, output: Path | None = None) -> Path:
    """The HTML page of one run folder."""
    from spo.metrics import read_metrics
    from spo.report import RunCurve, write_report

    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        raise ValueError(f"{run} is not a run folder: it holds no metrics.jsonl")
    output = output or run / "report.html"
    curves = [RunCurve(run.name, read_metrics(metrics))]
    write_report(output, curves, run_views(run, run.name), title=run.name)
    return output


def run_views(run: Path, name: str) -> list:
    """The first and the last forest of a run, ready to show."""
    from spo.config.recipe import load_config
    from spo.learn.checkpoint import latest_checkpoint
    from spo.learn.model import load_tokenizer

    found = latest_checkpoint(run)
    if found is None:
        return []
    config = load_config(found / "recipe.yaml")
    tokenizer = load_tokenizer(config.policy)
    views = []
    for when in ("first", "last"):
        path = run / f"forest-{when}.safetensors"
        if path.exists():
            views.append(tree_view(f"{name}, {when} iteration", path, config, tokenizer))
    return views


def tree_view(title: str, path: os.PathLike, config, tokenizer):
    """A forest file with the values and advantages of a recipe, ready to show."""
    from spo.credit.values import assign
    from spo.records import Forest
    from spo.report import TreeView

    forest = Forest.load(path)
    values, advantages = assign(forest, config.advantage)
    kept = None
    if config.loss.prob_threshold is not None:
        kept = forest.rollout_logprobs < math.log(config.loss.prob_threshold)
    return TreeView(title, forest, values, advantages, tokenizer.decode, kept)


if __name__ == "__main__":
    sys.exit(main())
