"""A run that a test starts in a process of its own, kills, and starts again."""

import os
from pathlib import Path

import torch

from hf_clpeft import ContinualTrainingArguments, l2l, load_benchmark, s_lora
from hf_clpeft.training.options import BackboneArguments
from hf_clpeft.training.processes import TrainingError
from hf_clpeft.training.recipe import learn


METHODS = {"s_lora": s_lora(k=5), "l2l": l2l(pool_size=4, top_n=2)}


def run_together(rank: int, num_processes: int, port: int, *args, **options) -> None:
    """The same as one of several processes."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    try:
        run(*args, **options)
    except TrainingError as error:
        Path(f"error-{rank}").write_text(str(error))
        raise


def run(method: str, folder: str, repo_id: str | None = None, **options) -> None:
    """Learns three digit tasks into a folder, or what is left of them, and pushes each, if it is told where."""
    stream = load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=16)[:3]
    defaults = {"num_train_epochs": 2, "train_batch_size": 16, "disable_tqdm": True}
    defaults |= {"resume_from_checkpoint": "auto", "save_steps": 2}
    push = {"push_to_hub": repo_id is not None, "hub_model_id": repo_id, "hub_token": "hf_alice"}
    args = ContinualTrainingArguments(output_dir=folder, **{**defaults, **push, **options})
    learn(stream, BackboneArguments(backbone="hf-clpeft/vit-tiny-glyphs"), args, METHODS[method])
