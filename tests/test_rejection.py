"""The recipe that measures rejection: halves of streams, scores of the field, one file in and a table out."""

import csv
import sys

import pytest
import torch
from conftest import pattern_dataset
from rejection import auroc, halves, main, make_table, measure_scores

from hf_clpeft import ConfigError, ContinualModel, ContinualTrainer, ContinualTrainingArguments, TaskStream, slda


CONFIG = """
benchmarks:
  digits: {max_train_samples_per_task: 40, max_test_samples_per_task: 10}
methods:
  deep: {method: slda, query_layers: [-2, -1], covariance_rank: 8}
"""


@pytest.mark.parametrize("domains", [None, ["plain", "negative"]])
def test_a_stream_is_halved_by_its_classes(domains):
    data = pattern_dataset(5, domains=domains)
    if domains is None:
        stream = TaskStream.class_incremental(data, num_tasks=3, class_order=[f"class {i}" for i in range(5)])
    else:
        stream = TaskStream.domain_incremental(data, domain_column="domain")
    half, others = halves(stream)
    assert [task.classes for task in half] == (
        [("class 0", "class 1"), ("class 2",)] if domains is None else 2 * [("class 0", "class 1", "class 2")]
    )
    count = sum(len(task.test.dataset) for task in stream)
    assert sum(len(task.test.dataset) for task in half) + sum(len(split.dataset) for split in others) == count
    for task, twin in zip(half, stream, strict=False):
        named = [task.classes[label] for _, label, _ in task.test]
        assert named == [twin.classes[label] for _, label, _ in twin.test if twin.classes[label] in task.classes]
    assert {"class 3", "class 4"} == {
        f"class {value}" for split in others for value in split.dataset.unique(split.label_column)
    }


def test_scores_of_the_field_are_those_of_their_papers(tmp_path):
    stream = TaskStream.class_incremental(pattern_dataset(), num_tasks=2)
    model = ContinualModel.from_backbone("hf-clpeft/vit-tiny-glyphs", slda())
    args = ContinualTrainingArguments(output_dir=tmp_path, disable_tqdm=True)
    ContinualTrainer(model, args).learn_stream(stream)
    found = measure_scores(model, stream[0].test)
    images = [model.backbone.transform.resize([image]) for image in open_all(stream[0].test)]
    with torch.no_grad():
        query = torch.cat(
            [model.method.query(model.backbone.transform.normalize(torch.from_numpy(x))) for x in images]
        )
    seen = -2 * model.router.scores(query).double()
    torch.testing.assert_close(found["mahalanobis"], -seen.amin(dim=1), rtol=1e-4, atol=1e-4)
    assert torch.equal(found["p_value"], model.method.typicality(query, model.router(query).distances).double())
    assert found["relative"].isfinite().all()
    assert auroc([torch.tensor([2.0, 3.0])], [torch.tensor([1.0, 2.5])]) == 0.75


def open_all(split):
    from hf_clpeft.streams.images import open_image

    return [open_image(encoded) for encoded, _, _ in split]


def test_one_file_in_a_table_out_and_nothing_is_measured_twice(tmp_path, monkeypatch, capsys):
    (tmp_path / "few.yaml").write_text(CONFIG)
    words = ["--config", str(tmp_path / "few.yaml"), "--backbone", "hf-clpeft/vit-tiny-glyphs"]
    monkeypatch.setattr(sys, "argv", ["rejection.py", *words, "--output_dir", str(tmp_path / "out")])
    main()
    (row,) = csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines())
    assert 0 <= float(row["rejected_at_0.05"]) <= float(row["rejected_at_0.2"]) <= 0.5
    assert float(row["auroc_p_value"]) > 0.7 and row["test_images"] == "50" and len(row["weight_hash"]) == 64
    monkeypatch.setattr("rejection.measure", None)
    main()
    assert "| digits | deep | 1 |" in capsys.readouterr().out
    assert make_table([row]) == (tmp_path / "out" / "results.md").read_text()
    (tmp_path / "few.yaml").write_text(
        CONFIG.replace("slda, query", "ranpac, query").replace(", covariance_rank: 8", "")
    )
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["rejection.py", *words, "--output_dir", str(tmp_path / "other")])
    with pytest.raises(ConfigError, match="deep: ranpac has no router that measures"):
        main()
