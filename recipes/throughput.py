"""What a batch costs in which every image has its own expert: our bank, PEFT, and the plain backbone.

    python recipes/throughput.py --model tiny --num_experts 1 10 100 1000
    python recipes/throughput.py --model vit_b16 --dtypes bfloat16 --batch_sizes 256 --compile off on   # on a GPU

Weights are random: speed does not depend on them. All systems of one setting take turns, so that a slow moment of the
machine hits them alike. Writes `throughput.csv` and `throughput.png`. In prediction `x_base` is time relative to the
plain backbone, in training relative to bare PEFT with one adapter; both from the fastest repeat, which is what noise
disturbs least. `x_pairs` is the median of the ratios of single repeats. Images per second are medians.
"""

import copy
import csv
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from hf_clpeft import METHODS, Backbone, Batch, ContinualConfig, Expert, ExpertBank, load_backbone
from hf_clpeft.config import BackboneConfig, MethodOptions, TaskConfig
from hf_clpeft.config.checks import MOST, check_ranges, check_types
from hf_clpeft.config.errors import ConfigError, errors_in_one_line
from hf_clpeft.experts.expert import make_peft_config, make_peft_model
from hf_clpeft.methods import Method, make_method
from hf_clpeft.reports.plots import plot_throughput
from hf_clpeft.reports.versions import library_versions
from hf_clpeft.training.parsing import OptionParser


SHAPES = {  # hidden size, layers, heads, image size, patch size
    "tiny": (32, 12, 2, 64, 16),
    "vit_ti16": (192, 12, 3, 160, 16),
    "vit_s16": (384, 12, 6, 224, 16),
    "vit_b16": (768, 12, 12, 224, 16),
}
CHOICES = {
    "modes": ("predict", "train"),
    "techniques": ("lora", "prompts"),
    "dtypes": ("float32", "bfloat16", "float16"),
    "compile": ("off", "on"),
}
CLASSES, TOP_N = 10, 5
LINE = (
    "{mode} {technique} {size} experts={num_experts} batch={batch_size} {dtype} compile={compile} {system:28s}"
    "{images_per_second:10.1f} images/s {x_base:7.3f}x {peak_mb:9.1f} MB"
)


