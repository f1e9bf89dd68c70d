"""Several processes: killed together or one by one they go on as if nothing had happened, and none waits for ever."""

import multiprocessing
import os
import random
import signal
import socket
import time

import killable
import pytest
from conftest import outcome


KILLS = int(os.environ.get("HF_CLPEFT_KILLS", 4)) // 4  # for each kind of images
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["hf_clpeft.training.recipe", "matplotlib.figure", "sklearn.cluster", "sklearn.datasets"]
)


def start(*args, **options):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
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


def test_a_process_that_does_not_answer_ends_the_run_with_what_to_do(tmp_path, capfd):
    processes = start("s_lora", str(tmp_path / "run"), ddp_timeout=5, num_train_epochs=200)
    while processes[1].is_alive() and not (tmp_path / "run" / "checkpoints").exists():
        time.sleep(0.1)
    os.kill(processes[1].pid, signal.SIGSTOP)
    processes[0].join(120)
    assert processes[0].exitcode == 1
    assert "has not answered for ddp_timeout seconds" in capfd.readouterr().err
    processes[1].kill()
