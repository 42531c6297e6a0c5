"""The Triton backend without a GPU: interpreted, and compiled for the GPUs it is meant for."""

import dataclasses
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from kernel_cases import tokens_from  # noqa: E402
from torch import tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from spo_kernels import objective, token_logprobs  # noqa: E402
from spo_kernels.testing import assert_as_good_as_torch  # noqa: E402
from spo_kernels.tokens import TYPES  # noqa: E402
from spo_kernels.triton import (  # noqa: E402
    configs,
    logprobs,
    policy_loss,
    prepare,
    scale,
    segments,
    tree,
)
from spo_kernels.triton.objective import (  # noqa: E402
    TokenArgs,
    importance_ratio,
    kl_term,
    policy_term,
    token_args,
)

SHARED = [  # in two processes, which take about as long
    [
        *("test_policy_loss.py", "test_tree.py", "test_segments.py"),
        *(
            f"test_linear_policy_loss.py::test_{n}"
            for n in ("options", "bf16_gradient_of_fp32_logits")
        ),
    ],
    [
        *("test_logprobs.py", "test_loss_options.py", "test_softcap.py"),
        *(f"test_triton.py::test_{n}" for n in ("objective", "rows_of_several_blocks", "scale")),
    ],
]
LEFT_OUT = [
    *("reference", "errors", "gradcheck", "opcheck", "compiles", "fuzz"),  # less of the kernel
    "thread_count",  # Triton has none
    "(options or temperature) and (dtype1 or dtype2)",  # the rest is slow and was had in fp32
    "test_logprobs and (32000 or 50257 or 129920)",
    "test_softcap and (oracle or models or dtype1 or dtype2 or 0.0625 or 50257 or 33)",
    "shared_states and dtype1 or large_weight",  # bf16 gradients: the interpreter truncates
]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
CAN_RUN = INTERPRETED or torch.cuda.is_available()
need_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("interpreted", [True, pytest.param(False, marks=need_gpu)])
def test_the_tests_of_the_ops_on_triton(interpreted):
    """In processes of their own: whether Triton interprets is settled when it is first imported.

    Two at once, since each uses one core. pytest's reports on those that failed are the message.
    """
    environment = {"TRITON_INTERPRET": "1" if interpreted else "0", "SPO_TEST_BACKEND": "triton"}
    # The step from an empty maximum to the first logit overflows on purpose: its exponential is 0.
    overflow = "ignore::RuntimeWarning:triton.runtime.interpreter"
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-W", overflow]
    left_out = " and ".join(f"not ({x})" for x in LEFT_OUT)
    command = [sys.executable, "-m", "pytest", *options, "-k", left_out]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(partial(run_tests, command, os.environ | environment), SHARED))
    assert all(x.returncode == 0 for x in done), "".join(x.stdout + x.stderr for x in done)


