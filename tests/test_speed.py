"""What a GPU does faster by default, and no other device."""

import pytest
import torch
from conftest import outcome
from test_every_method import taught_on_two_layers

from hf_clpeft import ConfigError, ContinualTrainingArguments
from hf_clpeft.backbones import precision
from hf_clpeft.training import arguments


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_gpu_gets_workers_if_there_is_enough_for_them_to_do(monkeypatch):
    monkeypatch.setattr(arguments, "shared_memory", lambda: arguments.ENOUGH_MEMORY)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    args = ContinualTrainingArguments()
    assert args.loading(1000, GPU) == {"num_workers": arguments.WORKERS, "pin_memory": True}
    assert args.loading(2, GPU)["num_workers"] == 0
    assert args.loading(1000, CPU) == {"num_workers": 0, "pin_memory": False}
    assert ContinualTrainingArguments(dataloader_num_workers=5).loading(2, CPU)["num_workers"] == 5
    monkeypatch.setattr(arguments, "shared_memory", lambda: 2**26)  # that of a container, by default
    assert args.loading(1000, GPU)["num_workers"] == 0


def test_routers_and_heads_are_exact_on_a_gpu_that_rounds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    before = torch.get_float32_matmul_precision()
    try:
        assert precision.go_fast(CPU) is None and torch.get_float32_matmul_precision() == before
        assert precision.go_fast(GPU) == "bf16" and torch.get_float32_matmul_precision() == "high"
        with precision.without_autocast(GPU):
            with precision.without_autocast(GPU):
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
        with precision.without_autocast(CPU):
            assert torch.get_float32_matmul_precision() == "high"
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        assert precision.go_fast(GPU) is None
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("method", ["s_lora", "inflora", "sd_lora"])
def test_a_compiled_run_learns_the_same(method, backbone, tmp_path, monkeypatch):
    compiled, compile_ = [], torch.nn.Module.compile

    def without_a_compiler(module):  # of C++, which would take minutes; the rest is as it is
        compiled.append(type(module).__name__)
        compile_(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_a_compiler)
    for fast in (False, True):
        torch.manual_seed(0)
        taught_on_two_layers(method, backbone, tmp_path / f"{fast}", torch_compile=fast)
    assert {"Backbone", "ExpertBank", "Stage"} <= set(compiled)
    assert outcome(tmp_path / "False")[1] == outcome(tmp_path / "True")[1]


def test_a_device_that_is_not_there_is_named():
    from hf_clpeft.prediction import best_device

    assert best_device("cpu") == CPU
    for name in ("cuda:7", "meta", "toaster"):
        with pytest.raises(ConfigError, match=f"{name}.*it has"):
            best_device(name)