@dataclass
class ThroughputArguments:
    model: str = field(default="tiny", metadata={"help": f"One of {', '.join(SHAPES)}, or a repo id or folder."})
    modes: list[str] = field(default_factory=lambda: ["predict", "train"], metadata={"help": "predict, train."})
    techniques: list[str] = field(default_factory=lambda: ["lora", "prompts"], metadata={"help": "lora, prompts."})
    num_experts: list[int] = field(
        default_factory=lambda: [1, 10, 100, 1000], metadata={"help": "Experts in the bank; in training, in the pool."}
    )
    ranks: list[int] = field(default_factory=lambda: [1], metadata={"help": "Ranks of LoRA."})
    prompt_lengths: list[int] = field(default_factory=lambda: [10], metadata={"help": "Tokens of a prompt."})
    batch_sizes: list[int] = field(default_factory=lambda: [64], metadata={"help": "Images per batch."})
    dtypes: list[str] = field(default_factory=lambda: ["float32"], metadata={"help": "float32, bfloat16, float16."})
    compile: list[str] = field(
        default_factory=lambda: ["off"], metadata={"help": "off, on: torch.compile of backbone and bank."}
    )
    max_peft_experts: int = field(
        default=100, metadata={"help": "Leave PEFT's adapter_names out beyond this: adding adapters is quadratic."}
    )
    warmup: int = field(default=3, metadata={"help": "Runs of each system that are not counted."})
    repeats: int = field(default=15, metadata={"help": "Counted runs of each system."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads."})
    output_dir: str = field(default="out/throughput", metadata={"help": "Folder for the CSV and the plot."})

    def __post_init__(self):
        check_types(self)
        for name, allowed in CHOICES.items():
            unknown = [value for value in getattr(self, name) if value not in allowed]
            if unknown:
                raise ConfigError(f"{name}: {unknown[0]!r} is not one of {', '.join(allowed)}.")
        check_ranges(self, max_peft_experts=(0, MOST), warmup=(0, MOST), repeats=(1, MOST), threads=(1, 4096))
        for name in ("num_experts", "ranks", "prompt_lengths", "batch_sizes"):
            if min(getattr(self, name)) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more each.")


@dataclass
class Setting:
    """One point of the grid."""

    mode: str
    technique: str
    size: int
    num_experts: int
    batch_size: int
    dtype: str
    compile: str

    @property
    def peft(self) -> dict:
        if self.technique == "lora":
            return {"peft_type": "LORA", "r": self.size, "lora_alpha": self.size}
        return {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": self.size}


def settings(args: ThroughputArguments):
    sizes = {"lora": args.ranks, "prompts": args.prompt_lengths}
    for mode, technique in itertools.product(args.modes, args.techniques):
        rest = (sizes[technique], args.num_experts, args.batch_sizes, args.dtypes, args.compile)
        for values in itertools.product(*rest):
            yield Setting(mode, technique, *values)


def make_backbone(name: str) -> Backbone:
    if name not in SHAPES:
        return load_backbone(name)
    hidden, layers, heads, size, patch = SHAPES[name]
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        image_size=size,
        patch_size=patch,
    )
    processor = ViTImageProcessorPil(size={"height": size, "width": size})
    return Backbone(ViTModel(config, add_pooling_layer=False), processor, BackboneConfig(name, size, "random"))


def random_experts(backbone: Backbone, setting: Setting, count: int) -> list[Expert]:
    one = make_peft_model(copy.deepcopy(backbone), make_peft_config(setting.peft, backbone))
    fresh = Expert.from_peft_model("fresh", one)
    return [
        Expert(f"expert-{i}", fresh.config, {key: 0.02 * torch.randn_like(t) for key, t in fresh.tensors.items()})
        for i in range(count)
    ]


def peft_with(backbone: Backbone, experts: list[Expert]) -> PeftModel:
    """All experts as adapters of one PEFT model, which changes the backbone."""
    peft_model = PeftModel(backbone.model, copy.deepcopy(experts[0].config), adapter_name=experts[0].name)
    for expert in experts[1:]:
        peft_model.add_adapter(expert.name, copy.deepcopy(expert.config))
    for expert in experts:
        set_peft_model_state_dict(peft_model, expert.tensors, adapter_name=expert.name)
    return peft_model.eval()


def predictors(backbone: Backbone, setting: Setting, args: ThroughputArguments) -> dict[str, Callable]:
    """Every system as a function of nothing that runs one batch without gradients."""
    dtype, device = getattr(torch, setting.dtype), backbone.device
    size, batch = backbone.config.image_size, setting.batch_size
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    # Every image its own expert, as far as there are enough.
    selection = torch.randperm(max(batch, setting.num_experts), device=device)[:batch] % setting.num_experts
    experts = random_experts(backbone, setting, setting.num_experts)
    compiled = setting.compile == "on"

    def fresh() -> Backbone:
        return copy.deepcopy(backbone).to(dtype)

    base = fresh()
    base = torch.compile(base, fullgraph=True) if compiled else base
    systems = {"backbone": lambda: base(images)}
    forms = {"lora": ("stacked", "gathered", "grouped"), "prompts": ("gathered", "grouped")}[setting.technique]
    for form in forms:
        bank = ExpertBank(fresh(), form)
        bank.extend(experts)
        run = torch.compile(bank, fullgraph=True) if compiled and form != "grouped" else bank
        systems[f"bank, {form}"] = lambda run=run: run(images, selection)
    if setting.technique == "lora" and setting.num_experts <= args.max_peft_experts:
        peft_model = peft_with(fresh(), experts)
        names = [experts[index].name for index in selection.tolist()]
        systems["PEFT, adapter_names="] = lambda: peft_model(pixel_values=images, adapter_names=names)

        def one_at_a_time():
            for index in selection.unique().tolist():
                peft_model.set_adapter(experts[index].name)
                peft_model(pixel_values=images[selection == index])

        systems["PEFT, one adapter at a time"] = one_at_a_time
    return systems


def trainers(backbone: Backbone, setting: Setting, args: ThroughputArguments) -> dict[str, Callable]:
    """Every system as a function of nothing that makes one training step: forward, backward, AdamW."""
    dtype, device = getattr(torch, setting.dtype), backbone.device
    size, batch = backbone.config.image_size, setting.batch_size
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
    query = torch.randn(batch, backbone.hidden_size, device=device)

    def step_of(parameters: Iterable[torch.nn.Parameter], loss_of: Callable) -> Callable:
        optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-3)

        def step():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = loss_of().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def begun(options: MethodOptions, form: str = "auto") -> Method:
        """A method that has begun a task, on a backbone of its own."""
        own = copy.deepcopy(backbone)
        method = make_method(own, ContinualConfig(options, own.config))
        method.bank = ExpertBank(own, form)
        method.to(device).start(TaskConfig("task", [str(i) for i in range(CLASSES)]))
        return method

    own = copy.deepcopy(backbone)
    peft_model = make_peft_model(own, make_peft_config(setting.peft, own)).to(device)
    head = torch.nn.Linear(backbone.hidden_size, CLASSES, device=device)

    def bare_loss():
        features = peft_model(pixel_values=images).last_hidden_state[:, 0]
        return torch.nn.functional.cross_entropy(head(features.float()).float(), labels)

    systems = {"PEFT, one adapter": step_of([*peft_model.parameters(), *head.parameters()], bare_loss)}
    expert = begun(METHODS["s_x"].Config(peft=setting.peft))
    systems["S-X: one expert"] = step_of(expert.parameters(), lambda: expert.loss(Batch(images, labels)))
    parts = [peft_model, expert.bank.slot]
    size = {"pool_size": setting.num_experts, "top_n": min(TOP_N, setting.num_experts)}
    for form in ("stacked", "gathered") if setting.technique == "lora" else ("gathered",):
        pool = begun(METHODS["l2x"].Config(peft=setting.peft, **size), form)
        loss_of = lambda pool=pool: pool.loss(Batch(images, labels, query))  # noqa: E731
        systems[f"L2X: pool, {form}"] = step_of(pool.parameters(), loss_of)
        parts.append(pool.bank)
    for part in parts if setting.compile == "on" else []:
        part.compile()
    return systems


def measure(systems: dict[str, Callable], device: torch.device, args: ThroughputArguments) -> dict[str, list[float]]:
    """Seconds of every repeat of every system."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for run in systems.values():
        for _ in range(args.warmup):
            run()
    seconds = {name: [] for name in systems}
    for _ in range(args.repeats):
        for name, run in systems.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(run: Callable, device: torch.device) -> int:
    """Peak of the device's memory while running; on a CPU, which does not count, what is kept for backward."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def rows_of(setting: Setting, backbone: Backbone, args: ThroughputArguments, environment: dict) -> list[dict]:
    torch.compiler.reset()
    training = setting.mode == "train"
    systems = (trainers if training else predictors)(backbone, setting, args)
    with torch.inference_mode(not training):
        seconds = measure(systems, backbone.device, args)
        peaks = {name: peak_bytes(run, backbone.device) for name, run in systems.items()}
    first = next(iter(seconds.values()))
    return [
        {
            **asdict(setting),
            "system": name,
            "images_per_second": round(setting.batch_size / statistics.median(times), 2),
            "median_ms": round(1000 * statistics.median(times), 3),
            "fastest_ms": round(1000 * min(times), 3),
            "x_base": round(min(times) / min(first), 4),
            "x_pairs": round(statistics.median(own / base for own, base in zip(times, first, strict=True)), 4),
            "peak_mb": round(peaks[name] / 1e6, 2),
            **environment,
        }
        for name, times in seconds.items()
    ]


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"


def environment_of(model: str, backbone: Backbone) -> dict:
    """Columns of every row: what was measured, on which machine, with which versions."""
    return {
        "model": model,
        "weights": backbone.config.weight_hash[:12],
        "seed": 0,
        "device": name_of(backbone.device),
        "threads": torch.get_num_threads(),
        **library_versions(),
    }


def main():
    (args,) = OptionParser((ThroughputArguments,)).read()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = make_backbone(args.model).to(device)
    environment = {**environment_of(args.model, backbone), "repeats": args.repeats}
    folder, rows = Path(args.output_dir), []
    folder.mkdir(parents=True, exist_ok=True)
    for setting in settings(args):
        found = rows_of(setting, backbone, args, environment)
        rows += found
        with open(folder / "throughput.csv", "w", newline="", encoding="utf-8") as file:  # after every setting
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        for row in found:
            print(LINE.format(**row), flush=True)
    plot_throughput(rows, folder / "throughput.png")
    print(f"results: {folder / 'throughput.csv'}    picture: {folder / 'throughput.png'}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