def run_tests(command, environment, tests):
    return subprocess.run(
        [*command, *tests],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@triton.jit
def objective_kernel(logprobs, tokens, out):
    N: tl.constexpr = 32
    i = tl.arange(0, N)
    logprob = tl.load(logprobs + i)
    advantage = tl.load(tokens.advantages + i)
    ratio, ratio_slope = importance_ratio(logprob, i, tokens)
    policy, low, high, most, slope = policy_term(ratio, ratio_slope, i, tokens, advantage, 0.7)
    kl, estimate, kl_slope = kl_term(logprob, ratio, ratio_slope, i, tokens, 0.3)
    tl.store(out + i, policy)
    tl.store(out + N + i, kl)
    tl.store(out + 2 * N + i, low)
    tl.store(out + 3 * N + i, high)
    tl.store(out + 4 * N + i, most)
    tl.store(out + 5 * N + i, ratio)
    tl.store(out + 6 * N + i, estimate)
    tl.store(out + 7 * N + i, slope + kl_slope)


@pytest.mark.skipif(not CAN_RUN, reason="there is no GPU, and Triton does not interpret")
@pytest.mark.parametrize("estimator", [1, 2, 3])
@pytest.mark.parametrize("clips", [(0.0, 0.0, math.inf), (0.2, 0.3, 1.5)])
@pytest.mark.parametrize(("clamp", "kl_ratio"), [(0.5, True), (10.0, False)])
def test_objective(estimator, clips, clamp, kl_ratio):
    """Value and slope on, just inside and just outside every bound, at infinity and at NaN."""
    tiny = 2.0**-20
    steps = [sign * x for x in (tiny, 1e-3, 0.1, 0.5, 0.5 + tiny, 10, 10.5) for sign in (1, -1)]
    steps = [0.25] * (29 - len(steps)) + [0, *steps, -math.inf, math.nan]
    steps = tensor(steps, device=DEVICE)
    ones = torch.ones_like(steps)
    for sign in (1.0, -1.0):
        floats = {"old_logprobs": 0 * ones, "advantages": 1.5 * sign * ones}
        floats |= {"ref_logprobs": 0 * ones, "weights": 0.5 * ones, "kl_weights": 2 * ones}
        tokens = tokens_from(
            SimpleNamespace(token_ids=ones.long(), **floats),
            **{name: floats[name] for name in ("ref_logprobs", "weights", "kl_weights")},
            **{"clip_eps_low": clips[0], "clip_eps_high": clips[1], "clip_ratio_max": clips[2]},
            **{"log_ratio_clamp": clamp, "kl_clamp": clamp, "kl_coef": 0.3, "kl_ratio": kl_ratio},
            **{"kl_estimator": estimator, "policy_norm_value": 1 / 0.7, "kl_norm_value": 1.0},
        )
        expected = torch.stack([of_one(tokens, steps, i) for i in range(32)], 1).float()
        expected[7, -1] = math.nan  # a kernel shows it, the derivative of PyTorch's clamp hides it
        got = torch.full_like(expected, 99.0)
        objective_kernel[(1,)](steps, token_args(vars(tokens)), got)
        # Two terms of order one may cancel with `kl_ratio`.
        atol = 1e-7 if kl_ratio else 1e-9
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=atol, equal_nan=True)


def of_one(tokens, logprobs, i):
    """What `objective_kernel` finds of token i, in fp64: PyTorch's expm1(d) - d cancels near 0."""
    floats = {k: x[i : i + 1].double() for k, x in vars(tokens).items() if hasattr(x, "double")}
    one = dataclasses.replace(tokens, **floats | {"token_ids": torch.zeros(1).long()})
    leaf = logprobs[i : i + 1].double().requires_grad_()
    out = objective.evaluate(leaf, None, one, torch.ones(1).bool(), (1,))
    (slope,) = torch.autograd.grad(out.loss, leaf)
    figures = (out.policy_loss, out.kl, out.clipfrac_low, out.clipfrac_high, out.clipfrac_max)
    return torch.stack([*figures, out.ratio_mean, out.kl_mean, slope[0]])


@pytest.mark.skipif(not CAN_RUN, reason="there is no GPU, and Triton does not interpret")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 6, 9, 255, 256, 259, 512, 1003])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_rows_of_several_blocks(softcap, vocab, dtype, monkeypatch):
    """Sweeps of up to 4 blocks, in rows that start at any alignment and are written at another."""
    monkeypatch.setattr(configs, "MAX_BLOCK_V", 256)
    generator = torch.Generator(DEVICE).manual_seed(vocab)
    logits = torch.randn(3, 4, vocab, generator=generator, device=DEVICE).to(dtype)[:, 1:]
    ids = torch.randint(vocab, (3, 3), generator=generator, device=DEVICE)
    weights = torch.randn(2, 3, 3, generator=generator, device=DEVICE)
    options = {"temperature": 0.7, "entropy": True, "logit_softcap": softcap}
    results = []
    for leaf, backend in (
        (logits, "triton"),
        (logits.contiguous(), "reference"),
        (logits.double(), "reference"),
    ):
        leaf = leaf.detach().requires_grad_()
        values = token_logprobs(leaf, ids, backend=backend, **options)
        sum((w * x).sum() for w, x in zip(weights, values, strict=True)).backward()
        results.append([*values, leaf.grad])
    for name, *triple in zip(("logprobs", "entropy", "gradient"), *results, strict=True):
        assert_as_good_as_torch(name, *(x.detach() for x in triple))


