"""Learns a new task from a visitor's pictures, on a copy of the model, while others are being served."""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import PIL.Image
import torch
from datasets import Dataset, DatasetDict

from ..config.errors import ConfigError
from ..methods.closed_form import ClosedForm
from ..model import ContinualModel
from ..routing import GaussianRouter, PrototypeRouter, Router
from ..routing.registry import router_name
from ..streams import load_task
from ..training import ContinualTrainer, ContinualTrainingArguments, TrainerCallback
from ..training.progress import disable_progress_bars
from .models import Models
from .names import check_class_name, class_name
from .pictures import VisitorError
from .queries import Run, lesson_of, views_of


FEWEST, MOST_PICTURES, MOST_CLASSES, MOST_SECONDS = 3, 200, 20, 180
MANY = 20  # pictures of a class that is known well
MOST_TRIED = 40  # pictures that are left out, one at a time
MOST_PIXELS = 800_000_000  # of all pictures together, as they are all in memory
STEPS, MOST_EPOCHS, BATCH = 100, 60, 16
THUMBNAILS = 8  # of the given pictures, in a model that is the visitor's own
HEAD_LEARNING_RATE = 1e-2  # high, as a new row must outweigh the old ones within few steps


@dataclass(frozen=True)
class Lesson:
    """The result of teaching.

    Args:
        key (`str`): Key of the new model in [`Models`].
        folder (`Path`): Folder of the new model.
        task (`str`): Name of the new task.
        seconds (`float`): Duration.
        tried (`int`): Number of the given pictures that were left out, one at a time; 0 if time was short.
        recognised (`int`): How many of them would be recognised by what the others teach; see [`leave_one_out`].
        answers (`int`): Number of answers to old pictures that were compared.
        changed (`int`): How many of them have another label now.
    """

    key: str
    folder: Path
    task: str
    seconds: float
    tried: int
    recognised: int
    answers: int
    changed: int


def sort_pictures(
    name: str, uploads: Iterable[tuple[str, PIL.Image.Image | VisitorError]], known: Sequence[str]
) -> tuple[dict[str, list[PIL.Image.Image]], list[str]]:
    """Groups uploaded pictures by class: the name of their folder, else the given name.

    The pictures of a folder, or without one, that are too few for a class are left out if there are others.

    Args:
        name (`str`): Class of the pictures without a folder; and of those of a single folder, if it is not empty.
        uploads (iterable): Paths and pictures; see [`read_uploads`].
        known (sequence of `str`): Classes that the model knows.

    Returns:
        Pictures by class; and why other files were left out.

    Raises:
        [`VisitorError`]: A name is invalid, or there are too few or too many pictures.

    Example:

    ```py
    >>> from PIL import Image
    >>> from hf_clpeft.demo.teaching import sort_pictures

    >>> pictures = [(f"pets/cat/{i}.png", Image.new("RGB", (8, 8))) for i in range(3)]
    >>> classes, left_out = sort_pictures("", pictures, known=["dog"])
    >>> list(classes), left_out
    (['cat'], [])

    ```
    """
    folders: dict[str, list[tuple[str, PIL.Image.Image]]] = {}
    classes: dict[str, list[PIL.Image.Image]] = {}
    left_out: list[str] = []
    loose: list[str] = []
    name, pixels = class_name(name), 0
    for path, picture in uploads:
        if isinstance(picture, VisitorError):
            left_out.append(str(picture))
            continue
        pixels += picture.width * picture.height
        if pixels > MOST_PIXELS:
            raise VisitorError(
                f"These pictures have more than {MOST_PIXELS // 10**6} megapixels together; make them smaller first."
            )
        folder = class_name(Path(path).parent.name)
        folders.setdefault(folder or name, []).append((path, picture))
        loose += [] if folder else [path]
    if not folders:
        raise VisitorError(" ".join([f"There is no picture yet: add {FEWEST} or more, ideally five.", *left_out[:3]]))
    few = [label for label, given in folders.items() if len(given) < FEWEST]
    for label in few if len(few) < len(folders) else ():  # a stray picture stops no lesson
        for path, _ in folders.pop(label):
            where = "outside of the folders" if path in loose else f"in the folder {label!r}"
            left_out.append(f"{path}, {where}: a class needs {FEWEST} pictures.")
    if name and len(folders) == 1:  # then that is meant, whatever the folder is called
        folders = {name: folders.popitem()[1]}
    for label, given in folders.items():
        check_class_name(label, folder=label != name)
        if label in {class_name(each) for each in known}:
            raise VisitorError(f"The model knows {label!r} already. Give the new class another name.")
        if len(given) < FEWEST:
            what = f"{label!r} has {len(given)} picture{'s' * (len(given) > 1)}; give {FEWEST} or more, ideally five."
            raise VisitorError(" ".join([what, *left_out[:3]]))
        classes[label] = [picture for _, picture in given]
    count = sum(map(len, classes.values()))
    if count > MOST_PICTURES or len(classes) > MOST_CLASSES:
        raise VisitorError(
            f"These are {count} pictures of {len(classes)} classes; at most {MOST_PICTURES} of {MOST_CLASSES} can be "
            "taught here at once. Take fewer, or train on your own machine with ContinualTrainer."
        )
    return classes, left_out


