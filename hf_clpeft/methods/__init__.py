"""Continual learning methods, one file per family; `METHODS` registers them by name."""

from .aper import Aper
from .closed_form import AnyRouter, FirstExpert, LinearProbe, Ncm, RanPac, RanPacFirst, Slda
from .coda_prompt import CodaPrompt
from .dualprompt import DualPrompt
from .ease import Ease
from .heads import Heads
from .inflora import InfLora
from .klda import Klda
from .layup import LayUp, LayUpFirst
from .learning import Batch, FeaturesOf
from .loranpac import LoRanPac, LoRanPacFirst
from .method import METHODS, Method, make_method
from .mos import Mos
from .output import ContinualOutput
from .pool import L2l, L2p, Pool
from .s_lora_mix import SLoraMix, SXMix
from .s_x import SX, SLora, SLoraPlusPlus, SPrompts, SPromptsPlusPlus, SXPlusPlus
from .sd_lora import SdLora
from .single import SequentialLora, Single
from .slca import Slca
from .slda_pp import SldaPp
from .ssiat import Ssiat
from .tuna import Tuna


# Options for `ContinualModel.from_backbone`, for example `s_lora(r=4)`.
s_x, s_x_pp = SX.Config, SXPlusPlus.Config
s_lora, s_lora_pp = SLora.Config, SLoraPlusPlus.Config
s_prompts, s_prompts_pp = SPrompts.Config, SPromptsPlusPlus.Config
s_lora_mix = SLoraMix.Config
l2l, l2p = L2l.Config, L2p.Config
inflora = InfLora.Config
sd_lora = SdLora.Config
sequential_lora = SequentialLora.Config
ncm, slda, ranpac, ranpac_first = Ncm.Config, Slda.Config, RanPac.Config, RanPacFirst.Config
slda_pp = SldaPp.Config
klda = Klda.Config
layup, layup_first = LayUp.Config, LayUpFirst.Config
loranpac, loranpac_first = LoRanPac.Config, LoRanPacFirst.Config
linear_probe = LinearProbe.Config
aper, ease, tuna = Aper.Config, Ease.Config, Tuna.Config
dualprompt, coda_prompt = DualPrompt.Config, CodaPrompt.Config
mos = Mos.Config
slca, ssiat = Slca.Config, Ssiat.Config

__all__ = [
    "AnyRouter",
    "Aper",
    "Batch",
    "CodaPrompt",
    "ContinualOutput",
    "DualPrompt",
    "Ease",
    "FeaturesOf",
    "FirstExpert",
    "Heads",
    "InfLora",
    "Klda",
    "L2l",
    "L2p",
    "LayUp",
    "LayUpFirst",
    "LinearProbe",
    "LoRanPac",
    "LoRanPacFirst",
    "METHODS",
    "Method",
    "Mos",
    "Ncm",
    "Pool",
    "RanPac",
    "RanPacFirst",
    "SLora",
    "SLoraMix",
    "SLoraPlusPlus",
    "SPrompts",
    "SPromptsPlusPlus",
    "SX",
    "SXMix",
    "SdLora",
    "SXPlusPlus",
    "SequentialLora",
    "Single",
    "Slca",
    "Slda",
    "SldaPp",
    "Ssiat",
    "Tuna",
    "make_method",
    "aper",
    "coda_prompt",
    "dualprompt",
    "ease",
    "inflora",
    "klda",
    "l2l",
    "l2p",
    "layup",
    "layup_first",
    "linear_probe",
    "loranpac",
    "loranpac_first",
    "mos",
    "ncm",
    "ranpac",
    "ranpac_first",
    "s_lora",
    "s_lora_mix",
    "s_lora_pp",
    "s_prompts",
    "s_prompts_pp",
    "s_x",
    "s_x_pp",
    "sd_lora",
    "sequential_lora",
    "slca",
    "slda",
    "slda_pp",
    "ssiat",
    "tuna",
]
