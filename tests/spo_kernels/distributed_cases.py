"""What each of two processes checks; test_parallel_heads.py starts them and reads their answers."""

import json
import re
import traceback
import warnings
from collections import namedtuple
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spo_kernels import (
    FusedPolicyLoss,
    head_weight,
    linear_masked_ppo_loss,
    linear_token_logprobs,
    masked_ppo_loss,
    policy_mask,
    token_logprobs,
)
from spo_kernels.gradients import PLAIN
from spo_kernels.testing import assert_as_good_as_torch

WORLD = 2
States = namedtuple("States", "last_hidden_state")


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return x + self.inner(x).tanh()


class Body(nn.Module):
    def __init__(self, vocab, width):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        for layer in self.layers:
            x = layer(x)
        return States(x)


class Causal(nn.Module):
    """A causal model with the parts that those of transformers have."""

    def __init__(self, vocab=11, width=6):
        super().__init__()
        self.base_model = Body(vocab, width)
        self.lm_head = nn.Linear(width, vocab)

    def forward(self, input_ids):
        return self.lm_head(self.base_model(input_ids).last_hidden_state)


def causal(dtype=torch.float32):
    torch.manual_seed(0)
    return Causal().to(dtype)


def batch(dtype=torch.float32):
    """Four sequences of seven tokens, and the arguments of the loss for tokens 1 to 6."""
    g = torch.Generator().manual_seed(1)
    shape = (4, 6)
    return {
        "input_ids": torch.randint(11, (4, 7), generator=g),
        "attention_mask": (torch.rand(4, 7, generator=g) < 0.9).to(dtype),
        "old_logprobs": -2.5 * torch.rand(shape, generator=g, dtype=dtype),
        "advantages": torch.randn(shape, generator=g, dtype=dtype),
        "loss_mask": torch.rand(shape, generator=g) < 0.8,
    }


def mine(whole):
    """This process's two sequences; the mean over processes has the whole batch's norm."""
    norm = policy_mask(whole["old_logprobs"], whole["loss_mask"], 0.9).sum().item()
    part = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    return {k: x[part] for k, x in whole.items()} | {"policy_norm": norm / WORLD}


def single_gradients(dtype=torch.float32, attention=True):
    """Of one process with the whole batch, by PyTorch's own loss."""
    model, whole = causal(dtype), batch(dtype)
    arguments = {k: whole[k] for k in ("old_logprobs", "advantages", "loss_mask")}
    attended = whole["attention_mask"] if attention else None
    hidden = model.base_model(whole["input_ids"], attended).last_hidden_state
    logits = model.lm_head(hidden)[:, :-1]
    loss = masked_ppo_loss(logits, whole["input_ids"][:, 1:], backend="reference", **arguments).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def close(found, want, tolerance=2e-5):
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert value.abs().max() > 1e-3, name
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model):
    return {name: full(p.grad) for name, p in model.named_parameters()}


def ddp(**options):
    model = causal()
    parallel = DistributedDataParallel(FusedPolicyLoss(model, clip_eps_low=0.2), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = parallel(**mine(batch()))
    out.loss.backward()
    assert out.logprobs.shape == (2, 6) and not out.logprobs.requires_grad
    close(gradients(model), single_gradients())


def case_ddp():
    ddp()
    ddp(find_unused_parameters=True)
    ddp(static_graph=True)


def case_fsdp1():
    for original in (True, False):
        model, want = causal(), single_gradients()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        wrapped = FullyShardedDataParallel(
            FusedPolicyLoss(model), use_orig_params=original, device_id=torch.device("cpu"),
            auto_wrap_policy=lambda module, recurse, **_: recurse or isinstance(module, Layer),
        )  # fmt: skip
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
        wrapped(**mine(batch())).loss.backward()
        optimizer.step()
        with FullyShardedDataParallel.summon_full_params(wrapped):
            step = {
                name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters()
            }
            close({name: start[name] - step[name] for name in start}, want)
        refused = "what FullyShardedDataParallel keeps outside its forward; .* FusedPolicyLoss"
        assert_raises(
            ValueError, refused, linear_token_logprobs,
            torch.zeros(3, 6), model.lm_head.weight, torch.arange(3),
        )  # fmt: skip


def case_fsdp2():
    """Around the loss module, and around the model inside it."""
    for outside in (True, False):
        model = causal()
        for layer in model.base_model.layers:
            fully_shard(layer)
        module = FusedPolicyLoss(fully_shard(model) if not outside else model)
        if outside:
            fully_shard(module)
        for repeat in (1, 2):  # gradients add up
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                module(**mine(batch())).loss.backward()
            want = {k: repeat * g for k, g in single_gradients().items()}
            close(gradients(model), want)


def case_fsdp2_mixed_precision():
    """FSDP2 casts the inputs of a forward unless told not to; logprobs of 16 bits are refused."""
    for cast in (True, False):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=cast)
        module = fully_shard(FusedPolicyLoss(causal()), mp_policy=policy)
        part = mine(batch())
        del part["attention_mask"]
        if cast:
            assert_raises(ValueError, "old_logprobs: .*cast_forward_inputs=False", module, **part)
            continue
        module(**part).loss.backward()
        found, want = gradients(module.model), single_gradients(attention=False)
        assert all(g.dtype == torch.float32 for g in found.values())
        for name, value in want.items():
            assert (found[name] - value).norm() <= 0.03 * value.norm(), name