def refusal(model: ContinualModel) -> str | None:
    """Why a model cannot be taught without changing what it has learnt; `None` if it can."""
    method = model.method
    if model.router is not None and model.router.knows_classes and not model.router.gives_likelihoods:
        return (
            f"The {router_name(model.router)} router weighs the classes of all tasks against each other, so a new one "
            "changes what it knows of old ones. Teach a model with router='prototypes' or router='gaussian' here, or "
            "train this one with a recipe."
        )
    if isinstance(method, ClosedForm):  # trains on the first task at most
        return None
    if not method.independent:
        return (
            f"{method.name} trains the same parameters on every task, which changes what it has learnt. Teach a model "
            "with an expert per task (s_lora, s_prompts) here, or train this one with a recipe."
        )
    if not method.routes:
        return (
            f"The experts of all tasks read every picture in {method.name}, so a new one changes every answer. "
            "Teach a model in which one expert is chosen (s_lora, s_prompts) here, or train this one with a recipe."
        )
    return None


def teach(
    models: Models,
    key: str | None,
    classes: dict[str, list[PIL.Image.Image]],
    old_pictures: Sequence[PIL.Image.Image] = (),
    reject_rate: float = 0.05,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Lesson:
    """Trains a copy of a model on one more task.

    Args:
        models ([`Models`]): Where the model is looked up, and the new one is added.
        key (`str`): Key of the model.
        classes (`dict[str, list[PIL.Image.Image]]`): Pictures by class.
        old_pictures (sequence of `PIL.Image.Image`): Pictures whose predictions are compared before and after.
        reject_rate (`float`, *optional*, defaults to 0.05): As for [`ContinualModel.predict`].
        progress (callable): Called with the progress, from 0 to 1, and a description.

    Returns:
        [`Lesson`]

    Raises:
        [`VisitorError`]: Training takes longer than `MOST_SECONDS`.
        [`ConfigError`]: The method cannot learn the task.
    """
    start = time.monotonic()
    progress(0.0, "Loading the model")
    disable_progress_bars()
    old = models.get(key)
    reason = refusal(old)
    if reason is not None:
        raise ConfigError(reason)
    # With its own backbone, as training may move it to another device.
    model = ContinualModel.from_pretrained(
        models.folder(key) or models.source,
        backbone=models.backbone,
        revision=None if key else models.revision,
    )
    expect_few(model.router, classes)
    folder = models.new_folder()
    task = f"task-{len(model.config.tasks) + len(model.config.removed):03d}"

    class Watch(TrainerCallback):
        def on_step_end(self, model: ContinualModel, step: int, num_steps: int) -> None:
            if time.monotonic() - start > MOST_SECONDS:
                raise VisitorError(f"This takes longer than {MOST_SECONDS} seconds here. Upload fewer pictures.")
            progress(0.1 + 0.7 * step / num_steps, f"Training, step {step} of {num_steps}")

    args = ContinualTrainingArguments(
        str(folder),
        num_train_epochs=min(MOST_EPOCHS, -(-STEPS * BATCH // sum(map(len, classes.values())))),
        train_batch_size=BATCH,
        eval_batch_size=BATCH,
        head_learning_rate=HEAD_LEARNING_RATE,
        num_examples=0,
        num_thumbnails=THUMBNAILS,
        disable_tqdm=True,
    )
    rows = {
        "image": [picture for pictures in classes.values() for picture in pictures],
        "label": [label for label, pictures in classes.items() for _ in pictures],
    }
    progress(0.1, "Reading the pictures")
    data = DatasetDict(train=Dataset.from_dict(rows))
    ContinualTrainer(model, args, callbacks=[Watch()]).learn(load_task(data, task, test_size=0))
    progress(0.9, "Comparing old predictions")
    new_key = models.add(folder)
    new = models.get(new_key)
    _check_unchanged(models, old, new)
    options = {"reject_rate": reject_rate} if old.can_reject else {}
    before, after = (models.batcher.predict(m, old_pictures, **options) for m in (old, new))
    changed = sum(was.label != now.label for was, now in zip(before, after, strict=True))
    progress(0.92, "Leaving out each picture in turn")
    tried, recognised = leave_one_out(old, classes, reject_rate, models.batcher.run, start + MOST_SECONDS)
    return Lesson(new_key, folder, task, time.monotonic() - start, tried, recognised, len(before), changed)


def leave_one_out(
    model: ContinualModel,
    classes: dict[str, list[PIL.Image.Image]],
    reject_rate: float,
    run: Run = lambda function: function(),
    end: float = math.inf,
) -> tuple[int, int]:
    """How many of a lesson's pictures would find their class if it were taught from all the others alone.

    A picture finds it if it is routed to the new task, is not rejected, and is nearest to the mean of its own class
    there. Experts are not trained again.

    Args:
        model ([`ContinualModel`]): The model before the lesson.
        classes (`dict[str, list[PIL.Image.Image]]`): Pictures by class.
        reject_rate (`float`): As for [`ContinualModel.predict`].
        run (callable, *optional*): Calls what looks at one view: of a [`Batcher`], so that others are served between.
        end (`float`, *optional*): Of `time.monotonic()`, after which no further picture is tried.

    Returns:
        Number of pictures tried, at most `MOST_TRIED`; and how many of them find their class.
    """
    pictures = [(number, picture) for number, own in enumerate(classes.values()) for picture in own]
    labels = torch.tensor([number for number, _ in pictures])
    seen, read = [], []
    for _, picture in pictures:
        if time.monotonic() > end:
            return 0, 0
        seen.append(run(partial(views_of, model, picture)))
        read.append(lesson_of(model, picture, run))
    queries, lessons = torch.cat(seen), torch.cat(read)
    before = run(partial(copy.deepcopy, model.router))  # while nobody is routed
    points = torch.nn.functional.normalize(queries if queries.dim() == 2 else queries[:, 0], dim=-1).cpu()

    @torch.no_grad()
    def finds_its_class(left_out: int) -> bool:
        others = torch.arange(len(pictures)) != left_out
        router = copy.deepcopy(before)
        expect_few(router, classes)
        router.learn(lessons[others], len(model.config.classes) + labels[others])
        query = queries[left_out : left_out + 1]
        routing = router(query)
        if int(routing.selection.flatten()[0]) != router.num_owners - 1:
            return False
        if model.can_reject and float(router.typicality(query, routing.distances)) < reject_rate:
            return False
        means = torch.stack([points[others & (labels == number)].mean(dim=0) for number in range(len(classes))])
        return int(torch.cdist(points[left_out : left_out + 1], means).argmin()) == int(labels[left_out])

    tried = recognised = 0
    # In an order in which the first few are of all classes.
    for left_out in torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:MOST_TRIED].tolist():
        if time.monotonic() > end:
            break
        tried, recognised = tried + 1, recognised + finds_its_class(left_out)
    return tried, recognised


def different(pictures: Iterable[PIL.Image.Image]) -> int:
    """Number of pictures, of which copies count as one.

    Example:

    ```py
    >>> from PIL import Image
    >>> from hf_clpeft.demo.teaching import different

    >>> different([Image.new("RGB", (8, 8))] * 3)
    1

    ```
    """
    return len({(one.size, hashlib.blake2b(one.tobytes()).digest()) for one in pictures})


def expect_few(router: Router | None, classes: dict[str, list[PIL.Image.Image]]) -> None:
    """Prepares a router for a lesson of a few pictures.

    Classes of few pictures are favoured; see [`hf_clpeft.routing.few`]. Of others, a router of prototypes keeps one
    for five pictures or more: as many as pictures are the pictures themselves, and no new one is near any of them.
    """
    count = sum(map(len, classes.values()))
    if isinstance(router, PrototypeRouter) and isinstance(router.k, int):
        router.k = min(router.k, max(2 * len(classes), count // 5))
    if isinstance(router, (GaussianRouter, PrototypeRouter)):
        router.learns_few = count < MANY * len(classes)


def _check_unchanged(models: Models, old: ContinualModel, new: ContinualModel) -> None:
    """Raises unless old experts, prototypes and head rows are bit-identical."""
    same = True
    if old.router is not None and new.router is not None:
        before, after = old.router.points()[0], new.router.points()[0]
        same &= torch.equal(after[: len(before)], before)
    if old.heads is not None and new.heads is not None:
        for i in range(len(old.config.tasks)):
            same &= torch.equal(new.heads.weights[i], old.heads.weights[i])
            same &= torch.equal(new.heads.biases[i], old.heads.biases[i])
    for was, now in models.batcher.run(lambda: list(zip(old.bank, new.bank, strict=False))):
        same &= all(torch.equal(now.tensors[name], tensor) for name, tensor in was.tensors.items())
    if not same:
        raise RuntimeError("Teaching has changed an old expert, prototype or head row. This must not happen.")
