"""S-LoRA-Mix whose experts judge the same views of an image as its router, not the image alone.

Why: the router gained more from a second view than from anything that was trained. Experts may gain from it, too,
above all those that were trained with the same crops and mirror images.
"""

from hf_clpeft import METHODS
from hf_clpeft.backbones.views import augment, fixed_views


class TwoViewJudges(METHODS["s_lora_mix"], name="two_view_judges"):
    title = "S-LoRA-Mix, every view judged"

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.router.measures = False  # nothing is rejected here, and thresholds take longer than all else

    def read(self, pixels, selection):
        # The mean of the features: heads are linear, so that this is the mean of the logits.
        features = 0
        for view in fixed_views(self.options.test_views, self.options.view_kind):
            features = features + super().read(augment(pixels, view), selection)
        return features / self.options.test_views
