"""Killed at any moment, a run goes on as if nothing had happened, and nobody ever sees half a task."""

import multiprocessing
import os
import random
import time

import killable
import pytest
from conftest import outcome

from hf_clpeft import ContinualModel
from hf_clpeft.backbones.bundled import bundled_folder


pytestmark = pytest.mark.usefixtures("shallow")
KILLS = int(os.environ.get("HF_CLPEFT_KILLS", 4))  # for each method
_processes = multiprocessing.get_context("forkserver")  # forked from a process that has imported everything already
_processes.set_forkserver_preload(
    ["hf_clpeft.training.recipe", "matplotlib.figure", "sklearn.cluster", "sklearn.datasets"]
)


@pytest.fixture(scope="module", autouse=True)
def _warm():
    """The clock is not to measure imports."""
    process = _processes.Process(target=killable.hurry)
    process.start()
    process.join()


def start(*args):
    backbone = str(bundled_folder(killable.BACKBONE))  # a shallow one
    process = _processes.Process(target=killable.run, args=args, kwargs={"backbone": backbone})
    process.start()
    return process


@pytest.mark.parametrize("method", killable.METHODS)
def test_a_killed_run_is_finished_and_nobody_ever_saw_half_a_task(hub, method):
    begin = time.perf_counter()
    start(method, "undisturbed", None).join()
    seconds = time.perf_counter() - begin
    expected, rng, deaths = outcome("undisturbed"), random.Random(0), 0
    for i in range(KILLS):
        folder, repo_id = f"run-{i}", f"alice/run-{i}"
        process = start(method, folder, repo_id)
        process.join(rng.uniform(i, i + 1) / KILLS * seconds)
        process.kill()
        process.join()
        deaths += process.exitcode == -9
        again = start(method, folder, repo_id)
        again.join()
        assert again.exitcode == 0, f"run {i}"
        assert outcome(folder) == expected, f"run {i}"
        repo = hub.repo(repo_id)
        commits = repo.commits()[::-1]
        assert [commit.title.split(":")[0] for commit in commits[1:]] == [f"Learn task-00{t}" for t in range(3)]
        assert repo.tags == {f"task-00{t}": commit.sha for t, commit in enumerate(commits[1:])}
        for t, commit in enumerate(commits[1:]):
            model = ContinualModel.from_pretrained(repo_id, revision=commit.sha, cache_dir=f"cache-{i}")
            assert len(model.config.tasks) == t + 1
    assert deaths >= KILLS // 2
    print(f"{method}: {deaths} of {KILLS} runs killed, undisturbed {seconds:.1f} s")
