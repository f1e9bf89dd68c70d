"""The model card, as a stranger sees it."""

import json
import re

import pytest
import typer.testing
import yaml
from conftest import SEVEN
from hub_server import check_card

from hf_clpeft import METHODS, ContinualModel, StreamReport, l2p, load_benchmark, s_lora, s_prompts
from hf_clpeft.backbones.license import license_of
from hf_clpeft.cli import app
from hf_clpeft.config import BackboneConfig, ContinualConfig, TaskConfig, read_options
from hf_clpeft.methods.papers import PAPERS
from hf_clpeft.reports.card import make_card


VIT = BackboneConfig("google/vit-base-patch16-224-in21k", 224, "0f3c", revision="c" * 40)


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
widget:
(- src: https://huggingface\.co/alice/digits/resolve/main/examples/task-00\d-\d\.jpg
  example_title: task-00\d-\d
)+model-index:
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

## How it was made

\| \| \|
\|---\|---\|
\| training \| num_train_epochs = 2, train_batch_size = 32, .*learning_rate = 0\.005, .+ seed = 0 \|
\| hardware \| cpu, 1 process \|
\| time \| [\d.,]+ s in all: (images .+ )?.*train .+ \|
\| versions \| hf-clpeft \S+, torch .+ \|

## Limits

(- .+\n(  .+\n)*)+
## Licence and citation

The experts are under the licence `apache-2\.0`, the backbone is under `apache-2\.0`, as its card says; .+

```bibtex
@article\{wistuba2024choice,
  title=\{Choice of PEFT Technique [^`]+```
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


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.paper is not None])
def test_every_paper_of_a_method_is_cited_on_its_card_and_in_its_help(name):
    kind = METHODS[name]
    if kind.__module__.startswith("hf_clpeft."):
        paper = PAPERS[kind.paper]
        assert f"title={{{paper.title}}}" in kind.citation() and f"arXiv:{kind.paper}}}" in kind.citation()
        assert f"arXiv {kind.paper}." in kind.Config.__doc__ and paper.authors.split(",")[0] in kind.Config.__doc__


def test_a_card_cites_the_paper_of_its_own_method():
    text = str(make_card(ContinualConfig(s_prompts(), VIT)))
    assert "@article{wang2022s,\n  title={S-Prompts Learning with" in text and "Choice of PEFT Technique" not in text
    text = str(make_card(ContinualConfig(METHODS["linear_probe"].Config(), VIT)))
    assert "bibtex" not in text and "The method has no paper to cite." in text


@pytest.mark.parametrize("learnt", ["slda_pp"], indirect=True)
def test_calibration_and_training_are_told(learnt):
    text = str(make_card(learnt.model.config, learnt.report, "alice/digits"))
    temperature = learnt.model.method.confidence.temperature()
    assert f"| calibration | temperature {temperature:.3g}, calibration error on test images " in text
    again = StreamReport.from_dict(json.loads(json.dumps(learnt.report.to_dict())), learnt.model.config.tasks)
    assert again.temperature == temperature


def test_what_a_strangers_report_says_of_its_making_stays_text_and_short():
    evil = "<img src=x>|[a](b)\n# c" + "x" * 500
    told = {
        "arguments": {"learning_rate": evil, "optim": ["a"], "num_train_epochs": {"a": 1}, evil: 1},
        **{"versions": {evil: evil}, "device": evil, "seed": [1], "num_processes": evil, "quantization": evil},
        "mixed_precision": {"x": 1},
    }
    report = StreamReport("s_lora", "pets", told, seconds=[{evil: 1.0, "train": float("nan")}])
    for environment in (told, {"arguments": evil, "versions": [1], "device": None}):
        report.environment = environment
        text = str(make_card(ContinualConfig(s_lora(), VIT), report))
        assert "<img" not in text and "[a](b)" not in text and "\n# c" not in text and "x" * 100 not in text
        rows = [row for row in text.partition("How it was made")[2].splitlines() if row.startswith("| ")]
        assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


def test_the_licence_of_the_backbone_is_that_of_its_card_and_never_invented(hub, tmp_path):
    folder, front = tmp_path / "backbone", "---\nlicense: {}\n---\n# A card"
    folder.mkdir()
    for value, wanted in {
        "cc-by-nc-4.0": "cc-by-nc-4.0",
        "other\nlicense_name: meta-ai": "meta-ai",
        "[mit, apache-2.0]": "mit, apache-2.0",
        "'<b>|`'": None,
        "{a: 1}": None,
        "[[": None,
    }.items():
        (folder / "README.md").write_text(front.format(value))
        assert license_of(str(folder)) == wanted
    (folder / "README.md").write_text("no front matter")
    assert license_of(str(folder)) is None and license_of(str(tmp_path)) is None
    hub.commit("bob/vit", {"README.md": front.format("cc-by-nc-4.0").encode()})
    assert license_of("bob/vit") is None and license_of("bob/none", ask=True) is None
    assert license_of("bob/vit", ask=True) == "cc-by-nc-4.0" == license_of("bob/vit")  # now it is in the cache
    config = ContinualConfig(s_lora(), BackboneConfig("bob/vit", 224, "0f3c"))
    assert "the backbone is under `cc-by-nc-4.0`, as its card says" in str(make_card(config))
    assert "that of its own card,\nwhich was not at hand" in str(make_card(ContinualConfig(s_lora(), VIT)))


def call(*words):
    result = typer.testing.CliRunner().invoke(app, ["card", *map(str, words)])
    return result.exit_code, result.stdout, result.exception


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_the_card_of_a_folder_is_printed_written_and_mended(learnt, saved, tmp_path):
    wanted = (saved / "README.md").read_text()
    assert call(saved)[:2] == (0, wanted)
    assert call(saved, "-o", tmp_path / "card.md")[0] == 0 and (tmp_path / "card.md").read_text() == wanted
    (saved / "README.md").write_text("broken")
    assert call(saved, "--refresh")[0] == 0 and (saved / "README.md").read_text() == wanted
    assert "stays as it is" in str(call("hf-clpeft/s-lora-digits", "--refresh")[2])


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_examples_are_pushed_and_shown_and_the_card_of_a_repo_is_refreshed(hub, learnt, saved):
    model = ContinualModel.from_pretrained(saved)
    model.pictures = {"examples/task-000-0.jpg": SEVEN.read_bytes(), "thumbnails/task-000.jpg": SEVEN.read_bytes()}
    model.push_to_hub("alice/digits", token="hf_alice")
    files = hub.repo("alice/digits").files()
    assert files["examples/task-000-0.jpg"] == SEVEN.read_bytes()
    text = files["README.md"].decode()
    (shown,) = yaml.safe_load(text.split("---")[1])["widget"]
    address = "https://huggingface.co/alice/digits/resolve/main/examples/task-000-0.jpg"
    assert shown == {"src": address, "example_title": "task-000-0"} and check_card(text) == ([], [])
    assert ContinualModel.from_pretrained("alice/digits").config.tasks
    hub.commit("alice/digits", {"README.md": b"broken"})
    assert call("alice/digits", "--token", "hf_alice")[:2] == (0, text)
    assert hub.repo("alice/digits").files()["README.md"] == b"broken"
    assert call("alice/digits", "--refresh", "--token", "hf_alice")[0] == 0
    assert hub.repo("alice/digits").files()["README.md"].decode() == text
