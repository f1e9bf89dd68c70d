"""What experts in the last layers save: prediction, and training from cached outputs of the layers below.

    python recipes/upper_layers.py --model vit_s16 --last 4
    python recipes/upper_layers.py --model vit_b16 --last 4 --batch_size 256   # on a GPU

Experts of the last layers have as many parameters as rank-1 experts of all. All systems take turns, so that a slow
moment of the machine hits them alike, and images per second are medians. `speed_up` is relative to the first system of
its kind; both have the same batch. Weights are random: speed does not depend on them. Writes `upper_layers.csv`.
"""

import copy
import csv
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from throughput import SHAPES, environment_of, make_backbone, measure

from hf_clpeft import Backbone, Batch, ContinualConfig, ContinualModel, MethodOptions, s_lora, s_lora_mix
from hf_clpeft.backbones.trunk import Hidden
from hf_clpeft.config.checks import MOST, check_ranges, check_types
from hf_clpeft.config.errors import ConfigError, errors_in_one_line
from hf_clpeft.experts.expert import make_peft_config, make_peft_model
from hf_clpeft.training.parsing import OptionParser


TASKS, CLASSES = 4, 10
LINE = "{mode:8s} {system:34s}{images_per_second:10.1f} images/s{speed_up:8.2f}x{forwards:7.2f} forwards"


@dataclass
class UpperLayersArguments:
    model: str = field(default="tiny", metadata={"help": f"One of {', '.join(SHAPES)}, or a repo id or folder."})
    last: int = field(default=4, metadata={"help": "Number of the last layers that experts adapt."})
    batch_size: int = field(default=32, metadata={"help": "Images per batch."})
    warmup: int = field(default=2, metadata={"help": "Runs of each system that are not counted."})
    repeats: int = field(default=9, metadata={"help": "Counted runs of each system."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads."})
    output_dir: str = field(default="out/upper_layers", metadata={"help": "Folder for the CSV."})

    def __post_init__(self):
        check_types(self)
        check_ranges(self, warmup=(0, MOST), threads=(1, 4096), **dict.fromkeys(("last", "batch_size"), (1, MOST)))
        check_ranges(self, repeats=(1, MOST))


def predictors(backbone: Backbone, images: torch.Tensor, upper: dict, trunk: list[int]) -> dict[str, Callable]:
    """S-LoRA and S-LoRA-Mix with experts of all layers, and of the last ones."""

    def learnt(options: MethodOptions) -> Callable:
        own = copy.deepcopy(backbone)
        model = ContinualModel(own, ContinualConfig(options, own.config))
        labels = torch.arange(len(images)) % CLASSES
        for task in range(TASKS):
            model.start_task(f"task-{task}", [f"{task} {number}" for number in range(CLASSES)])
            features_of = lambda features, *views, task=task: (features(images).cpu(), labels + CLASSES * task)  # noqa: E731
            model.finish_task(features_of, len(images))
        return lambda: model(images)

    return {
        "S-LoRA, all layers": learnt(s_lora()),
        "S-LoRA, last layers": learnt(s_lora(**upper)),
        "S-LoRA, last layers, trunk's route": learnt(s_lora(**upper, query_layers=trunk)),
        "S-LoRA-Mix, all layers": learnt(s_lora_mix()),
        "S-LoRA-Mix, last layers": learnt(s_lora_mix(**upper)),
    }


def trainers(backbone: Backbone, images: torch.Tensor, upper: dict, trunk: list[int]) -> dict[str, Callable]:
    """Training steps of bare PEFT with that expert, of bare PEFT in all layers, and of S-LoRA, from the cache."""
    labels = torch.arange(len(images), device=images.device) % CLASSES
    first = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    few = {"peft_type": "LORA", "r": upper["r"], "lora_alpha": upper["r"]}

    def step_of(parameters: list, loss_of: Callable) -> Callable:
        optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-3)

        def step():
            loss_of().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def bare(peft: dict, layers: list[int] | None) -> Callable:
        own = copy.deepcopy(backbone)
        peft_model = make_peft_model(own, make_peft_config(peft, own, layers)).to(images.device)
        head = torch.nn.Linear(backbone.hidden_size, CLASSES, device=images.device)

        def loss():
            features = peft_model(pixel_values=images).last_hidden_state[:, 0]
            return torch.nn.functional.cross_entropy(head(features), labels)

        return step_of([*peft_model.parameters(), *head.parameters()], loss)

    own = copy.deepcopy(backbone)
    model = ContinualModel(own, ContinualConfig(s_lora(**upper), own.config))
    model.start_task("task", [str(number) for number in range(CLASSES)])
    with torch.no_grad(), model.bank.sharing() as shared:
        layers, tokens, wrapped = own.below(images, shared)
    cached = tokens.cpu()

    def from_cache():
        with model.bank.sharing() as shared:
            shared.keep(images, Hidden(layers, cached[torch.arange(len(images))].to(images.device), wrapped))
            return model.method.loss(Batch(images, labels))

    return {
        "PEFT, last layers": bare(few, model.method.expert_layers),
        "PEFT, all layers": bare(first, None),
        "S-LoRA, last layers, cached trunk": step_of([*model.method.parameters()], from_cache),
    }


def count(backbone: Backbone, run: Callable, images: int) -> float:
    """Forward passes per image, counted layer by layer."""
    kind, ran = type(backbone.model.get_submodule(backbone.layout.layers or "")[0]), [0]

    def note(module: torch.nn.Module, inputs: tuple):
        ran[0] += len(inputs[0]) if isinstance(module, kind) else 0

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    run()
    handle.remove()
    return ran[0] / (images * backbone.num_layers)


def main():
    (args,) = OptionParser((UpperLayersArguments,)).read()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = make_backbone(args.model).to(device)
    if args.last >= backbone.num_layers:
        raise ConfigError(f"last={args.last} leaves no layer below: the backbone has {backbone.num_layers}.")
    upper = {"expert_layers": [*range(-args.last, 0)], "r": max(1, backbone.num_layers // args.last)}
    trunk = [backbone.num_layers - args.last]
    images = torch.randn(args.batch_size, *backbone.input_shape, device=device)
    folder, rows = Path(args.output_dir), []
    folder.mkdir(parents=True, exist_ok=True)
    for mode, build in (("predict", predictors), ("train", trainers)):
        systems = build(backbone, images, upper, trunk)
        with torch.inference_mode(mode == "predict"):
            seconds = measure(systems, device, args)
            forwards = {name: count(backbone, run, len(images)) for name, run in systems.items()}
        base = ""
        for name, times in seconds.items():
            base = name if not base or name.endswith("Mix, all layers") else base
            row = {"mode": mode, "system": name, "batch_size": args.batch_size, "rank": upper["r"], "last": args.last}
            row |= {"images_per_second": round(args.batch_size / statistics.median(times), 2)}
            row |= {"speed_up": round(statistics.median(seconds[base]) / statistics.median(times), 3)}
            row |= {"forwards": round(forwards[name], 3), "repeats": args.repeats}
            rows.append(row | environment_of(args.model, backbone))
            print(LINE.format(**row), flush=True)
    with open(folder / "upper_layers.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"results: {folder / 'upper_layers.csv'}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
