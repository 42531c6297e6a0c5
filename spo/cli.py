"""The command line: spo train | eval | rollout | view | compare | export | grade.

Bad input ends with one sentence on stderr and exit code 2; a run that cannot go on, with code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from spo.grade import grade, grade_options
from spo.reward import FailedReward

_with_source = warnings.formatwarning
console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 110  # files and pipes have no width of their own


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spo`; returns the exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    several = getattr(arguments, "overrides", getattr(arguments, "recipes", None))
    if several is None or any(word.startswith("-") for word in rest):
        arguments = parser.parse_args(argv)  # names the unknown option
    else:
        several += rest  # overrides after an option
    warnings.formatwarning = _sentence
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


def _sentence(message: object, category: type[Warning], filename: str, *where: Any) -> str:
    """A warning of this package as one sentence; others as Python prints them.

    What a `FailedReward` shows below its sentence keeps its lines.
    """
    if Path(__file__).parent in Path(filename).parents:
        text, end, shown = str(message), "", ""
        if issubclass(category, FailedReward):
            text, end, shown = text.partition("\n")
        return f"spo: warning: {' '.join(text.split())}\n{shown}{end}"
    return _with_source(message, category, filename, *where)  # pyright: ignore[reportArgumentType]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spo",
        description="Train language models with Segment Policy Optimization, GRPO and others.",
        epilog="`spo train --help` explains a command. A first run: spo train demo-tree "
        "engine.name=hf",
    )
    shipped = ", ".join(sorted(p.stem for p in (Path(__file__).parent / "recipes").glob("*.yaml")))
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run, text: str, recipe: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if recipe:
            sub.add_argument(
                "recipe",
                help=f"YAML file, or the name of a recipe that ships: {shipped}, and those of the "
                "paper and of cards in spo/recipes/paper/ and spo/recipes/cards/",
            )
            sub.add_argument(
                "overrides",
                nargs="*",
                metavar="key=value",
                help="settings in place of the recipe's, such as policy.path=MODEL engine.name=hf "
                "train.learning_rate=1e-6; they are documented in spo/config/, spo/grow/ (shapes) "
                "and spo/credit/ (rules)",
            )
        return sub

    sub = command("train", _train, "train a policy; the run goes to out=FOLDER, or runs/<name>")
    sub.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    sub.add_argument(
        "--dry-run", action="store_true", help="print downloads, memory and tokens, then stop"
    )
    sub.add_argument("--card", help="of --dry-run: GB to fit into, or a name such as h100")
    sub = command("eval", _eval, "Pass@1 of a policy or of a run's checkpoint on the test split")
    sub.add_argument("--checkpoint", type=Path, help="run folder; default: the recipe's policy")
    sub.add_argument(
        "--samples",
        type=int,
        help="also Pass@1, Pass@k and majority vote of this many samples per problem; default: "
        "eval.samples if above 1",
    )
    sub.add_argument("--temperature", type=float, help="of --samples; default: the recipe's")
    sub.add_argument(
        "--max-new-tokens", default="", help="limits such as 2048,4096; default: the recipe's"
    )
    sub.add_argument("--json", type=Path, help="also write the result to this file")
    sub = command(
        "rollout", _rollout, "sample one iteration's trees of responses, as training does"
    )
    sub.add_argument(
        "-o", "--output", type=Path, default=Path("forest.safetensors"), help="default: %(default)s"
    )
    sub = command("view", _view, "write an HTML page of a forest or of a run", recipe=False)
    sub.add_argument("path", type=Path, help="forest file, or a run folder")
    sub.add_argument("-o", "--output", type=Path, help="default: beside the input")
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings in place of that recipe's"
    )
    sub.add_argument(
        "--recipe", type=Path, help="of a forest; default: that of its run, else the file's own"
    )
    sub = command(
        "compare",
        _compare,
        "train several recipes on one engine, report side by side",
        recipe=False,
    )
    sub.add_argument(
        "recipes", nargs="+", help="files or names, and key=value overrides for all of them"
    )
    sub.add_argument("--out", type=Path, help="default: runs/compare-<time>")
    sub.add_argument("--json", type=Path, help="also write all evaluations to this file")
    text = "write a trained policy as a folder with a model card"
    _export_options(command("export", _export, text, recipe=False))
    grade_options(command("grade", grade, "grade a file of responses, compare graders", False))
    return parser


def _export_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", type=Path, help="run folder, or one checkpoint of a run")
    sub.add_argument("-o", "--output", type=Path, help="default: export in the run folder")
    sub.add_argument("--checkpoint", help="iter-000010 or best; default: the newest")
    sub.add_argument("--dtype", default="stored", help="stored (the default), bfloat16 or float32")
    sub.add_argument("--merge", action="store_true", help="merge adapters into the weights")
    sub.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload it; -o keeps the folder")
    sub.add_argument("--private", action="store_true", help="if the hub's model is made now")


def _quiet() -> None:
    """Switch off the libraries' progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _recipe(arguments):
    """The recipe, before what takes seconds to import: typing errors are answered at once."""
    from spo.config.recipe import load_recipe

    return load_recipe(arguments.recipe, arguments.overrides)