@pytest.mark.skipif(not CAN_RUN, reason="there is no GPU, and Triton does not interpret")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale(monkeypatch, dtype):
    """In fp32, rounded once; more blocks than programs; a factor of 1 reads nothing."""
    monkeypatch.setattr(scale, "PROGRAMS", 2)
    before = torch.linspace(-3, 3, 3 * scale.BLOCK + 5, device=DEVICE).to(dtype)
    for factor, unscale in ((0.3, None), (3.0, 0.125), (4.0, 0.25)):
        grad, given = before.clone(), tensor(factor, device=DEVICE)
        inverse = None if unscale is None else tensor(unscale, device=DEVICE)
        scale.scale(grad=grad, factor=given, unscale=inverse)
        want = (before.float() * factor * (unscale or 1)).to(dtype)
        torch.testing.assert_close(grad, want, rtol=2**-7 if INTERPRETED else 1e-6, atol=0)


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LOSS = policy_loss.policy_loss_kernel
FORWARD = logprobs.logprobs_kernel
BACKWARD = logprobs.logprobs_backward_kernel
PREPARE, FINISH = prepare.prepare_kernel, prepare.finish_kernel
NO_CAP = {"tanh_scale": None}
NO_ENTROPY, NO_SLOPE = {"entropies": None, **NO_CAP}, {"grad_entropy": None, **NO_CAP}
GIVEN = {"kl_scope": 0, "policy_norm": None, "kl_norm": None, "index": None, "STRICT": True}
GIVEN |= {"kl_ratio": False, "drop_nan": False, "metrics": False}
GIVEN |= {"weights": None, "kl_weights": None, "DLOGITS_ZEROED": False, "SLOPED": False}
GIVEN |= NO_CAP
NO_KL = {**GIVEN, "kl_estimator": 0, "ref_logprobs": None, "temperature": None}
PLAIN = {**NO_KL, "entropies": None}
NO_GRAD = {"dlogits": None, **{f"dlogits_{x}": 0 for x in ("block_stride", "row_stride")}}
K3 = {**GIVEN, "kl_estimator": 3}
# What takes the most registers: every option that adds to the arithmetic of a token.
LATE = {**K3, "old_logprobs": None, "kl_ratio": True, "SLOPED": True, "metrics": True}
LATE = {k: x for k, x in LATE.items() if k not in ("weights", "kl_weights", "tanh_scale")}
BESIDE = {"BLOCK": prepare.BLOCK, "kl_ratio": True, "drop_nan": True, "metrics": True}
PREPARED = {**PLAIN, "SCALED": False, "BLOCK": prepare.BLOCK, "hidden_index": None}
PREPARED = {k: x for k, x in PREPARED.items() if k not in ("DLOGITS_ZEROED", "SLOPED", *NO_CAP)}
GATHERED = {"kl_estimator": 2, "kl_scope": 1, "STRICT": False, "SCALED": True, **BESIDE}


LATE_NORM = {"kl_estimator": 0, "kl_scope": 0, "old_logprobs": None, "policy_norm": None}


def without(constants, *names):
    return {name: value for name, value in constants.items() if name not in names}


