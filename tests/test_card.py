"""The model card, as a stranger sees it."""

import re

import pytest
import yaml
from hub_server import check_card

from hf_clpeft import ContinualModel, l2p, load_benchmark, s_lora
from hf_clpeft.config import BackboneConfig, ContinualConfig, TaskConfig, read_options
from hf_clpeft.reports.card import make_card


PATTERN = re.compile(
    r"""---
base_model: hf-clpeft/vit-tiny-glyphs
library_name: hf-clpeft
license: apache-2\.0
pipeline_tag: image-classification
tags:
- continual-learning
- peft
- lora
- s_lora
model-index:
- name: digits
  results:
  - task:
      type: image-classification
      name: Continual image classification
    dataset:
      name: digits
      type: digits
    metrics:
    - type: accuracy
      value: 0\.\d+
      name: average accuracy
(    - type: \w+
      value: -?\d\.\d+
      name: [\w ]+
)+---

# digits

A frozen vision transformer that has learnt 3 tasks one after another, with one PEFT expert per task[^#]+

## How to use it

```py
from hf_clpeft import ContinualModel

model = ContinualModel\.from_pretrained\("alice/digits"\)
model\.predict\(\["picture\.png"\]\)  # .+
```

Every task is one commit and one tag: `from_pretrained\("alice/digits", revision="task-002"\)`[^#]+

Each expert is a plain PEFT adapter of the backbone:

```py
.+subfolder="experts/task-000"\)
```

## What it is

\| \| \|
\|---\|---\|
\| method \| s_lora \(\[arXiv 2406\.03216\]\(https://arxiv\.org/abs/2406\.03216\)\) \|
\| backbone \| \[hf-clpeft/vit-tiny-glyphs\]\(.+\), 32 px, weights `[0-9a-f]{12}…` \|
\| PEFT \| peft_type = LORA, r = 1, lora_alpha = 1 \|
\| router \| nearest prototype \|
\| head \| shared \|
\| stream \| digits, class-incremental \|

\*\*S-LoRA\*\*\. \*\*Trains\*\* [^#]+ \*\*Stores\*\* [^#]+\*\*Costs\*\* two forward passes per image: [^#]+

## What it can do

\| task \| classes or domain \| training images \| accuracy when learnt \| accuracy now \|
\|---\|---\|---\|---\|---\|
(\| task-00\d \| \d, \d \| 96 \| \d+\.\d % \| \d+\.\d % \|
){3}
Accuracy on test images, each routed by its own features alone:

\| measure \| \|
\|---\|---\|
(\| [\w ]+ \| -?\d+\.\d % \|
)+
!\[.+\]\(accuracy_and_routing\.png\)

[^#]+

## Limits

(- .+\n(  .+\n)*)+
## Licence and citation

The experts are under the licence `apache-2\.0`; .+

```bibtex
@article\{wistuba2024choice,[^`]+```
""",
    re.DOTALL | re.MULTILINE,
)


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_the_card_of_a_pushed_model_matches_the_pattern(learnt):
    text = str(make_card(learnt.model.config, learnt.report, "alice/digits"))
    found = PATTERN.fullmatch(text)
    assert found, text
    assert check_card(text) == ([], [])


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_the_first_snippet_runs(learnt, saved):
    from conftest import pattern_dataset

    pattern_dataset()["test"][0]["image"].save("picture.png")
    text = (saved / "README.md").read_text().replace("path/to/this/folder", str(saved))
    namespace = {}
    exec(re.search(r"```py\n(.*?)```", text, re.DOTALL)[1], namespace)
    assert isinstance(namespace["model"], ContinualModel)


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_the_snippet_for_plain_peft_runs(hub, learnt):
    learnt.model.push_to_hub("alice/digits", token="hf_alice")
    text = hub.repo("alice/digits").files()["README.md"].decode()
    exec(re.findall(r"```py\n(.*?)```", text, re.DOTALL)[1], {})


def test_class_names_of_strangers_stay_text():
    backbone = BackboneConfig("google/vit-base-patch16-224-in21k", 224, "0f3c", revision="c" * 40)
    evil = [
        "<img src=x onerror=alert(1)>",
        "a | b\n# big",
        "[click](javascript:alert(1))",
        "{{ config }}",
        "---\nx: y",
    ]
    tasks = [TaskConfig(f"task-{i}", [name]) for i, name in enumerate(evil)]
    text = str(make_card(ContinualConfig(s_lora(), backbone, tasks, evil), repo_id="alice/model"))
    rows = [line for line in text.splitlines() if line.startswith("| task-")]
    assert len(rows) == len(evil) and "<img" not in text and "[click]" not in text and "\n# big" not in text
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)
    assert set(yaml.safe_load(text.split("---")[1])) >= {"base_model", "library_name"}


@pytest.mark.parametrize("learnt", ["l2p"], indirect=True)
def test_a_pool_has_a_card_too(learnt):
    text = str(make_card(learnt.model.config, learnt.report, "alice/pool"))
    assert "a pool of 10 PEFT experts, of which every image selects 5" in text and "PeftModel" not in text
    assert check_card(text) == ([], [])


@pytest.mark.parametrize("learnt", ["slda_pp"], indirect=True)
def test_a_card_says_what_scores_mean_where_they_are_calibrated(learnt):
    text = str(make_card(learnt.model.config, learnt.report, "alice/digits"))
    error = re.search(r"\| calibration error \| (\S+ %) \|", text)[1]
    assert f"differ by {error} (the calibration error)" in text and "not calibrated" not in text
    assert "reject_rate=0.05" in text and "arXiv 1909.01520" in text and "eight views of each image" in text
    assert "| views | 8 of a training image, 2 of one to predict: crops" in text
    assert check_card(text) == ([], [])


def test_a_data_set_on_the_hub_is_named():
    from hf_clpeft import StreamReport

    report = StreamReport("l2p", "split_cifar100", {}, dataset="uoft-cs/cifar100")
    config = ContinualConfig(l2p(), BackboneConfig("google/vit-base-patch16-224-in21k", 224, "0f3c"))
    text = str(make_card(config, report, "alice/pool"))
    assert "datasets:\n- uoft-cs/cifar100" in text and "It has learnt nothing yet." in text
    assert load_benchmark("digits").dataset is None


def test_a_method_that_is_not_at_hand_is_said_to_be_its_authors_own():
    config = ContinualConfig(read_options({"name": "<mine>", "depth": 3}), BackboneConfig("me/vit", 224, "0f3c"))
    text = str(make_card(config, repo_id="alice/mine"))
    assert "with a method of its author's own." in text and "| method | &lt;mine> |" in text
    assert "| router |" not in text and "| head |" not in text
