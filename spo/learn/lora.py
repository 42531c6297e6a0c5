"""Low-rank adapters (LoRA, arXiv 2106.09685) as the trained weights, by peft.

The adapters lie inside the policy's own layers, so that the packer, the head and the checks at load
work as without them. The reference is the same model without its adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from spo.config.lora import LoraConfig
from spo.config.policy import PolicyConfig
from spo.extras import needs

NAME = "default"  # of the adapter, as peft's from_pretrained calls it
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of names in an adapter's file, after the two wrappers of a PeftModel


def quantization(lora: LoraConfig) -> dict[str, Any]:
    """Options of `from_pretrained` that hold the weights in 4 bits; none if that is not asked.

    Raises ValueError with one sentence if bitsandbytes is missing.
    """
    if lora.quantize == "none":
        return {}
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"policy.lora.quantize: {needs('bitsandbytes')}")
    chosen = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=lora.quantize, bnb_4bit_use_double_quant=True
    )
    return {"quantization_config": chosen}


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing weights for inference: on CPUs with AVX512_BF16 it does so at
    the first forward without a gradient, and then there is none later.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def attach(model: PreTrainedModel, config: PolicyConfig, seed: int) -> None:
    """Give a loaded policy fresh adapters, in place: B is 0, so it computes what it did before.

    Adapters are fp32 whatever the model's type; only they train. Raises ValueError with one
    sentence for targets that the model does not have, or whose adapters the head cannot use.
    """
    if find_spec("peft") is None:
        raise ValueError(f"policy.lora: {needs('peft')}")
    from peft import inject_adapter_in_model

    assert config.lora is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(_settings(config, config.lora), model, NAME)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"policy.lora.targets: {reason}") from error
    trained = dict(adapter(model))
    if not trained:
        raise ValueError("policy.lora.targets: expected layers of the model, found none of them")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        if name in trained:
            parameter.data = parameter.data.float()
    vars(model)["fresh_adapter"] = {name: x.detach().clone() for name, x in adapter(model)}
    head: Any = model.get_output_embeddings()
    inputs: Any = model.get_input_embeddings()
    if _base(inputs) is not inputs or (_base(head) is not head and _tied(model)):
        raise ValueError(
            "policy.lora.targets: expected no embedding, and no head that shares its weight with "
            f"one, found {config.lora.targets}"
        )


def reset(model: PreTrainedModel) -> None:
    """Make the adapters fresh again, in place."""
    for name, parameter in adapter(model):
        parameter.data.copy_(vars(model)["fresh_adapter"][name])


def adapter(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The adapters' parameters by their names in the model."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            yield name, parameter


def merged(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The policy's tensors by the names that it has without adapters, W + scaling * B @ A as one.

    One layer is merged at a time.
    """
    layers = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        path, _, inside = name.rpartition(".base_layer.")
        if not path:
            yield name, parameter.detach()
        elif inside == "weight":
            layer: Any = layers[path]
            weight = _whole(layer.base_layer)
            delta = layer.get_delta_weight(NAME).detach()
            yield f"{path}.{inside}", (weight.float() + delta).to(weight.dtype)
        elif inside == "bias":
            yield f"{path}.{inside}", parameter.detach()


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model as it was before the adapters: the reference."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(folder: Path, config: PolicyConfig, model: PreTrainedModel) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads onto the start policy."""
    assert config.lora is not None
    folder.mkdir(parents=True)
    tensors = {_stored(name): p.detach().cpu().contiguous() for name, p in adapter(model)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    layers = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    settings = _settings(config, config.lora)
    settings.target_modules = layers  # "all-linear" has no meaning for other versions' models
    settings.inference_mode = True
    settings.save_pretrained(str(folder))


def load_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Give the adapters the weights of `save_adapter`. Raises ValueError if they are damaged."""
    try:
        saved = load_file(folder / WEIGHTS)
        with torch.no_grad():
            for name, parameter in adapter(model):
                parameter.copy_(saved.pop(_stored(name)))
        if saved:
            raise ValueError(f"it also holds {next(iter(saved))}")
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"checkpoint {folder.parent}: {WEIGHTS} is damaged, or of other policy.lora settings "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


def _settings(config: PolicyConfig, lora: LoraConfig) -> Any:
    from peft import LoraConfig as Settings

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return Settings(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.source,
    )


def _stored(name: str) -> str:
    """The name of an adapter's weight in its file."""
    return PREFIX + name.replace(f".{NAME}.", ".")


def _base(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _tied(model: PreTrainedModel) -> bool:
    head: Any = _base(model.get_output_embeddings())
    inputs: Any = _base(model.get_input_embeddings())
    return head.weight.data_ptr() == inputs.weight.data_ptr()


def _whole(layer: Any) -> Tensor:
    """The weight of a layer; dequantised if it is held in 4 or 8 bits."""
    if layer.weight.is_floating_point():
        return layer.weight.detach()
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach()
