"""The last layer is run for [CLS] alone where that is the same, and whole elsewhere."""

import pytest
import torch
from conftest import BACKBONE

from hf_clpeft import load_backbone
from hf_clpeft.backbones.last_layer import find_parts
from hf_clpeft.backbones.trunk import Trunk
from hf_clpeft.experts.checkpointing import set_checkpointing


def lengths_read(backbone, run):
    """Numbers of tokens that the last MLP reads in one forward pass."""
    seen = []
    hook = backbone.model.layers[-1].mlp.register_forward_hook(
        lambda module, args, output: seen.append(output.shape[1])
    )
    run()
    hook.remove()
    return seen


def test_features_and_gradients_are_those_of_a_whole_pass():
    backbone = load_backbone(BACKBONE)
    pixels = torch.randn(3, *backbone.input_shape, requires_grad=True)
    whole, found = backbone.pool(backbone.tokens(pixels)), backbone(pixels)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    (wanted,), (gradient,) = (torch.autograd.grad(features.square().sum(), pixels) for features in (whole, found))
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_the_last_mlp_reads_one_token_where_no_other_is_asked_for():
    backbone = load_backbone(BACKBONE)
    pixels, count = torch.zeros(2, *backbone.input_shape), backbone.num_layers
    assert lengths_read(backbone, lambda: backbone(pixels)) == [1]
    assert lengths_read(backbone, lambda: backbone(pixels, [2, count])) == [1]
    assert lengths_read(backbone, lambda: backbone(pixels, trunk=Trunk(count - 1))) == [1]
    (whole,) = lengths_read(backbone, lambda: backbone.tokens(pixels))
    assert whole > 1


def test_a_layer_whose_forward_pass_is_another_runs_whole():
    backbone = load_backbone(BACKBONE)
    pixels = torch.zeros(2, *backbone.input_shape)
    plain = backbone(pixels)
    set_checkpointing(backbone, True)
    (length,) = lengths_read(backbone, lambda: backbone(pixels))
    assert length > 1
    torch.testing.assert_close(backbone(pixels), plain, rtol=1e-5, atol=1e-5)


class Mixing(torch.nn.Linear):
    """In the place of attention."""

    def forward(self, x):
        return super().forward(x).cumsum(dim=1).flip(1)


class Layer(torch.nn.Module):
    """A layer of one of several forms."""

    def __init__(self, form):
        super().__init__()
        self.form, self.before, self.after = form, torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
        self.attention, self.mlp = Mixing(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        if self.form == "post-norm":
            x = self.before(x + self.attention(x))
            return self.after(x + self.mlp(x))
        x = x + self.attention(self.before(x))
        if self.form == "mixes later":
            x = x.cumsum(dim=1).flip(1)
        return x + self.mlp(self.after(x))


@pytest.mark.parametrize("form, cut", {"pre-norm": True, "post-norm": False, "mixes later": False}.items())
def test_only_layers_of_a_form_that_allows_it_are_cut(form, cut):
    assert (find_parts(Layer(form), torch.zeros(2, 5, 4)) is not None) == cut