VARIANTS = {  # kernel, dtypes of logits and dlogits, arguments that are no run-time values
    "loss fp32": (LOSS, "fp32", "fp32", PLAIN),
    "loss bf16": (LOSS, "bf16", "bf16", PLAIN),
    "loss fp16": (LOSS, "fp16", "fp16", PLAIN),
    "loss fp32 to bf16": (LOSS, "fp32", "bf16", PLAIN),
    "loss in place of zeros": (LOSS, "fp32", "fp32", {**PLAIN, "DLOGITS_ZEROED": True}),
    "loss entropy": (LOSS, "bf16", "bf16", NO_KL),
    "loss forward": (LOSS, "fp32", "fp32", {**PLAIN, **NO_GRAD}),
    "loss forward entropy k3": (LOSS, "bf16", "bf16", {**K3, **NO_GRAD}),
    "loss k1": (LOSS, "fp32", "fp32", {**K3, "kl_estimator": 1, "entropies": None}),
    "loss k2": (LOSS, "fp32", "fp32", {**K3, "kl_estimator": 2, "entropies": None}),
    "loss entropy k3 fp32": (LOSS, "fp32", "fp32", K3),
    "loss entropy k3 bf16": (LOSS, "bf16", "bf16", K3),
    "loss entropy k3 fp16": (LOSS, "fp16", "fp16", K3),
    "loss of gathered rows": (LOSS, "fp32", "bf16", without(K3, "index")),
    "loss capped fp32": (LOSS, "fp32", "fp32", without(PLAIN, "tanh_scale")),
    "loss capped bf16": (LOSS, "bf16", "bf16", without(PLAIN, "tanh_scale")),
    "loss all options fp32": (LOSS, "fp32", "fp32", LATE),
    "loss all options bf16": (LOSS, "bf16", "bf16", LATE),
    "prepare": (PREPARE, "", "", PREPARED),
    "prepare gathered rows": (PREPARE, "", "", GATHERED),
    "finish": (FINISH, "", "", {**BESIDE, "kl_estimator": 3, "kl_scope": 0}),
    "finish late": (FINISH, "", "", {**BESIDE, **LATE_NORM}),
    "logprobs fp32": (FORWARD, "fp32", "", NO_ENTROPY),
    "logprobs bf16": (FORWARD, "bf16", "", NO_ENTROPY),
    "logprobs of all rows": (FORWARD, "fp16", "", {**NO_ENTROPY, "mask": None}),
    "logprobs entropy fp32": (FORWARD, "fp32", "", NO_CAP),
    "logprobs entropy bf16": (FORWARD, "bf16", "", NO_CAP),
    "logprobs capped fp32": (FORWARD, "fp32", "", {"entropies": None}),
    "logprobs capped bf16": (FORWARD, "bf16", "", {"entropies": None}),
    "logprobs capped entropy fp32": (FORWARD, "fp32", "", {}),
    "logprobs capped entropy bf16": (FORWARD, "bf16", "", {}),
    "backward fp32": (BACKWARD, "fp32", "fp32", {**NO_SLOPE, "entropies": None}),
    "backward bf16": (BACKWARD, "bf16", "bf16", {**NO_SLOPE, "entropies": None}),
    "backward of all rows": (BACKWARD, "fp16", "fp16", {**NO_SLOPE, "mask": None}),
    "backward fp32 to bf16": (BACKWARD, "fp32", "bf16", NO_SLOPE),
    "backward entropy fp32": (BACKWARD, "fp32", "fp32", NO_CAP),
    "backward entropy bf16": (BACKWARD, "bf16", "bf16", NO_CAP),
    "backward capped fp32": (BACKWARD, "fp32", "fp32", {"grad_entropy": None}),
    "backward capped bf16": (BACKWARD, "bf16", "bf16", {"grad_entropy": None}),
    "backward capped fp32 to bf16": (BACKWARD, "fp32", "bf16", {"grad_entropy": None}),
    "backward capped entropy fp32": (BACKWARD, "fp32", "fp32", {}),
    "backward capped entropy bf16": (BACKWARD, "bf16", "bf16", {}),
}
UNALIGNED = ("loss entropy k3 fp16", "logprobs of all rows", "backward entropy bf16")
UNALIGNED += ("logprobs capped entropy bf16", "backward capped entropy fp32")
# The kernel that takes the most registers, of each kind: these are compiled for every GPU.
LARGEST = ("loss all options fp32", "loss all options bf16", "loss capped bf16")
LARGEST += ("logprobs capped entropy bf16", "backward capped entropy fp32")


