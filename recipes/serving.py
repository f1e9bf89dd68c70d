"""What single requests cost when every one has its own expert: latency and images per second, for 1 to 64 clients.

    python recipes/serving.py --model tiny --num_experts 10 100
    python recipes/serving.py --model vit_b16 --dtype bfloat16 --num_experts 100 1000 --requests 2048   # on a GPU

Each client sends one image, waits for its features and sends the next one. All systems answer from the queue of the
demo (`hf_clpeft.demo.batching`), which makes a batch of all requests that wait:

- *bank*: one mixed batch, in which every image has its own expert;
- *PEFT, adapter_names=*: likewise;
- *PEFT, one adapter at a time*: `set_adapter` and a forward pass for each expert in the batch;
- *merged, swapped in*: a model without adapters, into which the merged weights of the adapted layers of each expert in
  the batch are copied. They wait in the memory of the CPU, as those of a thousand experts do not fit on a GPU.

Weights are random: speed does not depend on them. The systems take turns, so that a slow moment of the machine hits
them alike. Writes `serving.csv`.
"""

import copy
import csv
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from throughput import CHOICES, SHAPES, Setting, environment_of, make_backbone, peft_with, random_experts

from hf_clpeft import Backbone, Expert, ExpertBank
from hf_clpeft.config.checks import MOST, check_ranges, check_types
from hf_clpeft.config.errors import ConfigError, errors_in_one_line
from hf_clpeft.demo.batching import Batcher
from hf_clpeft.experts.expert import make_peft_model
from hf_clpeft.training.parsing import OptionParser


LINE = (
    "experts={num_experts:<6d} clients={clients:<4d}{system:28s}{p50_ms:10.2f} ms (p50) {p99_ms:10.2f} ms (p99) "
    "{images_per_second:10.1f} images/s"
)
Request = tuple[torch.Tensor, int]  # an image and its expert
System = Callable[[Sequence[Request]], Sequence[torch.Tensor]]


