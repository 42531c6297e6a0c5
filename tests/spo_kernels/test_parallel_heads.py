"""Two processes on the CPU: DDP, FSDP and tensor parallelism give the gradients of one."""

import json

import distributed_cases
import pytest
import torch
from kernel_cases import needs_fast, on_cpu_tensors
from torch import distributed as dist

from spo_kernels import linear_token_logprobs

pytestmark = [
    on_cpu_tensors,
    needs_fast("policy_loss"),
    pytest.mark.skipif(not dist.is_available(), reason="PyTorch has no processes"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What every case raised in each of the two processes, which run all cases."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(distributed_cases.run, (folder,), distributed_cases.WORLD)
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(distributed_cases.WORLD)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", distributed_cases.CASES)
def test_two_processes(answers, case):
    problems = [answer[case] for answer in answers]
    assert not any(problems), "\n".join(problems)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_dtensor_ends_the_graph_of_the_compiler(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = torch.linspace(-1, 2, 66).view(11, 6)
    weight = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)]).requires_grad_()
    hidden, ids = torch.linspace(-1, 1, 18).view(3, 6), torch.tensor([0, 10, 5])

    def value(hidden, weight):
        return linear_token_logprobs(hidden.sin(), weight, ids).square().sum()

    results = []
    for function in (value, torch.compile(value, backend="aot_eager")):
        found = function(hidden, weight)
        results.append((found, torch.autograd.grad(found, weight)[0].full_tensor()))
    torch.testing.assert_close(results[1], results[0])
    assert results[0][1].abs().max() > 0.1