def case_fsdp2_weight():
    """The loss outside the head's forward: the weight is a DTensor, gradients are averaged."""
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        model, part = causal(dtype), mine(batch(dtype))
        fully_shard(model.base_model)
        fully_shard(model.lm_head)
        loss, norm = outside_loss(model, part)
        loss.backward()
        close(gradients(model), single_gradients(dtype), tolerance)
        assert all(isinstance(p.grad, DTensor) for p in model.parameters())
        # FSDP2's own forward of the head, and PyTorch's loss; then logprobs the same way.
        own = causal(dtype)
        fully_shard(own.base_model)
        fully_shard(own.lm_head)
        hidden = own.base_model(part["input_ids"], part["attention_mask"]).last_hidden_state
        logits = own.lm_head(hidden)[:, :-1]
        tokens = part["input_ids"][:, 1:], part["old_logprobs"], part["advantages"]
        options = {"loss_mask": part["loss_mask"], "policy_norm": norm, "backend": "reference"}
        masked_ppo_loss(logits, *tokens, **options).loss.backward()
        close(gradients(model), gradients(own), tolerance)


def outside_loss(model, part):
    hidden = model.base_model(part["input_ids"], part["attention_mask"]).last_hidden_state[:, :-1]
    head, tokens = model.lm_head, [part["input_ids"][:, 1:]]
    tokens += [part["old_logprobs"], part["advantages"]]
    options = {"loss_mask": part["loss_mask"], "policy_norm": part["policy_norm"]}
    out = linear_masked_ppo_loss(hidden, head.weight, *tokens, bias=head.bias, **options)
    return out.loss, part["policy_norm"]


def case_other_placements_are_gathered():
    """Shards of columns, replicas, meshes of two dimensions: the gradient is the mean."""
    g = torch.Generator().manual_seed(3)
    weight, states = torch.randn(5, 4, generator=g), torch.randn(WORLD, 3, 4, generator=g)
    ids, rank = torch.tensor([[0, 1, 2], [4, 3, 3]]), dist.get_rank()
    for shape, placements in (
        ((2,), [Shard(0)]),
        ((2,), [Shard(1)]),
        ((2,), [Replicate()]),
        ((1, 2), [Replicate(), Shard(0)]),
        ((2, 1), [Replicate(), Shard(0)]),
        ((2, 1), [Shard(0), Shard(0)]),
    ):
        mesh = init_device_mesh("cpu", shape)
        for same in (False, True):  # tokens and states of both processes
            own, tokens = (states[0], ids[0]) if same else (states[rank], ids[rank])
            leaf = weight.clone().requires_grad_()
            wanted = (states[:1], ids[:1]) if same else (states, ids)
            loss = linear_token_logprobs(wanted[0], leaf, wanted[1]).square().sum()
            (loss / len(wanted[0])).backward()
            spread = distribute_tensor(weight, mesh, placements).requires_grad_()
            linear_token_logprobs(own, spread, tokens).square().sum().backward()
            assert spread.grad.placements == tuple(placements)
            torch.testing.assert_close(spread.grad.full_tensor(), leaf.grad)
    hidden = distribute_tensor(states[0], init_device_mesh("cpu", (2,)), [Replicate()])
    found = linear_token_logprobs(hidden, weight, ids[0])  # the head alone is not distributed
    assert torch.equal(found, linear_token_logprobs(states[0], weight, ids[0]))