@dataclass
class ServingArguments:
    model: str = field(default="tiny", metadata={"help": f"One of {', '.join(SHAPES)}, or a repo id or folder."})
    clients: list[int] = field(default_factory=lambda: [1, 8, 64], metadata={"help": "Clients at the same time."})
    num_experts: list[int] = field(default_factory=lambda: [10, 100], metadata={"help": "Experts that are served."})
    rank: int = field(default=4, metadata={"help": "Rank of LoRA."})
    dtype: str = field(default="float32", metadata={"help": f"One of {', '.join(CHOICES['dtypes'])}."})
    requests: int = field(default=384, metadata={"help": "Counted requests of each system, over all clients."})
    rounds: int = field(default=3, metadata={"help": "Turns of each system, among which its requests are divided."})
    max_single_experts: int = field(
        default=100, metadata={"help": "Leave all but the bank out beyond this many experts: they take too long."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads."})
    output_dir: str = field(default="out/serving", metadata={"help": "Folder for the CSV."})

    def __post_init__(self):
        check_types(self)
        if self.dtype not in CHOICES["dtypes"]:
            raise ConfigError(f"dtype: {self.dtype!r} is not one of {', '.join(CHOICES['dtypes'])}.")
        counts = ("rank", "requests", "rounds")
        check_ranges(self, **dict.fromkeys(counts, (1, MOST)), max_single_experts=(0, MOST), threads=(1, 4096))
        for name in ("clients", "num_experts"):
            if min(getattr(self, name), default=0) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more each.")


def systems_of(backbone: Backbone, experts: list[Expert], singles: bool) -> dict[str, System]:
    """Every system as a function of requests; each has a copy of the backbone."""

    def collated(requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.stack([image for image, _ in requests]).to(backbone.device, backbone.model.dtype)
        return pixels, torch.tensor([expert for _, expert in requests])

    bank = ExpertBank(copy.deepcopy(backbone))
    bank.extend(experts)

    def mixed(requests: Sequence[Request]) -> torch.Tensor:
        pixels, selection = collated(requests)
        return bank(pixels, selection.to(pixels.device)).float().cpu()

    if not singles:
        return {"bank": mixed}
    peft_model = peft_with(copy.deepcopy(backbone), experts)

    def named(requests: Sequence[Request]) -> torch.Tensor:
        pixels, selection = collated(requests)
        names = [experts[index].name for index in selection.tolist()]
        return peft_model(pixel_values=pixels, adapter_names=names).last_hidden_state[:, 0].float().cpu()

    def one_by_one(change: Callable[[int], None], run: Callable, requests: Sequence[Request]) -> torch.Tensor:
        pixels, selection = collated(requests)
        features = torch.empty(len(pixels), backbone.hidden_size)
        for index in selection.unique().tolist():
            change(index)
            rows = selection == index
            features[rows] = run(pixel_values=pixels[rows.to(pixels.device)]).last_hidden_state[:, 0].float().cpu()
        return features

    own = copy.deepcopy(backbone)
    merged = [merged_weights(own, expert) for expert in experts]
    layers = {name: own.model.get_submodule(name).weight for name in merged[0]}

    def swap(index: int) -> None:
        for name, weight in merged[index].items():
            layers[name].copy_(weight, non_blocking=True)

    return {
        "bank": mixed,
        "PEFT, adapter_names=": named,
        "PEFT, one adapter at a time": partial(
            one_by_one, lambda index: peft_model.set_adapter(experts[index].name), peft_model
        ),
        "merged, swapped in": partial(one_by_one, swap, own.model),
    }


def merged_weights(backbone: Backbone, expert: Expert) -> dict[str, torch.Tensor]:
    """Weights of the layers that an expert adapts, with its update added, by the names of the layers."""
    peft_model = make_peft_model(backbone, copy.deepcopy(expert.config))
    expert.copy_to(peft_model)
    names = [name for name, layer in peft_model.get_base_model().named_modules() if isinstance(layer, LoraLayer)]
    weights = {}
    for name in names:
        layer = peft_model.get_base_model().get_submodule(name)
        weight = layer.base_layer.weight
        weights[name] = (weight + layer.get_delta_weight("default").to(weight)).cpu()
        if backbone.device.type == "cuda":
            weights[name] = weights[name].pin_memory()
    peft_model.unload()
    return weights


def stream_to(system: System, requests: Sequence[Request], clients: int) -> tuple[list[float], float]:
    """Sends requests from several clients at the same time. Returns the latency of each, and the time of all."""
    batcher, latencies, waiting = Batcher(), list[float](), iter(requests)
    lock, barrier = threading.Lock(), threading.Barrier(clients + 1)

    @torch.inference_mode()
    def handle(items: Sequence[Request]) -> Sequence[torch.Tensor]:
        return system(items)

    def client() -> None:
        barrier.wait()
        while True:
            with lock:
                request = next(waiting, None)
            if request is None:
                return
            start = time.perf_counter()
            batcher.submit(handle, request).result()
            latencies.append(time.perf_counter() - start)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return latencies, time.perf_counter() - start


def rows_of(args: ServingArguments, backbone: Backbone, num_experts: int, environment: dict) -> list[dict]:
    """One row for every system and number of clients."""
    setting = Setting("predict", "lora", args.rank, num_experts, 1, args.dtype, "off")
    experts = random_experts(backbone, setting, num_experts)
    systems = systems_of(backbone, experts, num_experts <= args.max_single_experts)
    size, rows = backbone.config.image_size, []
    images = torch.randn(64, 3, size, size)
    chosen = torch.randint(num_experts, (args.requests,)).tolist()
    requests = [(images[number % 64], expert) for number, expert in enumerate(chosen)]
    for clients in args.clients:
        latencies: dict[str, list[float]] = {name: [] for name in systems}
        seconds = dict.fromkeys(systems, 0.0)
        for number in range(1 + args.rounds):
            for name, system in systems.items():
                # The first turn warms up: kernels are chosen by the size of the batch.
                part = requests[: 2 * clients] if number == 0 else requests[number - 1 :: args.rounds]
                found, took = stream_to(system, part, clients)
                if number:
                    latencies[name] += found
                    seconds[name] += took
        for name, found in latencies.items():
            spread = statistics.quantiles([*found, *found], n=100, method="inclusive")
            rows.append(
                {
                    "num_experts": num_experts,
                    "rank": args.rank,
                    "dtype": args.dtype,
                    "clients": clients,
                    "system": name,
                    "requests": len(found),
                    "p50_ms": round(1000 * spread[49], 2),
                    "p99_ms": round(1000 * spread[98], 2),
                    "images_per_second": round(len(found) / seconds[name], 2),
                    **environment,
                }
            )
            print(LINE.format(**rows[-1]), flush=True)
    return rows


def main():
    (args,) = OptionParser((ServingArguments,)).read()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = make_backbone(args.model).to(device, getattr(torch, args.dtype))
    environment = environment_of(args.model, backbone)
    folder, rows = Path(args.output_dir), []
    folder.mkdir(parents=True, exist_ok=True)
    for num_experts in args.num_experts:
        rows += rows_of(args, backbone, num_experts, environment)
        with open(folder / "serving.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    print(f"results: {folder / 'serving.csv'}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
