"""Misspelled keywords, which models of transformers would swallow, are refused."""

import sys

import pytest
import torch

from spo_kernels.model_inputs import check_inputs


class Body(torch.nn.Module):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        return input_ids


class Model(torch.nn.Module):
    def __init__(self, body):
        super().__init__()
        self.base_model = body


def test_named_parameters_pass_and_others_do_not():
    model = Model(Body())
    check_inputs("caller", model, ["attention_mask", "input_ids"])
    for wrapped in (model, torch.compile(model), torch.nn.DataParallel(model)):
        with pytest.raises(TypeError) as error:
            check_inputs("caller", wrapped, ["temprature", "attention_mask", "batch_invariant"])
        assert str(error.value) == (
            "caller: expected inputs of Body or options of its own, "
            "found batch_invariant, temprature"
        )


class Opaque(torch.nn.Module):
    def forward(self, *args, **kwargs):
        return args


def test_what_tells_nothing_passes():
    check_inputs("caller", Model(Opaque()), ["anything"])
    check_inputs("caller", torch.nn.Linear(2, 2), ["anything"])


def test_what_transformers_passes_on_to_its_layers_is_known(monkeypatch):
    """From whatever release is imported, and never imported here."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = transformers.LlamaForCausalLM(config)
    names = ["position_ids", "inputs_embeds", "use_cache", "cu_seq_lens_q", "max_length_k"]
    check_inputs("caller", model, [*names, "output_hidden_states", "return_dict"])
    with pytest.raises(TypeError, match="expected inputs of LlamaModel .*, found logit_softcap"):
        check_inputs("caller", model, ["position_ids", "logit_softcap"])
    monkeypatch.delitem(sys.modules, "transformers.modeling_flash_attention_utils", raising=False)
    monkeypatch.delitem(sys.modules, "transformers.utils")
    with pytest.raises(TypeError, match="found cu_seq_lens_q"):
        check_inputs("caller", model, ["position_ids", "cu_seq_lens_q"])
    assert "transformers.utils" not in sys.modules
