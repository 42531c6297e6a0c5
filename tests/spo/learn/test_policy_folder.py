"""A checkpoint's policy folder: the start policy's files and dtypes around the trained weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling import tiny_policy
from tokenizers import Tokenizer, models, pre_tokenizers
from trained import trained_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from spo.config.recipe import load_recipe
from spo.learn.checkpoint import State, latest_checkpoint
from spo.learn.distributed import Ranks
from spo.learn.learner import Learner
from spo.records import Replay

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
# A Llama 3 folder as transformers 4 wrote it; version 5 writes rope_parameters in their place.
ROPE = {
    "rope_theta": 1000000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def write(folder, kind="llama", dtype="bfloat16", **more):
    """A small policy's folder with what the hub's folders hold besides."""
    tiny_policy(folder, kind, eos_token_id=1, dtype=dtype)
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("rope_parameters", None)
    settings["torch_dtype"] = settings.pop("dtype")
    path.write_text(json.dumps(settings | ROPE | more))
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w1").save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tools")
    for name in ("special_tokens_map.json", "preprocessor_config.json", "added_tokens.json"):
        (folder / name).write_text("{}")
    for name in ("merges.txt", "tokenizer.model", "modeling_own.py"):
        (folder / name).write_text(name)
    return folder


def learner_of(folder, out, *more):
    recipe = load_recipe(None, [f"policy.path={folder}", f"out={out}", *more])
    return Learner(recipe, Ranks())


def saved(learner):
    """The checkpoint of a learner whose weights have moved by less than bf16 can hold."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn_like(parameter))
    out = learner.recipe.out_dir
    out.mkdir(exist_ok=True)
    learner.save(State(policy=learner.recipe.policy.content()), Replay())
    return latest_checkpoint(out)


def logits(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(torch.arange(2, 42)[None]).logits


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".safetensors"
    }


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def checkpoint(start, tmp_path_factory):
    """Of a bf16 policy trained in fp32."""
    return saved(learner_of(start, tmp_path_factory.mktemp("run")))


def test_every_file_but_the_weights_is_the_start_policys(start, checkpoint):
    assert files(checkpoint / "policy") == files(start)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "policy")
    chat = [{"role": "user", "content": "w3 w4"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "w3 w4"


def test_weights_are_rounded_to_the_start_policys_type(checkpoint):
    exact, stored = trained_weights(checkpoint.parents[1]), checkpoint / "policy"
    tensors = load_file(stored / "model.safetensors")
    assert tensors.keys() == exact.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16 and exact[name].dtype == torch.float32
        assert torch.equal(tensor, exact[name].bfloat16())
    assert any(not torch.equal(tensors[name].float(), x) for name, x in exact.items())
    assert logits(stored).dtype == torch.bfloat16


def test_frequencies_and_sizes_are_read_from_the_original_configuration(checkpoint):
    """The trained model's own logits, from the folder alone, in fp32."""
    settings = json.loads((checkpoint / "policy" / "config.json").read_text())
    assert settings["rope_theta"] == 1e6 and "rope_parameters" not in settings
    found = logits(checkpoint / "policy", dtype=torch.float32)
    learner = learner_of(checkpoint / "policy", "unused")
    learner.model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = learner.model(torch.arange(2, 42)[None]).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_a_resumed_policy_has_every_bit(start, checkpoint, tmp_path):
    recipe = load_recipe(None, [f"policy.path={start}", f"out={tmp_path}"])
    resumed = Learner(recipe, Ranks(), checkpoint)
    exact = trained_weights(checkpoint.parents[1])
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, exact[name])


@pytest.mark.parametrize("kept, trained", [("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_weights_that_lose_nothing_are_kept_once(tmp_path, kept, trained):
    folder = write(tmp_path / "start", dtype=kept)
    found = saved(learner_of(folder, tmp_path / "run", f"policy.dtype={trained}"))
    tensors = load_file(found / "policy" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, kept)}
    assert not (found / "weights.safetensors").exists()


def test_mixed_types_stay_mixed(tmp_path):
    """A norm that the start policy holds in fp32 beside bf16 weights."""
    folder = write(tmp_path / "start")
    path = folder / "model.safetensors"
    mixed = {n: x.float() if "norm" in n else x for n, x in load_file(path).items()}
    save_file(mixed, path, metadata={"format": "pt"})
    found = saved(learner_of(folder, tmp_path / "run"))
    tensors = load_file(found / "policy" / "model.safetensors")
    assert {n: x.dtype for n, x in tensors.items()} == {n: x.dtype for n, x in mixed.items()}
    lost = load_file(found / "weights.safetensors")
    assert lost.keys() == {name for name in mixed if "norm" not in name}


def test_a_configuration_that_is_not_the_saved_models_is_written_anew(tmp_path):
    folder = write(tmp_path / "start")
    learner = learner_of(folder, tmp_path / "run")
    learner.model.config.rms_norm_eps = 1e-5
    found = saved(learner) / "policy"
    settings = json.loads((found / "config.json").read_text())
    assert settings["rms_norm_eps"] == 1e-5 and settings["dtype"] == "bfloat16"
    assert files(found).keys() == files(folder).keys()
    assert (found / "generation_config.json").read_text().startswith('{"eos_token_id": [1, 2]')


def test_experts_that_transformers_joins_are_saved_one_by_one(tmp_path):
    folder = tmp_path / "start"
    tiny_policy(folder, "mixtral", eos_token_id=1, dtype="bfloat16")
    learner = learner_of(folder, tmp_path / "run")
    found = saved(learner)
    before, after = (load_file(x / "model.safetensors") for x in (folder, found / "policy"))
    assert {n: (x.dtype, x.shape) for n, x in after.items()} == {
        n: (x.dtype, x.shape) for n, x in before.items()
    }
    assert len(after) > len(dict(learner.model.named_parameters()))
    resumed = Learner(learner.recipe, Ranks(), found).model
    for mine, exact in zip(resumed.parameters(), learner.model.parameters(), strict=True):
        assert torch.equal(mine, exact)


def test_a_model_with_code_of_its_own_keeps_it(tmp_path):
    folder = tmp_path / "start"
    tiny_policy(folder, "llama", eos_token_id=1, dtype="bfloat16")
    (folder / "names_own.py").write_text("TYPE = 'own'\n")
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nfrom .names_own import TYPE\n"
        "class OwnConfig(LlamaConfig):\n    model_type = TYPE\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    path = folder / "config.json"
    code = {"AutoConfig": "configuration_own.OwnConfig"}
    code |= {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": code}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    learner = learner_of(folder, tmp_path / "run", "policy.trust_remote_code=true")
    found = saved(learner)
    assert files(found / "policy") == files(folder)
    assert type(Learner(learner.recipe, Ranks(), found).model).__name__ == "OwnForCausalLM"


def test_types_of_a_bare_bodys_files_are_kept(tmp_path):
    """Norms in fp32 beside bf16, in files that name the body's weights without its prefix."""
    folder = write(tmp_path / "start")
    path = folder / "model.safetensors"
    bare = {
        name.removeprefix("model."): tensor.float() if "norm" in name else tensor.bfloat16()
        for name, tensor in load_file(path).items()
        if name != "lm_head.weight"
    }
    save_file(bare, path, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(settings))
    found = saved(learner_of(folder, tmp_path / "run"))
    for name, tensor in load_file(found / "policy" / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
