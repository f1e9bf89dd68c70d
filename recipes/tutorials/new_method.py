"""A method of your own: an image goes to the task with the nearest class mean, whose LoRA adapter names its class.

python recipes/tutorials/new_method.py --benchmark digits

This file is all of it: models are saved, loaded, pushed, shown in the demo and compared (`imports:` in a file for
`compare.py`) with no line elsewhere. Whoever loads one imports this file first.
"""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy, normalize

from hf_clpeft import Batch, Method, MethodOptions, Routing, make_peft_config, run_recipe


class MeanLora(Method, name="mean_lora"):
    title = "LoRA by the nearest class mean"
    independent = routes = True  # a task has an expert of its own, and images choose among them

    @dataclass
    class Config(MethodOptions):  # goes into config.json; the command line offers --r
        r: int = field(default=2, metadata={"help": "Rank of the LoRA adapters."})

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        # Buffers are saved in method.safetensors; a size of 0 grows. One row for each class of each task.
        self.register_buffer("means", torch.zeros(0, self.query_size))
        self.register_buffer("weights", torch.zeros(0, backbone.hidden_size))
        self.register_buffer("owners", torch.zeros(0, dtype=torch.int64))  # task of a row
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))  # class of a row

    # Predicting: query (by default [CLS] of the frozen backbone), route, read (by default under that expert), classify

    def route(self, query):
        rows = torch.cdist(normalize(query, dim=-1), self.means)
        distances = rows.new_full((len(rows), len(self.bank)), torch.inf)
        distances = distances.scatter_reduce(1, self.owners.expand_as(rows), rows, "amin")  # of each task its nearest
        nearest = distances.min(dim=1)
        return Routing(nearest.indices, nearest.values, distances)

    def classify(self, features, routing):
        rows = features @ self.weights.T
        rows = rows.masked_fill(self.owners != routing.selection[:, None], -torch.inf)  # other tasks have no say
        logits = rows.new_full((len(rows), len(self.classes)), -torch.inf)
        return logits.scatter_reduce(1, self.labels.expand_as(rows), rows, "amax")

    # Learning: begin, loss for each batch, end

    def begin(self, task):
        peft = {"peft_type": "LORA", "r": self.options.r, "lora_alpha": self.options.r}
        self.bank.start(task.name, make_peft_config(peft, self.backbone))
        self._head = torch.nn.Linear(self.backbone.hidden_size, len(task.classes), bias=False)  # "_": is not saved

    def loss(self, batch: Batch):
        return cross_entropy(self._head(self.bank.under_training(batch.pixels)), self.rows(batch.labels))

    def end(self, features_of):
        self.bank.finish(self.task.name)
        features, labels = features_of(lambda pixels: normalize(self.query(pixels), dim=-1))  # of all training images
        means = torch.stack([features[labels == number].mean(dim=0) for number in self.numbers])
        self.means = torch.cat([self.means, means.to(self.means)])
        self.weights = torch.cat([self.weights, self._head.weight.detach()])
        self.labels = torch.cat([self.labels, self.labels.new_tensor(self.numbers)])
        self.owners = torch.cat([self.owners, self.owners.new_full((len(means),), len(self.bank) - 1)])

    # What its experts are called, and which belongs to which task

    def expert_names(self):
        return [task.name for task in self.config.tasks]

    def expert_of(self, position):
        return position


if __name__ == "__main__":
    run_recipe("mean_lora")
