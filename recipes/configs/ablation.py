"""The one method of ablation.yaml that no model needs: S-LoRA-Mix with query features of the frozen backbone."""

from hf_clpeft import METHODS


class FrozenMix(METHODS["s_lora_mix"], name="s_lora_mix_frozen"):
    query_with_first = False
