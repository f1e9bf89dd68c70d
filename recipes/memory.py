"""Peak memory of a training step and of a prediction: our experts beside bare PEFT, with and without checkpointing.

    python recipes/memory.py --model tiny --num_experts 100
    python recipes/memory.py --model vit_b16 --dtype bfloat16 --batch_size 256   # on a GPU

Each measurement has a process of its own, as memory that was freed before would be used again unseen. `peak_mb` is
what a step takes beyond the weights of backbone and experts: on a GPU as torch counts it, on a CPU the growth of the
process, which needs Linux. Weights are random: memory does not depend on them. Writes `memory.csv`.
"""

import csv
import ctypes
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from throughput import (
    CHOICES,
    SHAPES,
    Setting,
    ThroughputArguments,
    environment_of,
    make_backbone,
    predictors,
    trainers,
)

from hf_clpeft.config.checks import MOST, check_ranges, check_types
from hf_clpeft.config.errors import ConfigError, errors_in_one_line
from hf_clpeft.experts.checkpointing import set_checkpointing
from hf_clpeft.training.parsing import OptionParser


MEASURED = {  # systems of recipes/throughput.py, and whether gradients are checkpointed in them
    "train": {"PEFT, one adapter": (False, True), "S-X: one expert": (False, True)},
    "predict": {"backbone": (False,), "bank, gathered": (False,), "PEFT, adapter_names=": (False,)},
}
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LINE = "{mode:8s} {system:24s} gradient_checkpointing={gradient_checkpointing!s:6s}{peak_mb:10.1f} MB"


@dataclass
class MemoryArguments:
    model: str = field(default="tiny", metadata={"help": f"One of {', '.join(SHAPES)}, or a repo id or folder."})
    num_experts: int = field(default=100, metadata={"help": "Experts in the bank and in PEFT's model."})
    rank: int = field(default=4, metadata={"help": "Rank of LoRA."})
    batch_size: int = field(default=64, metadata={"help": "Images per batch."})
    dtype: str = field(default="float32", metadata={"help": f"One of {', '.join(CHOICES['dtypes'])}."})
    only: list[str] = field(
        default_factory=list, metadata={"help": "Measure one system: its mode, its name, and on or off."}
    )
    output_dir: str = field(default="out/memory", metadata={"help": "Folder for the CSV."})

    def __post_init__(self):
        check_types(self)
        if self.dtype not in CHOICES["dtypes"]:
            raise ConfigError(f"dtype: {self.dtype!r} is not one of {', '.join(CHOICES['dtypes'])}.")
        check_ranges(self, **dict.fromkeys(("num_experts", "rank", "batch_size"), (1, MOST)))


def measure(args: MemoryArguments, mode: str, system: str, checkpointing: bool) -> dict:
    """The row of one system."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = make_backbone(args.model).to(device)
    set_checkpointing(backbone, checkpointing)
    setting = Setting(mode, "lora", args.rank, args.num_experts, args.batch_size, args.dtype, "off")
    build = trainers if mode == "train" else predictors
    run = build(backbone, setting, ThroughputArguments(max_peft_experts=MOST))[system]
    with torch.inference_mode(mode == "predict"):
        peak = peak_bytes(run, device)
    return {
        **asdict(setting),
        "system": system,
        "gradient_checkpointing": checkpointing,
        "peak_mb": round(peak / 1e6, 2),
        **environment_of(args.model, backbone),
    }


def peak_bytes(run: Callable, device: torch.device) -> int:
    """What two steps take beyond what is there before; the second finds the state of the optimizer."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(), run()
        return torch.cuda.max_memory_allocated() - before
    if not RESET.exists():
        raise ConfigError("On a CPU, peak memory is measured on Linux only.")
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed while building would be used again, unseen
    RESET.write_text("5")  # of the peak
    before = process_bytes("VmRSS")
    run(), run()
    return process_bytes("VmHWM") - before


def process_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def main():
    (args,) = OptionParser((MemoryArguments,)).read()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if args.only:
        mode, system, checkpointing = args.only
        row = measure(args, mode, system, checkpointing == "on")
        first = not (folder / "memory.csv").exists()
        with open(folder / "memory.csv", "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row.keys())
            if first:
                writer.writeheader()
            writer.writerow(row)
        print(LINE.format(**row), flush=True)
        return
    (folder / "memory.csv").unlink(missing_ok=True)
    for mode, systems in MEASURED.items():
        for system, choices in systems.items():
            for checkpointing in choices:
                only = ["--only", mode, system, "on" if checkpointing else "off"]
                subprocess.run([sys.executable, *sys.argv, *only], check=True)
    print(f"results: {folder / 'memory.csv'}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
