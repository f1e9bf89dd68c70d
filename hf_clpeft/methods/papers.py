"""The papers of methods, by their arXiv numbers, as they are cited."""

import re
from typing import NamedTuple


class Paper(NamedTuple):
    """What a citation needs.

    Args:
        number (`str`): arXiv number.
        title (`str`): Title.
        authors (`str`): As BibTeX has them: `Last, First and Last, First`.
        year (`int`): Year of its first version.

    Example:

    ```py
    >>> from hf_clpeft.methods.papers import PAPERS

    >>> print(PAPERS["2404.00228"].bibtex())
    @article{liang2024inflora,
      title={InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning},
      author={Liang, Yan-Shuo and Li, Wu-Jun},
      journal={arXiv preprint arXiv:2404.00228},
      year={2024}
    }

    ```
    """

    number: str
    title: str
    authors: str
    year: int

    def bibtex(self) -> str:
        """The entry in BibTeX."""
        last, first = self.authors.partition(",")[0], re.findall(r"\w+", self.title)[0]
        values = {
            "title": self.title,
            "author": self.authors,
            "journal": f"arXiv preprint arXiv:{self.number}",
            "year": self.year,
        }
        fields = ",\n".join(f"  {name}={{{value}}}" for name, value in values.items())
        return f"@article{{{re.sub(r'[^a-z]', '', last.lower())}{self.year}{first.lower()},\n{fields}\n}}"

    def line(self) -> str:
        """One line for help texts."""
        names = [name.partition(",")[0] for name in self.authors.split(" and ")]
        who = names[0] + (" et al." if len(names) > 2 else f" and {names[1]}" if len(names) == 2 else "")
        return f'{who}, "{self.title}", {self.year}, arXiv {self.number}.'


PAPERS = {
    paper.number: paper
    for paper in (
        Paper(
            "1909.01520",
            "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis",
            "Hayes, Tyler L. and Kanan, Christopher",
            2019,
        ),
        Paper(
            "2112.08654",
            "Learning to Prompt for Continual Learning",
            "Wang, Zifeng and Zhang, Zizhao and Lee, Chen-Yu and Zhang, Han and Sun, Ruoxi and Ren, Xiaoqi and "
            "Su, Guolong and Perot, Vincent and Dy, Jennifer and Pfister, Tomas",
            2021,
        ),
        Paper(
            "2204.04799",
            "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning",
            "Wang, Zifeng and Zhang, Zizhao and Ebrahimi, Sayna and Sun, Ruoxi and Zhang, Han and Lee, Chen-Yu and "
            "Ren, Xiaoqi and Su, Guolong and Perot, Vincent and Dy, Jennifer and Pfister, Tomas",
            2022,
        ),
        Paper(
            "2207.12819",
            "S-Prompts Learning with Pre-trained Transformers: An Occam's Razor for Domain Incremental Learning",
            "Wang, Yabin and Huang, Zhiwu and Hong, Xiaopeng",
            2022,
        ),
        Paper(
            "2211.13218",
            "CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual Learning",
            "Smith, James Seale and Karlinsky, Leonid and Gutta, Vyshnavi and Cascante-Bonilla, Paola and "
            "Kim, Donghyun and Arbelle, Assaf and Panda, Rameswar and Feris, Rogerio and Kira, Zsolt",
            2022,
        ),
        Paper(
            "2303.05118",
            "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
            "Zhang, Gengwei and Wang, Liyuan and Kang, Guoliang and Chen, Ling and Wei, Yunchao",
            2023,
        ),
        Paper(
            "2303.07338",
            "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are All "
            "You Need",
            "Zhou, Da-Wei and Cai, Zi-Wen and Ye, Han-Jia and Zhan, De-Chuan and Liu, Ziwei",
            2023,
        ),
        Paper(
            "2307.02251",
            "RanPAC: Random Projections and Pre-trained Models for Continual Learning",
            "McDonnell, Mark D. and Gong, Dong and Parveneh, Amin and Abbasnejad, Ehsan and van den Hengel, Anton",
            2023,
        ),
        Paper(
            "2312.08888",
            "Read Between the Layers: Leveraging Multi-Layer Representations for Rehearsal-Free Continual Learning "
            "with Pre-Trained Models",
            "Ahrens, Kyra and Lehmann, Hans Hergen and Lee, Jae Hee and Wermter, Stefan",
            2023,
        ),
        Paper(
            "2403.12030",
            "Expandable Subspace Ensemble for Pre-Trained Model-Based Class-Incremental Learning",
            "Zhou, Da-Wei and Sun, Hai-Long and Ye, Han-Jia and Zhan, De-Chuan",
            2024,
        ),
        Paper(
            "2403.19979",
            "Semantically-Shifted Incremental Adapter-Tuning is A Continual ViTransformer",
            "Tan, Yuwen and Zhou, Qinhao and Xiang, Xiang and Wang, Ke and Wu, Yuchuan and Li, Yongbin",
            2024,
        ),
        Paper(
            "2404.00228",
            "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning",
            "Liang, Yan-Shuo and Li, Wu-Jun",
            2024,
        ),
        Paper(
            "2406.03216",
            "Choice of PEFT Technique in Continual Learning: Prompt Tuning Is Not All You Need",
            "Wistuba, Martin and Sivaprasad, Prabhu Teja and Balles, Lukas and Zappella, Giovanni",
            2024,
        ),
        Paper(
            "2410.00645",
            "LoRanPAC: Low-rank Random Features and Pre-trained Models for Bridging Theory and Practice in Continual "
            "Learning",
            "Peng, Liangzu and Elenter, Juan and Agterberg, Joshua and Ribeiro, Alejandro and Vidal, Rene",
            2024,
        ),
        Paper(
            "2412.09441",
            "MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning",
            "Sun, Hai-Long and Zhou, Da-Wei and Zhao, Hanbin and Gan, Le and Zhan, De-Chuan and Ye, Han-Jia",
            2024,
        ),
        Paper(
            "2412.15571",
            "Continual Learning Using a Kernel-Based Method Over Foundation Models",
            "Momeni, Saleh and Mazumder, Sahisnu and Liu, Bing",
            2024,
        ),
        Paper(
            "2501.13198",
            "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning",
            "Wu, Yichen and Piao, Hongming and Huang, Long-Kai and Wang, Renzhen and Li, Wanhua and "
            "Pfister, Hanspeter and Meng, Deyu and Ma, Kede and Wei, Ying",
            2025,
        ),
        Paper(
            "2508.08165",
            "Integrating Task-Specific and Universal Adapters for Pre-Trained Model-based Class-Incremental Learning",
            "Wang, Yan and Zhou, Da-Wei and Ye, Han-Jia",
            2025,
        ),
    )
}
