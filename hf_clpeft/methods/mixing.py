"""Combines the class scores of a router with the log-probabilities of several experts."""

import torch

from ..routing.gaussian import log_sum_exp


# Below 1, as the router is overconfident: its covariance is estimated from the images whose classes it separates.
# Chosen on held-out training images of PACS, Caltech-101 and CIFAR-10, where 1/4 is at most one point worse.
ROUTER_WEIGHT = 0.125


def mix(
    logits: torch.Tensor, selection: torch.Tensor, scores: torch.Tensor, owners: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Logits: an eighth of the router's log-likelihood plus the experts' log-probability.

    This is a product of two classifiers. The router compares the classes of all tasks; an expert is more accurate, but
    only among the classes of its own task, so its softmax is taken over these: logits of experts that were trained
    apart are not comparable. The probabilities of a class are summed over the selected experts that know it. A class
    that none of them knows gets −inf.

    Args:
        logits (`torch.Tensor` of shape `(batch, N, classes)`): Logits of the N selected experts; −inf for classes that
            an expert does not know.
        selection (integer `torch.Tensor` of shape `(batch, N)`): Indices of these experts.
        scores (`torch.Tensor` of shape `(batch, entries)`): The router's score of every class of every task.
        owners (integer `torch.Tensor` of shape `(entries,)`): Task of each entry.
        classes (integer `torch.Tensor` of shape `(entries,)`): Class index of each entry.

    Returns:
        `torch.Tensor` of shape `(batch, classes)`.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.mixing import mix

    >>> logits = torch.tensor([[[0.0, 2.0, -torch.inf], [-torch.inf, -torch.inf, 1.0]]])
    >>> scores = torch.tensor([[-4.0, -4.0, -8.0]])
    >>> mix(logits, torch.tensor([[0, 1]]), scores, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]))
    tensor([[-2.6269, -0.6269, -1.0000]])

    ```
    """
    own = selection[:, :, None] == owners  # entries of each expert's task
    log_probabilities = logits[:, :, classes].masked_fill(~own, -torch.inf).log_softmax(dim=-1)
    return log_sum_exp(log_probabilities.logsumexp(dim=1) + ROUTER_WEIGHT * scores, classes, logits.shape[2])
