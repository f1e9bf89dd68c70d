"""Names of strangers in a terminal, in JSON, in errors and in pictures: seen as they are, obeyed by nobody."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_clpeft import ConfigError, StreamReport
from hf_clpeft.backbones.bundled import bundled_folder
from hf_clpeft.cli import app
from hf_clpeft.cli.common import show
from hf_clpeft.config import TaskConfig
from hf_clpeft.config.errors import errors_in_one_line
from hf_clpeft.config.text import one_line, printable, printable_json
from hf_clpeft.reports.plots import plot_comparison, plot_series
from hf_clpeft.reports.tables import print_table
from hf_clpeft.training.console import print_reports, print_task


OBEYED = [*map(chr, [*range(32), *range(127, 160)]), *"\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ufeff"]
OBEYED += ["\U000e0041", "\ud800", "\udfff"]
EVIL = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e\r\x08[link=http://evil]x[/link][/red]"


def raw(text):
    return [sign for sign in OBEYED if sign in text and sign != "\n"]


@pytest.mark.parametrize("sign", OBEYED, ids=ascii)
def test_what_a_terminal_obeys_is_spelt_out(sign):
    assert printable(f"a{sign}b") == "a" + sign.encode("unicode_escape").decode() + "b"
    value = {f"a{sign}": [sign]}
    text = printable_json(json.dumps(value, ensure_ascii=False, indent=1))
    assert json.loads(text) == value and not raw(text)


def test_what_people_write_stays():
    text = "Käse, 猫, Ελλάς, שלום, 👩‍🔬, $100_, [x], a\\b"
    assert printable(text) == one_line(text) == text


@pytest.fixture
def folder(tmp_path):
    """A model whose author means harm."""
    folder = shutil.copytree(bundled_folder("hf-clpeft/s-lora-digits"), tmp_path / "clone")
    config = json.loads((folder / "config.json").read_text())
    renamed = {"0": EVIL, "1": "[/]"}
    for names in (config["classes"], *(task["classes"] for task in config["tasks"])):
        names[:] = [renamed.get(name, name) for name in names]
    config["tasks"][1]["domain"] = config["license"] = config["method"]["name"] = EVIL
    config["backbone"]["name_or_path"], config["tasks"][2]["source"] = "hf-clpeft/vit-tiny-glyphs", EVIL
    (folder / "config.json").write_text(json.dumps(config))
    report = json.loads((folder / "metrics.json").read_text())
    report["method"] = report["stream"] = report["titles"][-1] = EVIL
    (folder / "metrics.json").write_text(json.dumps(report))
    return folder


def test_a_model_of_a_stranger_is_shown_as_it_is(folder, capfd):
    picture = str(next((bundled_folder("hf-clpeft/s-lora-digits") / "examples").glob("*.png")))
    shown = [CliRunner().invoke(app, ["info", str(folder), *options]) for options in ([], ["--json"])]
    refused = CliRunner().invoke(app, ["predict", str(folder), picture])  # nobody has the code of such a method
    assert [result.exit_code for result in (*shown, refused)] == [0, 0, 1]
    assert not any(raw(result.stdout + str(result.exception)) for result in (*shown, refused))
    assert "pwned" in shown[0].stdout
    config = json.loads((folder / "config.json").read_text())
    config["method"]["name"] = "s_lora"
    (folder / "config.json").write_text(json.dumps(config))
    answered = CliRunner().invoke(app, ["predict", str(folder), picture])
    assert answered.exit_code == 0 and not raw(answered.stdout)
    combined = CliRunner().invoke(app, ["combine", str(folder), "hf-clpeft/s-lora-digits", "-o", "out", "--json"])
    assert combined.exit_code == 0 and not raw(combined.stdout)
    with open("out/README.md", encoding="utf-8") as card:
        assert not raw(card.read())


def test_tables_lines_and_errors_are_fit_for_a_terminal(capfd):
    print_table(EVIL, [EVIL, "b"], [[EVIL, 1]], f"{EVIL}\n{EVIL}")
    show({"license": EVIL, "n": 1}, as_json=False)
    report = StreamReport(EVIL, EVIL, {})
    report.add_task("task-000", EVIL, expert_parameters=1, head_parameters=1, stored_bytes=1)
    report.accuracy_matrix = [[1.0]]
    print_task(report)
    print_reports([report], EVIL)
    shown = capfd.readouterr()
    assert "pwned" in shown.out and not raw(shown.out)
    with pytest.raises(SystemExit) as ended, errors_in_one_line():
        raise ConfigError(f"{EVIL}\n\tdoes not fit\n")
    assert not raw(str(ended.value)) and str(ended.value).endswith(" does not fit")
    with pytest.raises(SystemExit) as ended, errors_in_one_line():
        raise OSError(2, EVIL)
    assert not raw(str(ended.value))
    assert not raw(TaskConfig("t", [EVIL]).title + TaskConfig("t", ["a"], EVIL).title)


def test_a_warning_quotes_a_stranger_in_print(caplog):
    from hf_clpeft.hub import push

    push.logger.warning("The backbone is the folder %s.", EVIL)
    assert not raw(caplog.text.replace("\x1b[0m", ""))


@pytest.mark.parametrize("name", ["$100_", "$a_$", "\\$x_{$", "_hidden", EVIL], ids=ascii)
def test_a_name_is_drawn_as_it_is(name):
    report = StreamReport(name, name, {})
    report.add_task("task-000", name)
    report.accuracy_matrix = [[1.0]]
    report.save(".")
    plot_comparison([report], "plot.png")
    plot_series({name: {name: ([1, 2], np.array([[0.5, 0.5]]))}}, "plot.png", "x", "y")