def compile_for(target, kernel, dtype, dlogits_dtype, constants, vocab):
    """The kernel as a launch on `vocab` logits, in rows 16 bytes aligned or not, specialises it."""
    capped = kernel is LOSS and "tanh_scale" not in constants
    options = configs.row_sweep(vocab, target.warp_size, capped)
    swept = {name: options.pop(name) for name in ("BLOCK_V", "STAGES")} | {"ALIKE": True}
    sweeps = "BLOCK_V" in kernel.arg_names
    alone = {"num_warps": prepare.NUM_WARPS}
    constants, options = (swept | constants, options) if sweeps else (dict(constants), alone)
    signature, values, attributes = {}, {}, {}
    types = {"logits": "*" + dtype, "dlogits": "*" + dlogits_dtype, "uses": "*u8"}
    types |= dict.fromkeys(
        ("token_ids", "counts", "index", "states", "sources", "hidden_index"), "*i64"
    )

    def type_of(name, place):
        if name.endswith("block_rows") and vocab % 16 == 0:
            constants[name] = 1  # (N, V) logits; else a view of (B, L, V)
        if name in constants:
            values[place] = constants[name]
            return "constexpr"
        sizes = ("vocab", "num_tokens", "num_states", "capacity")
        size = name in sizes or name.endswith(("_stride", "block_rows"))
        if size:
            kind = "i64" if name.endswith("block_stride") else "i32"
        elif name in ("tanh_scale", "divisor") or TYPES.get(name) == "float":
            return "fp32"
        else:
            kind = "*i1" if name.endswith("mask") else types.get(name, "*fp32")
        if not size or (vocab % 16 == 0 and not name.endswith(("temperature_stride", "rows"))):
            attributes[place] = [["tt.divisibility", 16]]
        return kind

    for i, name in enumerate(kernel.arg_names):
        if name == "tokens":
            fields = (type_of(field, (i, k)) for k, field in enumerate(TokenArgs._fields))
            signature[name] = TokenArgs(*fields)
        else:
            signature[name] = type_of(name, (i,))
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=target, options=options)


def stack_bytes(binary, target, folder):
    """Bytes of private memory per thread, which holds what does not fit the registers."""
    if target.backend == "hip":
        found = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", binary.asm["amdgcn"])
    else:
        path = folder / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
        found = re.findall(r"(?:STACK|LOCAL):(\d+)", report.stdout)
    assert found
    return max(int(size) for size in found)


def on_targets(cases, everywhere):
    """Each case for sm_90; for the other GPUs, those `everywhere`. `make slow` has the rest."""
    found = []
    for name in TARGETS:
        for case in cases:
            rest = name != "sm_90" and case[0] not in everywhere.get(name, ())
            found.append(pytest.param(name, *case, marks=[pytest.mark.slow] if rest else []))
    return found


# Warps of 64 threads make other blocks, so gfx942 has the kernels that do not sweep, and rows of
# any alignment, too. The code for sm_80 and sm_100 differs from that for sm_90 in ptxas alone.
OF_64 = (*LARGEST, *UNALIGNED, "prepare gathered rows", "finish late")
SWEPT = [*((variant, 151936) for variant in VARIANTS), *((variant, 101) for variant in UNALIGNED)]


