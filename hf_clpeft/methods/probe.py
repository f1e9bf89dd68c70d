"""The linear probe: logistic regression on frozen features."""

import torch


STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse regularisation strengths, C of scikit-learn


def fit_probe(head: torch.nn.Linear, features: torch.Tensor, rows: torch.Tensor, seed: int = 0) -> None:
    """Fits a linear layer by L2-regularised logistic regression on standardised features.

    The regularisation strength is chosen on a held-out fifth of the images; then all images are fitted.

    Args:
        head (`torch.nn.Linear`): The layer to fit.
        features (`torch.Tensor` of shape `(images, in_features)`): Features of all training images.
        rows (integer `torch.Tensor` of shape `(images,)`): Target output of each image.
        seed (`int`, *optional*, defaults to 0): Seed of the split.

    Example:

    ```py
    >>> import torch
    >>> from hf_clpeft.methods.probe import fit_probe

    >>> head = torch.nn.Linear(2, 2)
    >>> fit_probe(head, torch.eye(2).repeat(20, 1), torch.arange(2).repeat(20))
    >>> head(torch.eye(2)).argmax(dim=1).tolist()
    [0, 1]

    ```
    """
    from sklearn.linear_model import LogisticRegression

    present, labels = rows.unique(return_inverse=True)
    if len(present) < 2:
        return  # a single class
    mean, spread = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    inputs, labels = ((features - mean) / spread).numpy(), labels.numpy()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
    held_out, fitted = order[: len(order) // 5], order[len(order) // 5 :]

    def classifier(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=1000)

    def score(strength: float) -> float:
        return classifier(strength).fit(inputs[fitted], labels[fitted]).score(inputs[held_out], labels[held_out])

    best = max(STRENGTHS, key=score) if len(set(labels[fitted])) > 1 and len(held_out) else 1.0
    found = classifier(best).fit(inputs, labels)
    weight, bias = torch.from_numpy(found.coef_).float(), torch.from_numpy(found.intercept_).float()
    if len(weight) == 1:  # scikit-learn fits one output for two classes
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight = weight / spread
    with torch.no_grad():
        head.weight[present] = weight.to(head.weight)
        head.bias[present] = (bias - weight @ mean).to(head.bias)
