"""Attention over a pack: backends against the dense reference, models against rows."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from forests import packed, random_forest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import tiny_policy

from spo.config.loss import PolicyLossConfig
from spo.config.policy import EMBEDDED, PolicyConfig
from spo.config.recipe import load_recipe
from spo.learn.attention import BACKENDS
from spo.learn.flex import BLOCK, BUCKETS, block_mask, padded_length
from spo.learn.loss import policy_loss
from spo.learn.model import hidden_states
from spo.learn.policy import load_policy
from spo.loop import train
from spo.records import Forest


def random_pack(seed, trees=2, nodes=8, longest=40):
    """visible_until (T,) of trees in depth-first order."""
    g = torch.Generator().manual_seed(seed)
    until = []

    def grow(children, node):
        start = len(until)
        until.extend([0] * int(torch.randint(1, longest, (1,), generator=g)))
        end = len(until)
        for child in children[node]:
            grow(children, child)
        until[start:end] = [len(until)] * (end - start)

    for _ in range(trees):
        children = [[] for _ in range(nodes)]
        for node in range(1, nodes):
            children[int(torch.randint(node, (1,), generator=g))].append(node)
        grow(children, 0)
    return torch.tensor(until, dtype=torch.int32)


def visible(until):
    """(T, T) bool, query by key."""
    place = torch.arange(until.numel(), device=until.device)
    return (place <= place[:, None]) & (place[:, None] < until)


def random_tensors(until, dtype, seed=0, heads=4, kv_heads=2, width=32):
    g = torch.Generator().manual_seed(seed)

    def draw(h):
        return torch.randn(1, until.numel(), h, width, dtype=torch.float64, generator=g)

    drawn = [draw(h).transpose(1, 2).to(dtype) for h in (heads, kv_heads, kv_heads, heads)]
    return [x.to(until.device) for x in drawn]


def run(function, query, key, value, grad):
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves)]


def whole_mask(until):
    mask = visible(until)
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True
    )


def with_backend(name, until):
    make_plan, attend = BACKENDS[name]
    return lambda q, k, v: attend(q, k, v, make_plan(until), 0.25)


def equals_one_softmax(name, until, tensors, tolerance=1e-12):
    expected = run(whole_mask(until), *tensors)
    for mine, theirs in zip(run(with_backend(name, until), *tensors), expected, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * (1 + theirs.abs().max())


@pytest.mark.parametrize("name", ["dense", "grouped"])
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    longest=st.sampled_from([2, 8, 40]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
)
def test_backends_equal_one_masked_softmax(name, seed, longest, heads):
    until = random_pack(seed, longest=longest)
    equals_one_softmax(name, until, random_tensors(until, torch.float64, seed, *heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_is_as_exact_as_one_softmax_of_its_type(dtype):
    until = random_pack(1)
    tensors = random_tensors(until, dtype)
    oracle = run(whole_mask(until), *(x.double() for x in tensors))
    mine = run(with_backend("grouped", until), *tensors)
    theirs = run(whole_mask(until), *tensors)
    for a, b, exact in zip(mine, theirs, oracle, strict=True):
        assert a.dtype == dtype
        assert (a - exact).norm() <= 2 * (b - exact).norm() + 1e-7 * exact.norm()


def test_far_logits_are_merged_without_overflow():
    until = random_pack(2)
    query, key, value, grad = random_tensors(until, torch.float64)
    equals_one_softmax("grouped", until, (200 * query, key, value, grad), 1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), nodes=st.integers(1, 30), longest=st.sampled_from([8, 90, 300]))
def test_block_mask_is_the_one_pytorch_finds_pair_by_pair(seed, nodes, longest):
    from torch.nn.attention.flex_attention import create_block_mask

    until = random_pack(seed, 2, nodes, longest)
    total = padded_length(until.numel())
    padded = torch.arange(1, total + 1, dtype=torch.int32)
    padded[: until.numel()] = until
    found = block_mask(until)
    expected = create_block_mask(
        lambda b, h, q, k: (k <= q) & (q < padded[k]), None, None, total, total, device="cpu"
    )
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, theirs = (getattr(m, f"{name}_num_blocks") for m in (found, expected))
        assert torch.equal(counts, theirs)
        places, others = (getattr(m, f"{name}_indices") for m in (found, expected))
        listed = torch.arange(places.shape[-1]) < counts[..., None]
        assert torch.equal(places[listed], others[listed])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_forward():
    until = random_pack(3, nodes=12)
    query, key, value, _ = random_tensors(until, torch.float32)
    pad = padded_length(until.numel()) - until.numel()
    with torch.no_grad():
        padded = (F.pad(x, (0, 0, 0, pad)) for x in (query, key, value))
        mine = with_backend("flex", until)(*padded)[:, :, : until.numel()]
        theirs = whole_mask(until)(query, key, value)
    assert (mine - theirs).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="no backward on the CPU"):
        run(with_backend("flex", until), *random_tensors(until, torch.float32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention trains on CUDA only")
def test_flex_forward_and_backward_on_cuda():
    until = random_pack(3, nodes=40, longest=90).cuda()
    tensors = random_tensors(until, torch.bfloat16)
    pad = padded_length(until.numel()) - until.numel()
    attend = with_backend("flex", until)

    def padded(*leaves):
        return attend(*(F.pad(x, (0, 0, 0, pad)) for x in leaves))[:, :, : until.numel()]

    oracle = run(whole_mask(until), *(x.double() for x in tensors))
    theirs = run(whole_mask(until), *tensors)
    for a, b, exact in zip(run(padded, *tensors), theirs, oracle, strict=True):
        assert (a - exact).norm() <= 2 * (b - exact).norm() + 1e-3 * exact.norm()


def test_lengths_come_in_few_buckets():
    lengths = [padded_length(n) for n in range(1, 1 + 64 * BLOCK)]
    for size, length in enumerate(lengths, start=1):
        assert size <= length < size + max(BLOCK, size / 4) and length % BLOCK == 0
    above = {length for length in lengths if 32 * BLOCK < length <= 64 * BLOCK}
    assert len(above) == BUCKETS


def bottom_right_causal(q, k, v, cu_q, cu_k, longest_q, longest_k, softmax_scale, causal):
    """The contract of flash-attn's varlen function, entry by entry in plain PyTorch."""
    assert causal and longest_q == int(cu_q.diff().max()) and longest_k == int(cu_k.diff().max())
    pieces = []
    for i in range(cu_q.numel() - 1):
        queries = q[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
        keys, values = (x[cu_k[i] : cu_k[i + 1]].transpose(0, 1) for x in (k, v))
        rows, columns = queries.shape[1], keys.shape[1]
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=softmax_scale, enable_gqa=True
        )
        pieces.append(out.transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("seed", range(4))
def test_varlen_gathers_every_path(monkeypatch, seed):
    """Our indices, with a stand-in for the package's kernel."""
    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_varlen_func = bottom_right_causal
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    until = random_pack(seed)
    equals_one_softmax("varlen", until, random_tensors(until, torch.float64))


def test_varlen_without_the_package_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    until = random_pack(0)
    with pytest.raises(ValueError, match="policy.attention=varlen needs the package flash-attn"):
        with_backend("varlen", until)(*random_tensors(until, torch.float32)[:3])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folder of a tiny random model of a kind."""

    return lambda kind, **more: tiny_policy(tmp_path_factory.mktemp(kind), kind, **more)


def gradient(model, batches):
    """All gradients in one vector."""
    model.zero_grad()
    for batch in batches:
        policy_loss(model, batch, PolicyLossConfig(), 1.0).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def packed_and_rows(folder, forest, advantages, budget, autocast=False):
    """Gradients of one policy, packed and as rows."""
    found = []
    for packing in ("tree", "rows"):
        model = load_policy(PolicyConfig(path=folder, packing=packing))
        batches, _ = packed(forest, advantages, budget, packing=packing)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(gradient(model, batches))
    return found


KINDS = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 64},
    "gemma": {},
    "gemma3_text": {"sliding_window": 64, "sliding_window_pattern": 2},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2},  # with dropout in its configuration
    "gemma2": {"sliding_window": 8},  # shorter than a path; soft caps on scores and logits
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 4},  # sinks
    "deepseek_v3": {  # values that are narrower than keys
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "num_key_value_heads": 2,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_row_gradients_of_models(folder_of, kind):
    forest, advantages = random_forest(11, trees=3)
    packed, rows = packed_and_rows(folder_of(kind, **KINDS[kind]), forest, advantages, 60)
    assert rows.norm() > 0 and (packed - rows).norm() <= 1e-4 * rows.norm()


RUN = [
    "engine.name=hf",
    "engine.max_model_len=96",
    "engine.max_num_seqs=64",
    "sampling.max_new_tokens=40",
    "shape.widths=[4,4]",
    "shape.segment_tokens=[12]",
    "train.prompts=4",
    "train.minibatches=2",
    "train.iterations=1",
    "eval.problems=1",
]


@pytest.fixture(scope="module")
def packed_run(tmp_path_factory):
    """A run of one iteration, packed: its folder and its train line."""
    out = tmp_path_factory.mktemp("packed")
    return out, train(load_recipe(None, [*RUN, f"out={out}"]))[1]


@pytest.fixture(scope="module")
def real_forest(packed_run):
    """Trees that the embedded policy has grown on its task, with advantages."""
    forest = Forest.load(packed_run[0] / "forest-first.safetensors")
    generator = torch.Generator().manual_seed(0)
    return forest, torch.randn(forest.num_nodes, generator=generator) * forest.trained


def test_a_run_in_rows_takes_the_same_steps(packed_run, tmp_path):
    line = train(load_recipe(None, [*RUN, f"out={tmp_path}", "policy.packing=rows"]))[1]
    for key in ("loss", "grad_norm", "entropy"):
        assert line[key] == pytest.approx(packed_run[1][key], rel=1e-3, abs=1e-6)
    assert line["kept_share"] == packed_run[1]["kept_share"]
    assert line["packed_tokens"] > 1.5 * packed_run[1]["packed_tokens"]


@pytest.mark.parametrize("budget", [150, 10**6])
def test_packed_and_row_gradients_of_a_real_forest(real_forest, budget):
    packed, rows = packed_and_rows(str(EMBEDDED), *real_forest, budget)
    assert rows.norm() > 0 and (packed - rows).norm() <= 1e-4 * rows.norm()


REFUSED = {
    "mamba": ({"state_size": 4}, "."),
    "recurrent_gemma": ({"lru_width": 64, "num_hidden_layers": 3}, "."),
    "bloom": ({}, "attention of its own"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_be_packed_are_refused(folder_of, kind):
    more, reason = REFUSED[kind]
    folder = folder_of(kind, **more)
    with pytest.raises(ValueError, match=f"{reason}.*policy.packing=rows trains it"):
        load_policy(PolicyConfig(path=folder))
    batches, _ = packed(*random_forest(2), 100, packing="rows")
    model = load_policy(PolicyConfig(path=folder, packing="rows"))
    found = gradient(model, batches)
    assert found.isfinite().all() and found.norm() > 0


def test_rows_refuse_trees_and_packs_need_a_layout(folder_of):
    folder = folder_of("qwen2")
    (batch,), _ = packed(*random_forest(2), 1000)
    with pytest.raises(ValueError, match="packed as rows, found trees"):
        hidden_states(load_policy(PolicyConfig(path=folder, packing="rows")), batch)
    with pytest.raises(ValueError, match="call spo.learn.model.hidden_states"):
        load_policy(PolicyConfig(path=folder))(batch.token_ids[None])


def test_autocast_keeps_packs_close_to_rows(folder_of):
    folder = folder_of("qwen2")
    forest, advantages = random_forest(11, trees=3)
    exact, packed, rows = (
        packed_and_rows(folder, forest, advantages, 60, autocast=autocast)[packing]
        for autocast, packing in ((False, 1), (True, 0), (True, 1))
    )
    assert 1e-4 * exact.norm() < (rows - exact).norm()
    assert (packed - exact).norm() <= 2 * (rows - exact).norm()


def test_checkpoints_name_no_attention(folder_of, tmp_path):
    model = load_policy(PolicyConfig(path=folder_of("qwen2")))
    model.save_pretrained(tmp_path)
    assert "spo_" not in (tmp_path / "config.json").read_text()
