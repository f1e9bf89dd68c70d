"""What a GPU does faster by default, and no other device."""

import pytest
import torch
from conftest import make_trainer, pattern_dataset

from hf_clpeft import ConfigError, ContinualTrainingArguments, TaskStream, inflora, s_lora, sequential_lora
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


@pytest.mark.parametrize("method", [s_lora(r=1, k=2), sequential_lora(r=1), inflora(r=1)], ids=lambda m: m.name)
def test_a_compiled_run_learns_the_same(method, monkeypatch):
    stream, compiled = TaskStream.class_incremental(pattern_dataset(4), num_tasks=2), []
    compile_ = torch.nn.Module.compile

    def without_a_compiler(module):  # of C++, which would take minutes; the rest is as it is
        compiled.append(type(module).__name__)
        compile_(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_a_compiler)
    reports = [make_trainer(method, f"{fast}", torch_compile=fast).learn_stream(stream) for fast in (False, True)]
    assert {"Backbone", "ExpertBank", "Stage"} <= set(compiled)
    assert reports[0].accuracy_matrix == reports[1].accuracy_matrix


def test_a_device_that_is_not_there_is_named():
    from hf_clpeft.prediction import best_device

    assert best_device("cpu") == CPU
    for name in ("cuda:7", "meta", "toaster"):
        with pytest.raises(ConfigError, match=f"{name}.*it has"):
            best_device(name)