@pytest.mark.skipif(INTERPRETED, reason="Triton interprets")
@pytest.mark.parametrize(
    ("name", "variant", "vocab"),
    on_targets(SWEPT, {"sm_80": LARGEST, "sm_100": LARGEST, "gfx942": OF_64}),
)
def test_compiles_without_spilling(name, variant, vocab, tmp_path):
    target = TARGETS[name]
    binary = compile_for(target, *VARIANTS[variant], vocab)
    code = binary.asm["hsaco" if target.backend == "hip" else "cubin"]
    assert code.startswith(b"\x7fELF")
    text = binary.asm["amdgcn" if target.backend == "hip" else "ptx"]
    assert name.removesuffix("0") in text  # sm_100 is written sm_100a
    assert stack_bytes(binary, target, tmp_path) == 0


POINTERS = {
    "i1": "in_value",
    "i32": "parent keys sorted_keys begin end arrived counts malformed",
    "i64": "children cu_seqlens cu_segments cu_seq_segments num_segments",
    "fp32": "rewards values advantages logprobs",
    "fp64": "exact sums variances eps",
}
TYPES_OF = {name: "*" + kind for kind, names in POINTERS.items() for name in names.split()}
PLAIN_TREE = {"LEAVE_ONE_OUT": False, "SCALE_BY_STD": False, "counts": None, "sums": None}
FOREST = {  # kernel, launch constants, arguments that are no run-time values or of another type
    "sort keys": (tree.sort_keys_kernel, configs.PER_ITEM, {}),
    "find children": (tree.find_children_kernel, configs.PER_ITEM, {}),
    "climb": (tree.climb_kernel, None, {}),
    "moments": (tree.moments_kernel, None, {}),
    "stats": (tree.moments_kernel, None, {"sums": None, "variances": "*fp32"}),
    "advantages": (tree.advantages_kernel, configs.PER_ITEM, {**PLAIN_TREE, "variances": None}),
    "advantages loo std": (
        tree.advantages_kernel,
        configs.PER_ITEM,
        {"LEAVE_ONE_OUT": True, "SCALE_BY_STD": True},
    ),
    "count segments": (segments.count_segments_kernel, configs.PER_SEQUENCE, {"counts": "*i64"}),
    "write segments": (segments.write_segments_kernel, configs.PER_SEQUENCE, {"interval": "i64"}),
    "advance tokens": (segments.advance_tokens_kernel, configs.PER_ITEM, {}),
}


@pytest.mark.skipif(INTERPRETED, reason="Triton interprets")
@pytest.mark.parametrize(
    ("name", "variant"), on_targets([(variant,) for variant in FOREST], {"gfx942": FOREST})
)
def test_forest_kernels_compile_without_spilling(name, variant, tmp_path):
    target = TARGETS[name]
    kernel, launch_constants, changes = FOREST[variant]
    options = dict(launch_constants or configs.child_sums(target.warp_size))
    constants = {key: options.pop(key) for key in list(options) if key.isupper()}
    constants |= {key: value for key, value in changes.items() if not isinstance(value, str)}
    types = TYPES_OF | {"log_threshold": "fp32"} | changes
    signature, values, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[i,] = "constexpr", constants[argument]
        else:
            signature[argument] = types.get(argument, "i32")
            if signature[argument].startswith("*"):
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    binary = triton.compile(source, target=target, options=options)
    assert stack_bytes(binary, target, tmp_path) == 0


def test_row_sweep():
    """One block for a small vocabulary; never more than 16 elements and 1024 threads."""
    for warp_size in (32, 64):
        for vocab in (1, 7, 512, 513, 5000, 16384, 16385, 151936):
            config = configs.row_sweep(vocab, warp_size)
            block, threads = config["BLOCK_V"], config["num_warps"] * warp_size
            assert block.bit_count() == 1 and config["num_warps"].bit_count() == 1
            assert min(vocab, 16384) <= block <= 16 * threads <= 16 * 1024
    assert configs.row_sweep(151936, 32)["num_warps"] == 32
