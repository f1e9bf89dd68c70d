"""A run that a test starts in a process of its own, kills, and starts again."""

import gc
import hashlib
import os
from pathlib import Path

import torch

from hf_clpeft import (
    ContinualTrainer,
    ContinualTrainingArguments,
    PrototypeRouter,
    TaskStream,
    l2l,
    load_benchmark,
    s_lora,
)
from hf_clpeft.backbones.bundled import BUNDLED_BACKBONES
from hf_clpeft.reports import report
from hf_clpeft.training.options import BackboneArguments
from hf_clpeft.training.processes import TrainingError
from hf_clpeft.training.recipe import learn
from hf_clpeft.training.steps import StepLoop


METHODS = {"s_lora": s_lora(k=5), "l2l": l2l(pool_size=4, top_n=2)}


BACKBONE = "hf-clpeft/vit-tiny-glyphs"


def hurry(backbone: str | None = None) -> None:
    """Leaves out what takes most of the time of a tiny run: pictures, and garbage among imported modules.

    `backbone` is the folder of the bundled one from now on: that of the process which starts this one.
    """
    gc.freeze()
    report.plot_report = lambda *args: Path(args[4]).touch()
    BUNDLED_BACKBONES[BACKBONE] = backbone or BUNDLED_BACKBONES[BACKBONE]


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


def run_noted(
    rank: int, num_processes: int, port: int, num_images: int, method: str, folder: str, backbone: str, **options
) -> None:
    """Learns two tasks of `num_images` each, and notes every row that is trained on: its pixels, label and view.

    What the method keeps is noted, too. The second process rounds otherwise, as another kind of processor would.
    """
    from conftest import pattern_dataset

    hurry(backbone)
    rows, complete, save, learn_task = [], StepLoop._complete, ContinualTrainer._save, PrototypeRouter.learn

    def noted(loop, batch, share):
        complete(loop, batch, share)
        for i in range(share.size):
            parts = [batch["pixels"][i], batch["label"][i], batch["view"][i]]
            rows.append(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
        rows.append("")

    def noted_state(trainer):
        tensors = [*trainer.model.method.parameters(), *trainer.model.method.buffers()]
        Path(f"{folder}-{rank}.txt").write_text(repr([tensor.tolist() for tensor in tensors]))
        save(trainer)

    def rounded(router, *args, **kwargs):
        learn_task(router, *args, **kwargs)
        router.prototypes += 1e-6 * rank

    StepLoop._complete, ContinualTrainer._save, PrototypeRouter.learn = noted, noted_state, rounded
    if num_processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    data = pattern_dataset(per_class=33)
    kept = [*range(-(-num_images // 2)), *range(33, 33 + num_images // 2)]  # rows of the first two classes
    data["train"] = data["train"].select([*kept, *(66 + row for row in kept)])
    defaults = {"num_train_epochs": 2, "train_batch_size": 16, "disable_tqdm": True, "augmentation": "crop_flip"}
    args = ContinualTrainingArguments(output_dir=folder, **{**defaults, **options})
    stream = TaskStream.class_incremental(data, num_tasks=2)
    learn(stream, BackboneArguments(backbone=BACKBONE), args, METHODS[method])
    Path(folder, f"rows-{rank}").write_text("\n".join(rows))


def run(method: str, folder: str, repo_id: str | None = None, backbone: str | None = None, **options) -> None:
    """Learns three digit tasks into a folder, or what is left of them, and pushes each, if it is told where."""
    hurry(backbone)
    stream = load_benchmark("digits", max_train_samples_per_task=64, max_test_samples_per_task=16)[:3]
    defaults = {"num_train_epochs": 2, "train_batch_size": 16, "disable_tqdm": True}
    defaults |= {"resume_from_checkpoint": "auto", "save_steps": 2}
    push = {"push_to_hub": repo_id is not None, "hub_model_id": repo_id, "hub_token": "hf_alice"}
    args = ContinualTrainingArguments(output_dir=folder, **{**defaults, **push, **options})
    learn(stream, BackboneArguments(backbone=BACKBONE), args, METHODS[method])
