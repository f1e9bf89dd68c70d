"""The continual model: prediction, learning, saving, loading and pushing."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from .backbones import Backbone, load_backbone
from .backbones.bundled import bundled_folder
from .backbones.processors import read_processor
from .backbones.saved import check_backbone, load_saved_backbone
from .config import ConfigError, ContinualConfig, MethodOptions, TaskConfig
from .config.repos import check_repo_id
from .experts import ExpertBank
from .experts.lock import ReadWriteLock, reading, writing
from .hub.download import fetch_model
from .hub.push import PushTarget, push_folder
from .methods import ContinualOutput, Heads, make_method
from .methods.learning import FeaturesOf, asked_for_views
from .prediction import Prediction, check_options, classify, read_batches
from .reports.report import StreamReport
from .routing import Router
from .storage.files import as_saved, check_files, is_sums, sums_file
from .storage.model_files import load_files, save_files
from .storage.pictures import Pictures, of_tasks, read_pictures


class ContinualModel(torch.nn.Module):
    """A frozen vision model that learns tasks one after another with a continual learning [`Method`].

    Args:
        backbone ([`Backbone`]): The frozen model.
        config ([`ContinualConfig`]): Method, backbone and learnt tasks.

    Attributes:
        method ([`Method`]): The method, which owns all learnt state.
        report ([`StreamReport`], *optional*): Metrics of its training; saved with the model.

    It also works in `transformers.pipeline("image-classification", model=model,
    image_processor=model.backbone.processor)`.

    Example:

    ```py
    >>> from PIL import Image
    >>> from hf_clpeft import ContinualModel, ContinualTrainer, ContinualTrainingArguments, s_lora
    >>> from hf_clpeft.streams import load_benchmark

    >>> stream = load_benchmark("digits", num_tasks=2, max_train_samples_per_task=64, max_test_samples_per_task=16)
    >>> model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", s_lora(r=1, k=5))
    >>> trainer = ContinualTrainer(
    ...     model, ContinualTrainingArguments(output_dir="out", num_train_epochs=1, disable_tqdm=True)
    ... )
    >>> result = trainer.learn_stream(stream)
    >>> model = ContinualModel.from_pretrained("out")
    >>> model.predict([Image.new("RGB", (8, 8))])[0].expert in ("task-000", "task-001")
    True

    ```
    """

    def __init__(self, backbone: Backbone, config: ContinualConfig):
        super().__init__()
        self.config, self.backbone = config, backbone
        self.method, self._saves = make_method(backbone, config), ReadWriteLock()
        self.origin: str | None = None  # folder or repo that it was loaded from
        self.report: StreamReport | None = None
        self.pictures: Pictures = {}  # thumbnails and examples that are saved with it
        self.unchanged: dict[str, dict[str, str]] = {}  # hashes of files of experts and sums, as last saved or loaded

    @classmethod
    def from_backbone(cls, name_or_path: str, method: MethodOptions, **options: Any) -> "ContinualModel":
        """Creates a model without any tasks.

        Args:
            name_or_path (`str`): Repo id or folder of the backbone.
            method ([`MethodOptions`]): Options of a method, for example `s_lora(r=4)` or `Mine.Config()`.
            options: `revision`, `image_size`, `dtype`, `attn_implementation`, `quantization_config`, `token`,
                `cache_dir`, `local_files_only`; see [`load_backbone`].

        Returns:
            [`ContinualModel`]
        """
        backbone = load_backbone(name_or_path, **options)
        return cls(backbone, ContinualConfig(copy(method), backbone.config))

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its input; the weights of the backbone may have another."""
        return torch.float32

    @property
    def bank(self) -> ExpertBank:
        """The experts."""
        return self.method.bank

    @property
    def router(self) -> Router | None:
        """The router, if the method has one."""
        return self.method.router

    @property
    def heads(self) -> Heads | None:
        """The head, if the method has one."""
        return self.method.heads

    # Prediction

    @reading
    def forward(self, pixel_values: torch.Tensor, expert: int | None = None) -> ContinualOutput:
        """Computes the logits; see [`Method.forward`].

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised images.
            expert (`int`, *optional*): Index of the expert to route all images to.

        Returns:
            [`ContinualOutput`]
        """
        return self.method(pixel_values, expert=expert)

    @torch.no_grad()
    def predict(
        self,
        images: Any,
        batch_size: int = 32,
        reject_rate: float | None = None,
        expert: str | None = None,
        top_k: int = 1,
        show_progress_bar: bool = False,
    ) -> list[Prediction]:
        """Classifies images. Predictions do not depend on the order of images or on the batch size.

        It is thread-safe, also while another thread learns a task, saves or pushes. Calls wait while a task is
        finished, and for each other if experts run grouped; see [`ExpertBank`]. While another thread trains a pool,
        they raise an error.

        With `reject_rate`, the label of out-of-distribution images is withheld. For new images of any learnt task that
        are exchangeable with its training images, the label is withheld at this rate (conformal prediction).
        With few training images it may be withheld less often; see [`fit_thresholds`].

        Args:
            images (an image, or an iterable of images): `PIL.Image.Image`, path, `bytes`, binary file, array or
                tensor of any mode and size; see [`open_image`]. An iterable is read batch by batch.
            batch_size (`int`, *optional*, defaults to 32): Images per forward pass; -1: all at once, as in `datasets`.
            reject_rate (`float`, *optional*): From 0.01 to 1, in steps of 0.01. Default: nothing is rejected.
            expert (`str`, *optional*): Name of the expert to use for all images, instead of routing.
            top_k (`int`, *optional*, defaults to 1): Number of classes and of experts in each [`Prediction`].
            show_progress_bar (`bool`, *optional*, defaults to `False`): Show a progress bar of images.

        Returns:
            `list[Prediction]`: One per image.

        Raises:
            [`PictureError`]: An input is not an image, or is damaged. It is also an `OSError`.
            [`ConfigError`]: The model has learnt no task, there is no such expert, the model does not support
                `reject_rate`, or an argument has a wrong type or is out of range.
            [`ExpertError`]: Another thread is training the pool.
        """
        check_options(self.method, batch_size, reject_rate, expert, top_k)
        predictions: list[Prediction] = []
        for batch in read_batches(images, batch_size, show_progress_bar):
            predictions += classify(self.method, self.backbone.transform.resize(batch), reject_rate, expert, top_k)
        return predictions

    @property
    def can_reject(self) -> bool:
        """Whether [`~ContinualModel.predict`] supports `reject_rate`."""
        return self.method.why_no_reject() is None

    # Learning a task

    def start_task(self, name: str, classes: Sequence[str], domain: str | None = None, seed: int = 0) -> None:
        """Starts a new task, to be trained and then completed by [`~ContinualModel.finish_task`].

        In between, `model.method.prepare(features_of)` comes first; then `model.method.parameter_groups(args)` are the
        parameters to train, and `model.method.loss(batch)` is the loss.

        Args:
            name (`str`): Name of the task.
            classes (sequence of `str`): Names of its classes.
            domain (`str`, *optional*): Its domain.
            seed (`int`, *optional*, defaults to 0): Random seed, for example of k-means.

        Raises:
            [`ConfigError`]: A task of that name has already been learnt, or the method cannot learn these classes.
            [`ExpertError`]: Another thread is training the model.
        """
        if name in (task.name for task in self.config.tasks):
            raise ConfigError(f"The model has learnt a task {name!r} already; give the new one another name.")
        if len(classes) == 1 and not self.method.takes_one_class:
            raise ConfigError(
                f"Task {name!r} has a single class, {classes[0]!r}, and in {self.method.name} nothing would tell it "
                "from the others: give it two classes or more, or choose a method with an expert per task (s_lora, "
                "s_prompts), where its route does."
            )
        if name in self.config.removed:
            raise ConfigError(f"The model has unlearnt a task {name!r}; give the new one another name.")
        self.method.start(TaskConfig(name, list(classes), domain), seed)

    @writing
    def finish_task(self, features_of: FeaturesOf, num_train_images: int) -> None:
        """Completes the current task: stores its expert and head rows, and fits the router.

        Args:
            features_of (callable): Extracts features of all training images; see
                [`hf_clpeft.methods.learning.FeaturesOf`].
            num_train_images (`int`): Number of training images.

        Raises:
            [`ConfigError`]: The method asks for several views of each image, and `features_of` has none.
        """
        method, task = self.method, self.method.task
        assert task is not None, "start_task comes first"
        task.num_train_images = num_train_images
        method.finish(asked_for_views(features_of, method.name))
        experts = [name for name in self.unchanged if not is_sums(name)]
        for name in [task.name, *method.remade] if method.independent else experts:
            self.unchanged.pop(name, None)
        self.config.classes = list(dict.fromkeys([*self.config.classes, *task.classes]))
        self.config.tasks.append(task)

    # Unlearning

    @writing
    def remove(self, task: str) -> None:
        """Unlearns a task exactly: deletes its expert, prototypes or sums, and head rows; others stay bit-identical.

        Args:
            task (`str`): Name of the task.

        Raises:
            [`ConfigError`]: There is no such task, or other tasks depend on it, so that it cannot be removed exactly.
            [`ExpertError`]: Another thread is training the model.
        """
        names = [known.name for known in self.config.tasks]
        if task not in names:
            raise ConfigError(
                f"There is no task {task!r} to remove; the model has learnt {', '.join(names) or 'none'}."
            )
        self.bank.claim(task)  # raises if another thread is training
        self.method.abandon()
        others = [known for known in self.config.tasks if known.name != task]
        classes = list(dict.fromkeys(label for known in others for label in known.classes))
        before = self.config.classes
        try:
            self.method.remove(names.index(task), {before.index(label): new for new, label in enumerate(classes)})
        finally:
            self.bank.abandon()
        self.config.tasks, self.config.classes = others, classes
        self.pictures = of_tasks(self.pictures, {known.name: known.name for known in others})
        self.config.removed.append(task)
        for name in (task, sums_file(task)):
            self.unchanged.pop(name, None)
        temperature = self.method.temperature()
        self.config.calibrated = temperature is not None
        if self.report is not None:
            self.report.remove_task(task)
            self.report.temperature = temperature

    # Saving and the Hub

    @reading
    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Saves the model, its card and its report to a folder atomically. The backbone is not saved.

        Other threads may predict meanwhile; those that save or finish a task wait.

        Args:
            folder (`str` or `Path`): Created if missing.
            overwrite (`bool`, *optional*, defaults to `False`): Replace another model in the folder.

        Raises:
            `OSError`, [`ConfigError`]: See [`hf_clpeft.storage.model_files.save_files`]; the folder is unchanged.
        """
        with self._saves.writing():
            self.unchanged = save_files(
                folder, self.method, self.backbone.processor, self.report, self.unchanged, overwrite, self.pictures
            )

    def push_to_hub(self, repo_id: str, squash_history: bool = False, handler: bool = False, **options: Any) -> str:
        """Pushes the model to the Hub as one commit, tagged with the name of its latest task; see [`push_folder`].

        Args:
            repo_id (`str`): Repo id; created if missing.
            squash_history (`bool`, *optional*, defaults to `False`): Squash the branch into this commit, and delete
                the tags that still contain a removed task.
            handler (`bool`, *optional*, defaults to `False`): Add what Inference Endpoints need to serve it.
            options: `token`, `private`, `revision` (a branch), `create_pr`, `commit_message`; see [`PushTarget`] and
                [`push_folder`].

        Returns:
            `str`: URL of the commit or pull request.

        Raises:
            [`HubError`]: The Hub cannot be reached, denies the request, or holds another model.
        """
        from tempfile import TemporaryDirectory

        message = options.pop("commit_message", None)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, PushTarget(repo_id, **options), message, squash_history, handler)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        backbone: str | Backbone | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype = "float32",
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        **hub_options: Any,
    ) -> "ContinualModel":
        """Loads a model from a folder or the Hub. Only safetensors and JSON are read.

        Args:
            name_or_path (`str` or `Path`): Folder, or repo id on the Hub; `"hf-clpeft/s-lora-digits"` is bundled
                with the package.
            backbone (`str` or [`Backbone`], *optional*): Folder or repo id of the backbone, if it has moved, or
                `repo@revision`; or a loaded backbone with the same image processor.
            revision (`str`, *optional*): Branch, tag or commit of the repo, for example `"task-003"`.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`): Dtype of the backbone's weights.
            attn_implementation (`str`, *optional*): Attention implementation, as in `transformers`.
            quantization_config (*optional*): Quantises the backbone; see [`load_backbone`]. It is not saved with a
                model: pass it again to predict as in training.
            hub_options: `token`, `cache_dir`, `local_files_only`.

        Returns:
            [`ContinualModel`]

        Raises:
            [`ConfigError`], [`ExpertError`]: A file is missing, damaged, unexpected or does not match.
            [`BackboneError`]: Weights or preprocessing of the backbone differ from those in training.
            [`HubError`]: There is no such repo or revision, or it cannot be reached.
        """
        bundled = bundled_folder(str(name_or_path)) if revision is None else None  # bundled models have no revisions
        folder = bundled or Path(name_or_path)
        local = folder.is_dir()
        folder = as_saved(folder) if local else fetch_model(str(name_or_path), revision, **hub_options)
        config = ContinualConfig.load(folder)
        if not local and backbone is None:
            check_repo_id(config.backbone.name_or_path, name_or_path)
        check_files(folder, config)
        processor = read_processor(folder, str(name_or_path))
        if isinstance(backbone, Backbone):
            check_backbone(backbone, config.backbone, processor, name_or_path)
        else:
            hub_options |= {"dtype": dtype, "attn_implementation": attn_implementation}
            hub_options |= {"quantization_config": quantization_config}
            backbone = load_saved_backbone(config.backbone, processor, backbone, name_or_path, **hub_options)
        model = cls(backbone, config)
        model.origin = f"{name_or_path}@{revision}" if revision else str(name_or_path)
        model.report, model.unchanged = load_files(folder, model.method)
        model.pictures = read_pictures(folder, config)
        return model


# Else `transformers.pipeline` warns that it does not support this model, although it does.
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["hf_clpeft"] = ContinualModel.__name__