def head_inputs(vocab, dtype, offset=0.0):
    g = torch.Generator().manual_seed(vocab)
    n, width, states = 23, 6, 9
    return {
        "hidden": torch.randn(states, width, generator=g).to(dtype),
        "weight": torch.randn(vocab, width, generator=g).to(dtype),
        "bias": (torch.randn(vocab, generator=g) + offset).to(dtype),
    }, {
        "token_ids": torch.randint(vocab, (n,), generator=g),
        "old_logprobs": -0.2 - 2 * torch.rand(n, generator=g),
        "advantages": torch.randn(n, generator=g),
        "hidden_index": torch.randint(states, (n,), generator=g),
        "loss_mask": torch.rand(n, generator=g) < 0.7,
        "temperature": torch.rand(n, generator=g) + 0.5,
    }


OF_LOSS = {
    *("old_logprobs", "advantages", "entropy_coef", "weights", "kl_ratio", "metrics"),
    "prob_threshold",
}


def both_losses(leaves, arguments, **options):
    """A policy loss with KL, and the gradient of logprobs and entropies; the values, the sum."""
    advantages = arguments["advantages"]
    kl = {"ref_logprobs": -1 - advantages.abs(), "kl_coef": 0.2, "kl_estimator": "k2"}
    out = linear_masked_ppo_loss(**leaves, **arguments, **kl, entropy=True, **options)
    rest = {k: x for k, x in arguments.items() if k not in OF_LOSS}
    logprobs, entropy = linear_token_logprobs(**leaves, **rest, entropy=True, **options)
    total = 2 * out.loss + (logprobs * advantages).mean() + (entropy * advantages).mean()
    values = {"loss": out.loss, "row": out.logprobs, "logprobs": logprobs, "entropy": entropy}
    values |= {"kl": out.kl, "clipfrac": out.clipfrac, "rows' entropy": out.entropy}
    return {k: x.detach() for k, x in values.items()}, total


def evaluate(tensors, arguments, mesh=None, **options):
    """Values and gradients; with a mesh, the vocabulary is shared over it."""
    leaves = {k: x.clone() for k, x in tensors.items()}
    if mesh is not None:
        for name in ("weight", "bias"):
            leaves[name] = distribute_tensor(leaves[name], mesh, [Shard(0)])
    leaves = {k: x.requires_grad_() for k, x in leaves.items()}
    values, total = both_losses(leaves, arguments, **options)
    total.backward()
    for name in ("weight", "bias"):
        assert mesh is None or leaves[name].grad.placements == (Shard(0),)
    return values | {"d" + k: full(x.grad) for k, x in leaves.items()}


def compare_shared(vocab, dtype, offset=0.0, extras=None, **options):
    mesh = init_device_mesh("cpu", (WORLD,))
    tensors, arguments = head_inputs(vocab, dtype, offset)
    arguments |= extras or {}
    wide = {k: x.double() for k, x in tensors.items()}
    oracle = evaluate(wide, arguments, backend="reference")
    same = evaluate(tensors, arguments, backend="reference")
    unused = torch.ones(len(tensors["hidden"]), dtype=torch.bool)
    unused[arguments["hidden_index"][arguments["loss_mask"]]] = False
    dirty = tensors | {"hidden": tensors["hidden"].masked_fill(unused[:, None], torch.nan)}
    found = evaluate(dirty, arguments, mesh, **options)
    for name, value in oracle.items():
        assert_as_good_as_torch(name, found[name], same[name], value, scale=1.0)


