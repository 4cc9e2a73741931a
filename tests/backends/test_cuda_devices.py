"""Which GPU a process of the PyTorch backend takes, by what PyTorch would say where there are some."""

import pytest

torch = pytest.importorskip("torch")

from cuda_backend import devices  # noqa: E402
from mlx_forget.distributed import ALONE, Group  # noqa: E402
from mlx_forget.errors import UserError  # noqa: E402


class SecondOfTwo(Group):
    rank, size = 1, 2

    def all_sum(self, values):
        return values


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as far as this process can see; those that it makes its own."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


@pytest.mark.parametrize("wanted", [None, "cuda"])
def test_every_process_of_a_run_takes_its_own_gpu(gpus, monkeypatch, wanted):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.choose_device(wanted, SecondOfTwo(), []) == torch.device("cuda", 1)
    assert gpus == [1]
    assert devices.own_gpu() == 1


def test_a_process_of_its_own_has_a_gpu_with_a_number(gpus):
    """A limit of memory is set by number."""
    assert devices.choose_device("cuda", ALONE, []) == torch.device("cuda", 0)
    assert devices.choose_device("cuda:1", ALONE, []) == torch.device("cuda", 1)


def test_several_processes_on_one_gpu_are_refused(gpus):
    with pytest.raises(UserError, match="cannot share one GPU"):
        devices.choose_device("cuda:1", SecondOfTwo(), [])


def test_bf16_that_is_emulated_is_not_fast(gpus, monkeypatch):
    """GPUs before Ampere make bf16 tensors, and multiply them in software."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not devices.capabilities().fast_bf16