def _train(arguments) -> None:
    recipe = _recipe(arguments)
    from spo.api import train
    from spo.fit import card_bytes
    from spo.plan import describe
    from spo.report.pages import write_run_page

    _quiet()
    if arguments.dry_run:
        card = arguments.card and card_bytes(arguments.card)
        console.print(describe(recipe, card), markup=False)
        return
    if arguments.card:
        raise ValueError(f"--card: expected --dry-run beside it, found {arguments.card} alone")
    train(recipe, resume=arguments.resume, report=lambda line: show(recipe.name, line))
    if int(os.environ.get("RANK", 0)):  # the first of torchrun's processes writes the files
        return
    console.print(f"run folder: {recipe.out_dir}")
    console.print(f"report:     {write_run_page(recipe.out_dir)}")


def _eval(arguments) -> None:
    recipe = _recipe(arguments)
    from spo.api import evaluate
    from spo.learn.checkpoint import versions
    from spo.metrics import finite_tree
    from spo.report.evaluation import evaluation_table

    _quiet()
    _writable(arguments.json)
    results = evaluate(
        recipe,
        checkpoint=arguments.checkpoint,
        limits=_token_limits(arguments.max_new_tokens),
        samples=arguments.samples,
        temperature=arguments.temperature,
    )
    policy = str(arguments.checkpoint or recipe.policy.path)
    console.print(evaluation_table(f"{recipe.task}, {policy}", results))
    if arguments.json is not None:
        rows = [finite_tree(dataclasses.asdict(row)) for row in results]
        head = {"task": recipe.task, "policy": policy, "engine": recipe.engine.name}
        saved = head | {"results": rows, "versions": versions()}
        arguments.json.write_text(json.dumps(saved, indent=1))


def _token_limits(text: str) -> list[int]:
    """The numbers of --max-new-tokens."""
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise ValueError(
            f"--max-new-tokens: expected numbers such as 2048,4096, found {text!r}"
        ) from None


