"""Several processes: killed together or one by one they go on as if nothing had happened, and none waits for ever."""

import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import killable
import pytest
from accelerate.utils import DistributedType
from conftest import make_trainer, outcome

from hf_clpeft import s_lora


KILLS = int(os.environ.get("HF_CLPEFT_KILLS", 4)) // 4  # for each kind of images
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["hf_clpeft.training.recipe", "matplotlib.figure", "sklearn.cluster", "sklearn.datasets"]
)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(*args, **options):
    port = free_port()
    processes = [
        _processes.Process(target=killable.run_together, args=(rank, 2, port, *args), kwargs=options)
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    return processes


def join(processes):
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("options", [{}, {"cache_size_gb": 1e-4}], ids=["cached", "streamed"])
def test_processes_that_are_killed_go_on_as_if_nothing_had_happened(options, tmp_path):
    assert join(start("s_lora", str(tmp_path / "warm"), **options)) == [0, 0]
    begin = time.perf_counter()
    assert join(start("s_lora", str(tmp_path / "undisturbed"), **options)) == [0, 0]
    seconds = time.perf_counter() - begin
    expected, rng, deaths = outcome(tmp_path / "undisturbed"), random.Random(0), 0
    for i in range(KILLS):
        folder = str(tmp_path / f"run-{i}")
        processes = start("s_lora", folder, **options)
        first = rng.randrange(2)
        processes[first].join(rng.uniform(i, i + 1) / KILLS * seconds)
        processes[first].kill()
        if rng.random() < 0.5:  # else the other one finds out for itself
            processes[1 - first].kill()
        deaths += join(processes) != [0, 0]
        assert join(start("s_lora", folder, **options)) == [0, 0], f"run {i}"
        assert outcome(folder) == expected, f"run {i}"
    assert deaths >= KILLS // 2
    print(f"{deaths} of {KILLS} two-process runs killed, undisturbed {seconds:.1f} s")


def test_a_process_that_does_not_answer_ends_the_run_with_what_to_do(tmp_path):
    processes = start("s_lora", str(tmp_path / "run"), ddp_timeout=5, num_train_epochs=200)
    while processes[1].is_alive() and not (tmp_path / "run" / "checkpoints").exists():
        time.sleep(0.1)
    os.kill(processes[1].pid, signal.SIGSTOP)
    processes[0].join(120)
    assert processes[0].exitcode == 1
    assert "has not answered for ddp_timeout seconds" in Path("error-0").read_text()
    processes[1].kill()


# As much of SLURM as the recipe asks for: two nodes, both on this machine.
SRUN = """#!/bin/sh
SLURM_NODEID=1 "$@" & other=$!
SLURM_NODEID=0 "$@" || { kill $other; exit 1; }
wait $other
"""
SCONTROL = """#!/bin/sh
echo 127.0.0.1
echo second
"""


def test_the_slurm_recipe_trains_on_two_nodes(tmp_path):
    recipes = Path(__file__).parents[1] / "recipes"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "first,second", "MAIN_PORT": str(free_port())}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", recipes / "slurm.sbatch", recipes / "s_lora.py", "--benchmark", "digits", "--disable_tqdm"]
    command += ["--num_train_epochs", "1", "--max_train_samples_per_task", "32", "--output_dir", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["environment"]["num_processes"] == 2 and len(metrics["accuracy_matrix"]) == 5


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_configuration_that_shards_models_is_accepted_and_shares_out_batches(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(s_lora(), tmp_path)
    assert f"{name} has nothing to shard here" in caplog.text
    assert trainer.accelerator.distributed_type == DistributedType.NO
