"""Which extra of the distribution installs a module, and the error for a missing one."""

from __future__ import annotations

EXTRA_OF = {
    "annotated_types": "train",
    "cloudpickle": "train",
    "datasets": "train",
    "huggingface_hub": "train",
    "jinja2": "train",
    "pandas": "train",
    "pyarrow": "train",
    "pydantic": "train",
    "rich": "train",
    "safetensors": "train",
    "tokenizers": "train",
    "transformers": "train",
    "yaml": "train",
    "bitsandbytes": "optim",
    "flash_attn": "flash-attn",
    "mlflow": "trackers",
    "peft": "peft",
    "tensorboard": "trackers",
    "trackio": "trackers",
    "triton": "triton",
    "trl": "trl",
    "verl": "verl",
    "vllm": "vllm",
    "wandb": "trackers",
}


def missing(error: ImportError) -> str | None:
    """One sentence with the `pip install` command; None if `error` is about another module."""
    module = (error.name or "").partition(".")[0]
    extra = EXTRA_OF.get(module)
    if extra is None:
        return None
    state = "which is not installed"
    if not isinstance(error, ModuleNotFoundError) or error.name != module:
        state = f"and what is installed does not fit ({error})"  # too old, as a rule
    return needs(module, state)


def needs(module: str, state: str = "which is not installed") -> str:
    """The sentence for a module that an extra installs."""
    extra = EXTRA_OF[module]
    who = "the trainer" if extra == "train" else "what was asked for"
    return f"{who} needs {module}, {state}: pip install 'spo-kernels[{extra}]'"