def _writable(path: Path | None) -> None:
    """Check and make the folder of a result before the work, so that the result is not lost."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file")
    path.parent.mkdir(parents=True, exist_ok=True)


def _rollout(arguments) -> None:
    recipe = _recipe(arguments)
    from spo.api import rollout

    _quiet()
    _writable(arguments.output)
    forest, cost = rollout(recipe)
    forest.save(arguments.output)
    counted = cost.engine
    console.print(
        f"{cost.trees} trees, {forest.num_nodes} nodes in {cost.seconds:.1f} s; "
        f"{cost.dropped_prompts} prompts dropped, {cost.too_long} do not fit, "
        f"{cost.truncated} responses cut"
    )
    console.print(
        f"{counted['generated']:,.0f} tokens generated, {counted['prefill']:,.0f} prefilled "
        f"(of them {cost.recomputed:,.0f} recomputed), {counted['cached']:,.0f} cached"
    )
    console.print(
        f"{counted['running'] / max(counted['steps'], 1):.1f} of {recipe.engine.max_num_seqs} "
        f"slots in use per step; the loop itself took {cost.loop_seconds:.2f} s"
    )
    console.print(f"forest: {arguments.output}")


def _view(arguments) -> None:
    from spo.report.pages import write_forest_page, write_run_page

    _quiet()
    path, output = arguments.path, arguments.output
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_dir():
        if arguments.recipe or arguments.overrides:
            raise ValueError(f"view: expected no recipe, as the run folder {path} has one")
        written = write_run_page(path, output)
    else:
        written = write_forest_page(path, arguments.recipe, arguments.overrides, output)
    console.print(f"report: {written}")


def _compare(arguments) -> None:
    from spo.api import compare
    from spo.config.recipe import load_recipe
    from spo.learn.checkpoint import versions
    from spo.report.compare import accuracy_table, verdict
    from spo.report.pages import write_comparison_page

    _quiet()
    overrides = [word for word in arguments.recipes if "=" in word]
    recipes = [load_recipe(word, overrides) for word in arguments.recipes if "=" not in word]
    out = arguments.out or Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    _writable(arguments.json)
    start = time.perf_counter()
    results = compare(recipes, out, show)
    page = write_comparison_page(results, out)
    console.print(accuracy_table(results))
    console.print(verdict(results))
    if arguments.json is not None:
        evals = {n: [x for x in lines if x["stage"] == "eval"] for n, lines in results.items()}
        seconds = time.perf_counter() - start
        record = {"runs": evals, "engine": recipes[0].engine.name, "seconds": seconds}
        arguments.json.write_text(json.dumps(record | {"versions": versions()}, indent=1))
    console.print(f"{time.perf_counter() - start:.0f} s in all; report: {page.resolve()}")


def _export(arguments) -> None:
    from spo.publish.folder import export
    from spo.publish.hub import push_to_hub

    _quiet()
    chosen = {name: getattr(arguments, name) for name in ("checkpoint", "dtype", "merge")}
    if arguments.push_to_hub is None:
        if arguments.private:
            raise ValueError("--private: expected --push-to-hub OWNER/NAME beside it, found none")
        console.print(f"folder: {export(arguments.path, arguments.output, **chosen)}")
        return
    name, output = arguments.push_to_hub, arguments.output
    address = push_to_hub(arguments.path, name, output, private=arguments.private, **chosen)
    console.print(f"pushed: {address}")


def show(name: str, line: dict) -> None:
    """Print one metrics line as live progress."""
    from spo.metrics import plus_minus, scored

    head = f"{name:>10} {line['iteration']:4d} {line['generated_tokens'] / 1000:7.0f}k tokens "
    if line["stage"] == "eval":
        scores = [f"{key} {plus_minus(line[key], line[f'{key}_stderr'])}" for key in scored(line)]
        text = f"Pass@1 {', '.join(scores)}"
        if line.get("too_long"):
            text += f", {line['too_long']} problems do not fit"
        console.print(f"[bold]{head}{text}[/bold]")
        return
    if line["stage"] == "skipped":
        dropped, too_long = line["dropped_prompts"], line["too_long"]
        console.print(f"{head}skipped: {dropped} prompts dropped, {too_long} do not fit")
        return
    cut = f"cut {line['truncated']}  " if line["truncated"] else ""
    console.print(
        f"{head}reward {line['reward_mean']:.3f}  {cut}kept {line['kept_share']:.2f}  "
        f"zero-adv {line['zero_advantage_share']:.2f}  clip {line['clipfrac']:.3f}  "
        f"grad {line['grad_norm']:.2f}  {line['tokens_per_s']:.0f} tok/s  "
        f"{line['time_rollout']:.1f}+{line['time_train']:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
