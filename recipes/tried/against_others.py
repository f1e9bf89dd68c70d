"""S-LoRA-Mix whose experts are trained against "others", so that an expert can also say that an image is not its own.

Why: an expert is asked about images of all tasks, and its softmax knows the classes of one. No image of another task
may be kept, so that two images of different classes of the task, mixed, stand in for them: of half the pairs, one is
pasted into the other (CutMix, arXiv 1905.04899), and the rest are blended (mixup, arXiv 1710.09412). They are labelled
with one more row of the head, whose logit is in the softmax of training and of judging.
"""

import torch

from hf_clpeft import METHODS
from hf_clpeft.methods.heads import Heads
from hf_clpeft.methods.method import Method
from hf_clpeft.methods.mixing import ROUTER_WEIGHT
from hf_clpeft.routing.gaussian import log_sum_exp


LEAST_SHARE = 0.3  # of either image in a mixed one: with less, it is an image of the other's class


class AgainstOthers(METHODS["s_lora_mix"], name="against_others"):
    title = "S-LoRA-Mix against others"

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.router.measures = False  # nothing is rejected here, and thresholds take longer than all else
        self.register_buffer("others", torch.zeros(0, backbone.hidden_size + 1))  # row and bias of each task

    def begin(self, task):
        rows = list(range(len(self.numbers) + 1))
        self.train_expert(task.name, Heads(self.backbone.hidden_size, shared=False).start(rows))

    def loss(self, batch):
        labels = self.rows(batch.labels)
        mixed, apart = mix_up(batch.pixels, labels)
        targets = torch.cat([labels, torch.full_like(labels, len(self.numbers))])
        own, others = self.expert_loss(torch.cat([batch.pixels, mixed]), targets).unflatten(0, (2, -1))
        return own + apart * others  # so that "others" are about as many as all images of the task

    def end(self, features_of):
        row = torch.cat([self._head.weight[-1], self._head.bias[-1:]]).detach()
        self.others = torch.cat([self.others, row[None].to(self.others)])
        trained, self._head = self._head, self.heads.start(self.numbers)
        with torch.no_grad():
            self._head.weight.copy_(trained.weight[:-1])
            self._head.bias.copy_(trained.bias[:-1])
        super().end(features_of)

    def classify(self, features, routing):
        judged = []
        for number, chosen in enumerate(routing.selection.T):
            own, row = features[:, number], self.others[chosen]
            none = (own * row[:, :-1]).sum(dim=1, keepdim=True) + row[:, -1:]
            judged.append(torch.cat([self.heads(own, chosen), none], dim=1).log_softmax(dim=1)[:, :-1])
        # As in `mix`, but that what is left for others is not shared out among the classes of the task.
        router = self.router
        stranger = routing.selection[:, :, None] != router.owners
        logs = torch.stack(judged, dim=1)[:, :, router.classes].masked_fill(stranger, -torch.inf)
        return log_sum_exp(logs.logsumexp(dim=1) + ROUTER_WEIGHT * routing.scores, router.classes, router.num_classes)

    def accept(self, giver):
        Method.accept(self, giver)  # which says that experts of other methods have no such row

    def remove(self, position, number_of):
        super().remove(position, number_of)
        self.others = torch.cat([self.others[:position], self.others[position + 1 :]])

    def merge(self, other, number_of, names):
        super().merge(other, number_of, names)
        self.others = torch.cat([self.others, other.others.to(self.others)])


def mix_up(pixels, labels):
    """Every image mixed with another of the batch; and 1 where these are of different classes, else 0."""
    count, device = len(pixels), pixels.device
    partner = torch.randperm(count, device=device)
    share = LEAST_SHARE + (1 - 2 * LEAST_SHARE) * torch.rand(count, 1, 1, device=device)  # of the partner
    height, width = (torch.linspace(0, 1, size, device=device) for size in pixels.shape[-2:])
    side = share.sqrt()
    top, left = ((1 - side) * torch.rand(count, 1, 1, device=device) for _ in range(2))
    down, across = height[None, :, None] - top, width[None, None] - left
    inside = (down >= 0) & (down <= side) & (across >= 0) & (across <= side)
    pasted = torch.rand(count, 1, 1, device=device) < 0.5
    weight = torch.where(pasted, inside.to(pixels), share.to(pixels))[:, None]
    mixed = (1 - weight) * pixels + weight * pixels[partner]
    return mixed, (labels != labels[partner]).to(pixels.dtype)