def case_vocabulary_parallel():
    bent = {"logit_scale": 1.7, "logit_softcap": 2.5}
    others = {"entropy_coef": 0.1, "kl_ratio": True, "metrics": True}
    on_policy = {"old_logprobs": None, "weights": torch.linspace(0.5, 2, 23)}
    for vocab, dtype, options in (
        (37, torch.float64, {}),
        (37, torch.float64, {"memory_budget": 600}),
        (37, torch.float32, {}),
        (37, torch.float32, {"memory_budget": 600}),
        (1001, torch.float32, {"offset": 1e4}),
        (37, torch.float32, {"backend": "reference"}),
        (37, torch.bfloat16, {}),
        (1001, torch.float16, {}),
        (37, torch.float64, {"extras": bent}),
        (37, torch.float32, {"extras": bent | others}),
        (37, torch.bfloat16, {"extras": bent, "memory_budget": 600}),
        (37, torch.float64, {"extras": others | on_policy}),
        (37, torch.float32, {"extras": others | on_policy | {"prob_threshold": None}}),
        (1, torch.float32, {}),  # the second process has no row
        (2, torch.bfloat16, {"memory_budget": 1}),
    ):
        compare_shared(vocab, dtype, **options)


def case_impossible_tokens():
    """Logits of -inf, in one process and in all that a token has."""
    mesh = init_device_mesh("cpu", (WORLD,))
    tensors, arguments = head_inputs(8, torch.float32)
    tensors["bias"][:4] = -torch.inf
    arguments["loss_mask"] &= arguments["token_ids"] >= 4
    want, found = evaluate(tensors, arguments), evaluate(tensors, arguments, mesh)
    for name, value in want.items():
        assert "row" in name or value.isfinite().all()
        assert value.nan_to_num().abs().max() > 0
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, equal_nan=True)


def case_replicated_states_and_second_backward():
    mesh = init_device_mesh("cpu", (WORLD,))
    tensors, arguments = head_inputs(37, torch.float32)
    want = evaluate(tensors, arguments)
    leaves = {"hidden": distribute_tensor(tensors["hidden"], mesh, [Replicate()])}
    for name in ("weight", "bias"):
        leaves[name] = distribute_tensor(tensors[name], mesh, [Shard(0)])
    leaves = {k: x.requires_grad_() for k, x in leaves.items()}
    arguments["old_logprobs"] = distribute_tensor(arguments["old_logprobs"], mesh, [Replicate()])
    tokens = {k: full(x) for k, x in arguments.items()}
    total = both_losses(leaves, tokens)[1]
    out = linear_masked_ppo_loss(**leaves, **arguments)
    same = linear_masked_ppo_loss(**leaves, **tokens)
    assert torch.equal(out.loss, same.loss) and out.loss != 0
    for _ in range(2):  # the first backward uses the logits up, the second computes them again
        total.backward(retain_graph=True)
    for name, leaf in leaves.items():
        torch.testing.assert_close(full(leaf.grad), 2 * want["d" + name], rtol=1e-4, atol=1e-5)
    tokens["advantages"] = tokens["advantages"] + dist.get_rank()
    assert_raises(
        ValueError, "expected the same in all processes", linear_masked_ppo_loss, **leaves, **tokens
    )


def case_nothing_kept():
    mesh = init_device_mesh("cpu", (WORLD,))
    tensors, arguments = head_inputs(37, torch.float32)
    arguments["loss_mask"][:] = False
    found = evaluate(tensors, arguments, mesh)
    assert all(not value.nan_to_num().any() for value in found.values())


