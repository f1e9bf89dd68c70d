"""Several processes: killed together or one by one they go on as if nothing had happened, and none waits for ever."""

import json
import logging
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import killable
import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from conftest import make_trainer, outcome

from hf_clpeft import ContinualModel, s_lora
from hf_clpeft.backbones.bundled import bundled_folder


pytestmark = pytest.mark.usefixtures("shallow")
KILLS = int(os.environ.get("HF_CLPEFT_KILLS", 4)) // 4  # for each kind of images
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["hf_clpeft.training.recipe", "matplotlib.figure", "sklearn.cluster", "sklearn.datasets"]
)


@pytest.fixture(scope="module", autouse=True)
def _warm():
    """The clock is not to measure imports."""
    process = _processes.Process(target=killable.hurry)
    process.start()
    process.join()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(*args, **options):
    port, options = free_port(), {**options, "backbone": str(bundled_folder(killable.BACKBONE))}
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


@pytest.mark.parametrize(
    "num_images, method, options",
    [
        (65, "s_lora", {}),
        (17, "l2l", {"gradient_accumulation_steps": 2}),
        (3, "l2l", {"cache_query_features": False}),
        (65, "s_lora", {"cache_size_gb": 7e-5}),  # streamed
    ],
    ids=["65", "17-pool", "3-pool", "65-streamed"],
)
def test_two_processes_train_on_the_rows_of_one_and_give_its_matrix(num_images, method, options, tmp_path):
    port, together, alone = free_port(), str(tmp_path / "together"), str(tmp_path / "alone")
    places = [(0, 2, port, together), (1, 2, port, together), (0, 1, port, alone)]
    started = [
        _processes.Process(
            target=killable.run_noted,
            args=(rank, count, port, num_images, method, folder, str(bundled_folder(killable.BACKBONE))),
            kwargs=options,
        )
        for rank, count, port, folder in places
    ]
    for process in started:
        process.start()
    assert join(started) == [0, 0, 0]

    def batches(folder, rank):
        found = [[]]
        for row in Path(folder, f"rows-{rank}").read_text().split("\n"):
            found[-1].append(row) if row else found.append([])
        return found

    shares = [batches(together, rank) for rank in (0, 1)]
    assert [one + other for one, other in zip(*shares, strict=True)] == batches(alone, 0)
    states = [Path(f"{together}-{rank}.txt").read_text() for rank in (0, 1)]
    assert states[0] == states[1]  # what processes have computed on their own, too
    reports = [json.loads(Path(folder, "metrics.json").read_text()) for folder in (together, alone)]
    assert reports[0]["accuracy_matrix"] == reports[1]["accuracy_matrix"]
    models = [ContinualModel.from_pretrained(folder) for folder in (together, alone)]
    furthest = max(
        float((one.tensors[key] - other.tensors[key]).abs().max())
        for one, other in zip(*(model.bank for model in models), strict=True)
        for key in one.tensors
    )
    print(f"{num_images} images, {method}: weights differ by {furthest:.1e} at most")
    assert furthest < 2e-4  # the order in which floats are added up, which AdamW makes larger


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


@pytest.mark.usefixtures("deep")  # as the processes of the nodes have it
def test_the_slurm_recipe_gives_on_two_nodes_the_matrix_of_one_process(tmp_path, other_precision, monkeypatch):
    recipes = Path(__file__).parents[1] / "recipes"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "first,second", "MAIN_PORT": str(free_port())}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    recipe = [str(recipes / "s_lora.py"), "--benchmark", "digits", "--num_tasks", "2", "--num_train_epochs", "3"]
    recipe += ["--max_train_samples_per_task", "64", "--max_test_samples_per_task", "24"]
    recipe += ["--disable_tqdm", "--output_dir"]
    command = ["bash", recipes / "slurm.sbatch", *recipe, tmp_path / "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("oracle") == 1  # one table, from the main process
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [*recipe, str(tmp_path / "1")])
    runpy.run_path(recipe[0], run_name="__main__")
    matrices, prototypes = [], []
    for count in (1, 2):
        metrics = json.loads((tmp_path / str(count) / "metrics.json").read_text())
        assert metrics["environment"]["num_processes"] == count
        matrices.append(np.array(metrics["accuracy_matrix"], dtype=float))
        prototypes.append(ContinualModel.from_pretrained(tmp_path / str(count)).router.prototypes)
    lower = np.tril_indices(2)
    assert matrices[0][lower].mean() > 0.6
    assert abs(matrices[0][lower] - matrices[1][lower]).mean() <= 0.02
    # k-means on the same features in the same order gives the same centres: no image was lost or seen twice.
    torch.testing.assert_close(prototypes[0], prototypes[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_configuration_that_shards_models_is_accepted_and_shares_out_batches(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(s_lora(), tmp_path)
    assert f"{name} has nothing to shard here" in caplog.text
    assert trainer.accelerator.distributed_type == DistributedType.NO