class Largest(TorchDispatchMode):
    """The fp32 numbers that the largest tensor that any op read or made could hold."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its size is the whole tensor's; the ops below are on its parts
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if type(x) in PLAIN and not x.is_meta:  # not what DTensor plans with
                self.numel = max(self.numel, x.numel() * x.element_size() // 4)
        return out


def case_no_process_holds_the_whole():
    """With a shared vocabulary no tensor has V x D or n x V elements; gathered, one has."""
    mesh = init_device_mesh("cpu", (WORLD,))
    vocab, width, n = 4096, 128, 160
    g = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(vocab, width, generator=g), torch.randn(n, width, generator=g)
    ids, ones = torch.randint(vocab, (n,), generator=g), torch.ones(n)
    sizes = []
    for other in (0.0, dist.get_rank() * 1.0):  # other hidden states: the weight is gathered
        states = (hidden + other).requires_grad_()
        spread = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        with Largest() as largest:
            out = linear_masked_ppo_loss(states, spread, ids, -2 * ones, ones)
            logprobs = linear_token_logprobs(states, spread, ids)
            (out.loss + logprobs.mean()).backward()
        sizes.append(largest.numel)
    assert sizes[0] == vocab * max(width, n) // WORLD, sizes
    assert sizes[1] >= vocab * width, sizes


def case_what_has_no_meaning():
    mesh = init_device_mesh("cpu", (WORLD,))
    ids, ones = torch.arange(4), torch.ones(4)
    tokens = ids, -ones, ones
    logits = torch.zeros(4, 6)

    def spread(tensor, placement):
        return DTensor.from_local(tensor, mesh, [placement])

    whole = "logits: expected the whole vocabulary .* policy_objective"
    assert_raises(ValueError, whole, masked_ppo_loss, spread(logits, Shard(1)), *tokens)
    assert_raises(ValueError, whole, token_logprobs, spread(logits, Shard(1)), ids)
    message = "logits: expected a tensor or a replicated DTensor.*to_local"
    assert_raises(ValueError, message, token_logprobs, spread(logits, Shard(0)), ids)
    hidden, weight = torch.zeros(4, 3), torch.zeros(6, 3)
    for placement in (Shard(0), Partial()):
        states = spread(hidden, placement)
        message = "hidden: expected a tensor, or a DTensor that is replicated.*redistribute"
        shared = spread(weight, Shard(0))
        assert_raises(ValueError, message, linear_token_logprobs, states, shared, ids)
    message = "weight: expected a DTensor without partial sums"
    partial = spread(weight, Partial())
    assert_raises(ValueError, message, linear_token_logprobs, hidden, partial, ids)
    shared = distribute_tensor(weight, mesh, [Shard(0)])
    for name, value in (("batch_invariant", True), ("extras", ["is_top1"])):
        message = f"{name}: expected none of it .* weight.full_tensor"
        options = {name: value}
        assert_raises(ValueError, message, linear_token_logprobs, hidden, shared, ids, **options)
    message = "old_logprobs: expected a tensor or a replicated DTensor"
    shared = spread(-ones, Shard(0))
    assert_raises(ValueError, message, masked_ppo_loss, logits, ids, shared, ones)
    message = r"found 6 at row 0; if each process has logits of a part .* policy_objective"
    assert_raises(ValueError, message, masked_ppo_loss, logits, ids + 6, -ones, ones)
    out = masked_ppo_loss(spread(logits, Replicate()), *tokens)
    assert torch.equal(out.loss, masked_ppo_loss(logits, *tokens).loss)


def case_warnings():
    model, part = causal(), mine(batch())
    module = FusedPolicyLoss(model)
    expect_warning("called in 2 processes outside the forward", module, **part)
    expect_warning(None, module, **part)  # once
    states = model.base_model(part["input_ids"]).last_hidden_state
    never_ran = "a DistributedDataParallel module whose forward never ran"
    arguments = states, model.lm_head.weight, part["input_ids"]
    expect_warning(None, linear_token_logprobs, *arguments)  # looked at when `module` ran alone
    other = causal()
    wrapped = DistributedDataParallel(other)
    expect_warning("outside the forward of DistributedDataParallel", head_weight, wrapped)
    arguments = states, other.lm_head.weight, part["input_ids"]
    expect_warning(never_ran, linear_token_logprobs, *arguments)
    expect_warning(None, linear_token_logprobs, *arguments)
    used = causal()
    wrapped = DistributedDataParallel(used)
    wrapped(part["input_ids"])
    expect_warning(None, linear_token_logprobs, states, used.lm_head.weight, part["input_ids"])
    assert_raises(ValueError, "put it around FusedPolicyLoss", FusedPolicyLoss, wrapped)
    half = part | {"old_logprobs": part["old_logprobs"].bfloat16()}
    assert_raises(ValueError, "old_logprobs: expected float32.*cast_forward_inputs", module, **half)


def assert_raises(kind, message, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except kind as error:
        assert re.search(message, str(error)), str(error)
        return
    raise AssertionError(f"nothing raised {message!r}")


def expect_warning(message, function, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **kwargs)
    texts = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(texts) == (message is not None), texts
    assert message is None or message in texts[0], texts


CASES = {name.removeprefix("case_"): f for name, f in globals().items() if name.startswith("case_")}


def run(rank, folder):
    """One process: all cases in order, and what each raised."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=30),
    )  # fmt: skip
    answers = {}
    for name, case in CASES.items():
        try:
            case()
            answers[name] = ""
        except Exception:  # the answer of this case, which the test shows
            answers[name] = traceback.format_exc()
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()
