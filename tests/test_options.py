"""Options that cannot be meant: one line that names them, and exit status 2, before anything is loaded."""

import runpy
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from memory import MemoryArguments
from pretrain_glyphs import GlyphArguments
from serving import ServingArguments
from sweep import points_of
from throughput import ThroughputArguments
from tune_learning_rates import TuningArguments

from hf_clpeft import METHODS, ConfigError, ContinualTrainingArguments, cli, run_recipe, s_lora
from hf_clpeft.comparing import CompareArguments, plan, read_config
from hf_clpeft.config.errors import OptionError, refusing_options
from hf_clpeft.training.options import BackboneArguments, RunArguments, StreamArguments, parse
from hf_clpeft.training.parsing import OptionParser, read_yaml


GROUPS = (StreamArguments, BackboneArguments, ContinualTrainingArguments, RunArguments)
PROGRAMS = (
    CompareArguments,
    GlyphArguments,
    MemoryArguments,
    ServingArguments,
    ThroughputArguments,
    TuningArguments,
)
REQUIRED = {CompareArguments: ["--config", "x.yaml"], GlyphArguments: ["--output_dir", "x"]}


def refused(argv, capsys, *methods):
    with pytest.raises(SystemExit) as end:
        run_recipe(*(methods or ["s_lora"]), argv=argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1, (end.value, lines)
    return lines[0]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--learnig_rate", "0.1"], "There is no option --learnig_rate; did you mean --learning_rate?"),
        (["--learnig-rate=0.1"], "did you mean --learning_rate?"),
        (["--learning", "0.1"], "There is no option --learning; did you mean --learning_rate?"),
        (["--bench", "digits"], "There is no option --bench; did you mean --benchmark?"),
        (["--zzz"], "There is no option --zzz."),
        (["digits"], "'digits' does not belong to an option"),
        (["--r", "-3"], "r=-3 must be a whole number from 1"),
        (["--r", "two"], "--r: 'two' is not a whole number"),
        (["--r"], "--r: expected one argument"),
        (["--k", "none"], "k='none' must be a whole number of prototypes"),
        (["--k", "²"], "k='²' must be a whole number of prototypes"),
        (["--query_layers", "2", "1"], "query_layers=[2, 1] must be layers"),
        (
            ["--head", "sharde"],
            "--head: 'sharde' is not one of auto, shared, per_task; did you mean shared? See --help.",
        ),
        (["--lora", "dropout"], "--lora: 'dropout' is not a mapping in JSON, such as"),
        (["--lora", "[1]"], "--lora: '[1]' is not a mapping in JSON"),
        (["--lora", '{"lora_dropuot": 0.1}'], "lora_dropuot"),
        (["--optim", "adam"], "--optim: 'adam' is not one of adamw, sgd; did you mean adamw?"),
        (["--lr_scheduler_type", "cosin"], "did you mean cosine?"),
        (["--learning_rate", "nan"], "learning_rate=nan must be 0 or more"),
        (["--learning_rate", "inf"], "learning_rate=inf must be between 0 and 2,147,483,647"),
        (["--cache_size_gb", "nan"], "cache_size_gb=nan must be more than 0"),
        (["--logging_steps", "0"], "logging_steps=0 must be 1 or more"),
        (["--seed", "-1"], "seed=-1 must be 0 or more"),
        (["--image_size", "0"], "image_size=0 must be between"),
        (["--streaming", "perhaps"], "--streaming: 'perhaps' is not true or false"),
        (["--output_dir", ""], "output_dir is empty"),
        (["--benchmark", "digit"], "there is no 'digit'; did you mean digits?"),
        (
            ["--benchmark", "digits_domains", "--num_tasks", "2"],
            "num_tasks=2 does not apply when tasks are split by",
        ),
        (["--dataset", "x", "--domain_column", "d"], "domain_column='d' does not apply when tasks are split by class"),
    ],
    ids=str,
)
def test_a_command_line_that_cannot_be_meant_is_told_in_one_line(argv, message, capsys):
    assert message in refused(argv, capsys)


def test_methods_options_are_looked_at_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(StreamArguments, "load", lambda self: pytest.fail("loaded"))
    monkeypatch.setattr("hf_clpeft.training.recipe.require_hub", lambda *args: pytest.fail("asked"))
    pools = [("--top_n", "11"), ("--pool_size", "0"), ("--pull", "inf"), ("--pull", "nan"), ("--prompt_length", "0")]
    for option, value in pools:
        name = option[2:]
        assert f"{name}=" in refused([option, value], capsys, "l2p")
    argv = ["--method", "ranpac", "--projection_size", "0"]
    assert "projection_size=0" in refused(argv, capsys, "slda", "ranpac")


def test_every_option_of_every_program_names_itself_when_its_value_is_of_another_type():
    for group in (*GROUPS, *PROGRAMS, *(method.Config for method in METHODS.values())):
        parser = OptionParser((group,))
        for name, hint in get_type_hints(group).items():
            kinds = {hint, *get_args(hint), *(kind for each in get_args(hint) for kind in get_args(each))}
            if kinds & {str, list[str]}:
                continue
            with pytest.raises(OptionError, match=rf"^--{name}: 'wrong' is not .*See --help\.$"):
                parser.read([*REQUIRED.get(group, []), f"--{name}", "wrong"])
        with pytest.raises(OptionError, match="There is no option --xyzzy"):
            parser.read([*REQUIRED.get(group, []), "--xyzzy", "1"])


def test_every_number_of_a_program_has_bounds():
    for group in (*GROUPS, *PROGRAMS):
        needed = {"config": "x", "output_dir": "x"}
        for name, hint in get_type_hints(group).items():
            kinds = {hint, *get_args(hint)} - {type(None)}
            if kinds & {int, float, list[int], list[float]} and (group, name) != (CompareArguments, "seeds"):
                given = {f.name: needed[f.name] for f in fields(group) if f.name in needed}
                for value in (-1, float("nan")) if kinds & {float, list[float]} else (-1,):
                    given[name] = [value] if kinds & {list[int], list[float]} else value
                    with pytest.raises(ConfigError, match=rf"{name}\b.*{value}"):
                        group(**given)


@pytest.mark.parametrize("value", ["adam", 3, None, ["adamw"]])
def test_choices_hold_for_whoever_gives_no_command_line_too(value):
    with pytest.raises(ConfigError, match="optim=.* must be one of adamw, sgd"):
        ContinualTrainingArguments(optim=value)
    with pytest.raises(ConfigError, match="learning_rate='1e-3' must be float"):
        ContinualTrainingArguments(learning_rate="1e-3")


@pytest.mark.parametrize("name", get_args(get_type_hints(ContinualTrainingArguments)["lr_scheduler_type"]))
def test_every_scheduler_on_offer_works(name):
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, 1, 4)
    for _ in range(4):
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("seed: [1", "is not valid YAML in line"),
        ("- seed", "does not hold a mapping of options"),
        ("just words", "does not hold a mapping of options"),
        ("seed: !!python/object/apply:os.getcwd []", "is not valid YAML in line 1"),
        ("lerning_rate: 1", "no option 'lerning_rate'; did you mean learning_rate?"),
        ("7: 1", "there is no option 7"),
        ("learning_rate: [1, 2]", r"learning_rate is \[1, 2\]; it takes a single value"),
        ("learning_rate: {a: 1}", "it takes a single value"),
        ("learning_rate: fast", "--learning_rate: 'fast' is not a number"),
        ("learning_rate:", "learning_rate is nothing; it takes a single value"),
        ("num_train_epochs: 2.5", "--num_train_epochs: '2.5' is not a whole number"),
        ("num_train_epochs: true", "--num_train_epochs: 'True' is not a whole number"),
        ("optim: adam", "did you mean adamw?"),
        ("seed: -1", "seed=-1 must be 0 or more"),
        ("benchmark: mnist", "there is no 'mnist'"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        ("a: " + "[" * 1500, "is not valid YAML"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_of_options_that_cannot_be_meant_is_told_in_one_line(text, message, capsys):
    Path("options.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(OptionError, match=message):
        parse(GROUPS, ["--config", "options.yaml"])
    assert "error: " in refused(["--config", "options.yaml"], capsys)


@pytest.mark.parametrize("path", ["nowhere.yaml", "."])
def test_a_file_of_options_that_is_not_there_is_named(path, capsys):
    assert refused(["--config", path], capsys).startswith(f"error: {path} cannot be read: ")


def test_values_of_a_file_are_read_as_those_of_a_command_line():
    Path("options.yaml").write_text(
        "learning_rate: 1e-3\nstreaming: true\nseed: '7'\nimage_size:\ncache_query_features: no"
    )
    stream, backbone, training, _ = parse(GROUPS, ["--config", "options.yaml", "--benchmark", "digits"])
    assert (training.learning_rate, stream.streaming, training.seed) == (0.001, True, 7)
    assert backbone.image_size is None and training.cache_query_features is False
    Path("layers.yaml").write_text("query_layers: [-2, -1]\nk: 3\nlora: {lora_dropout: 0.1}")
    parser = OptionParser((s_lora,))
    (method,) = parser.read(parser.words_of("layers.yaml"))
    assert method == s_lora(query_layers=[-2, -1], k=3, lora={"lora_dropout": 0.1})
    assert parser.read(["--k", "auto", "--lora", '{"lora_dropout": 0.1}']) == (s_lora(k="auto", lora=method.lora),)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lora: 5", "--lora: '5' is not a mapping in JSON"),
        ("lora: [r, 2]", r"lora is \['r', 2\]; it takes a mapping"),
        ("lora:", "lora is nothing; it takes a mapping"),
        ("k: {a: 1}", "k is {'a': 1}; it takes a single value"),
    ],
)
def test_a_mapping_in_a_file_is_a_mapping(text, message):
    Path("options.yaml").write_text(text)
    with pytest.raises(OptionError, match=message):
        OptionParser((s_lora,)).words_of("options.yaml")


def test_of_several_methods_one_is_chosen_and_its_own_options_are_offered(capsys, monkeypatch):
    planned = []
    monkeypatch.setattr(
        "hf_clpeft.training.recipe.print_plan", lambda model, *rest: planned.append(model.config.method)
    )
    argv, controls = ["--benchmark", "digits", "--dry_run"], ("slda", "ranpac", "sequential_lora")
    Path("ranpac.yaml").write_text("method: ranpac\nprojection_size: 50")
    run_recipe(*controls, argv=argv)
    run_recipe(*controls, argv=[*argv, "--method=sequential_lora", "--r", "2", "--joined"])
    run_recipe(*controls, argv=[*argv, "--config", "ranpac.yaml"])
    run_recipe(*controls, argv=[*argv, "--config", "ranpac.yaml", "--projection_size", "60"])
    wanted = [{"name": "slda"}, {"name": "sequential_lora", "r": 2}, {"projection_size": 50}, {"projection_size": 60}]
    assert all(values.items() <= method.to_dict().items() for method, values in zip(planned, wanted, strict=True))
    capsys.readouterr()
    assert "--method: 'rampac' is not one of slda, ranpac" in refused(["--method", "rampac"], capsys, *controls)
    assert "There is no option --projection_size" in refused(["--projection_size", "5"], capsys, *controls)
    with pytest.raises(SystemExit) as end:
        run_recipe(*controls, argv=["--method", "ranpac", "--help"])
    assert not end.value.code and "--projection_size" in capsys.readouterr().out
    assert "There is no method 's_lorra'; did you mean s_lora" in refused([], capsys, "s_lorra")


def test_two_options_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="SLora.Config and SX.Config both have an option 'k'|both have an option"):
        OptionParser((s_lora, METHODS["s_x"].Config))


@pytest.mark.parametrize(
    "given, message", [({"k": 3}, "was made with k=2, not 3"), ({"head": "shared"}, "head='per_task', not 'shared'")]
)
def test_a_run_goes_on_with_the_options_that_it_began_with(given, message, tmp_path):
    from conftest import make_trainer, pattern_dataset

    from hf_clpeft import TaskStream
    from hf_clpeft.training.recipe import open_model

    stream = TaskStream.domain_incremental(pattern_dataset(domains=["plain", "negative"]))
    trainer = make_trainer(s_lora(k=2), tmp_path, num_train_epochs=1)
    trainer.learn(stream[0])
    backbone = BackboneArguments(backbone="hf-clpeft/vit-tiny-glyphs")
    trainer.args.resume_from_checkpoint = "auto"
    assert open_model(backbone, trainer.args, s_lora(k=2)).config.method.head == "per_task"
    with pytest.raises(ConfigError, match=message):
        open_model(backbone, trainer.args, s_lora(**{"k": 2, **given}))
    with pytest.raises(ConfigError, match="was made with name='s_lora', not 's_prompts'"):
        open_model(backbone, trainer.args, METHODS["s_prompts"].Config(k=2))


@pytest.mark.parametrize(
    "text, message",
    [
        ("benchmarks: {digits: {}}\nmethods: {s_lora: {r: 0}}", "r=0 must be a whole number"),
        ("benchmarks: {digits: {}}\nmethods: {s_lora: {learning_rate: 1e-3}}", "learning_rate='1e-3' must be float"),
        ("benchmarks: {digits: {num_tasks: 0}}\nmethods: {ncm: {}}", "num_tasks=0 must be 1 or more"),
        ("benchmarks: {digits: {}}\nmethods: {ncm: {lerning_rate: 1}}", "'lerning_rate'; did you mean learning_rate"),
        ("benchmarks: {digit: {}}\nmethods: {ncm: {}}", "no benchmark 'digit'; did you mean digits"),
        ("benchmarks: [digits]\nmethods: {ncm: {}}", "benchmarks=.* must be a mapping"),
        ("benchmarks: {digits: 3}\nmethods: {ncm: {}}", "digits=3 must be a mapping"),
        ("benchmarks: {digits: {}}\nmethods: {ncm: {}}\nseeds: 3", "seeds=3 must be a list"),
        ("base: file.yaml", "its base leads back"),
        ("base: other.yaml", "other.yaml cannot be read"),
    ],
)
def test_a_comparison_that_cannot_be_meant_is_refused_before_anything_is_learnt(text, message):
    Path("file.yaml").write_text(text)
    with pytest.raises(OptionError, match=message):
        plan(CompareArguments("file.yaml"), read_config("file.yaml"))


def test_names_that_a_comparison_does_not_have_are_refused():
    Path("file.yaml").write_text("benchmarks: {digits: {}}\nmethods: {ncm: {}, slda: {}}")
    with pytest.raises(OptionError, match="--methods: file.yaml has no 'sdla'; did you mean slda"):
        plan(CompareArguments("file.yaml", methods=["sdla"]), read_config("file.yaml"))
    with pytest.raises(OptionError, match="vary=.* must be lists of as many values"):
        points_of({"series": {"s_lora": {"vary": {"k": [1, 2], "r": [1]}}}})


@pytest.mark.parametrize(
    "argv, message",
    [
        (["info", "x", "--tokn", "y"], "No such option: --tokn"),
        (["inof", "x"], "No such command 'inof'"),
        (["predict", "x", "nowhere.png"], "nowhere.png"),
        (["predict", "x"], "Missing argument"),
        (["demo", "--port", "70000"], "port"),
        (["demo", "--port", "seven"], "port"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_cannot_be_meant_is_told_in_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-clpeft", *argv])
    with pytest.raises(SystemExit) as end:
        cli.main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and message in lines[0], lines


@pytest.mark.parametrize("script", ["publish_digits", "tutorials/own_pictures", "tutorials/add_classes"])
def test_a_script_tells_it_in_one_line_too(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "pictures", "me/birds", "october", "--xyzzy", "1"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(__file__).parents[1] / "recipes" / f"{script}.py"), run_name="__main__")
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and "No such option: --xyzzy" in lines[0], lines


def test_what_a_command_line_said_is_no_other_error():
    with pytest.raises(OptionError, match="k=0"), refusing_options():
        s_lora(k=0)
    with pytest.raises(OptionError, match="x.yaml cannot be read"):
        read_yaml("x.yaml")


def test_zero_is_a_seed_like_any_other():
    orders = [
        [task.classes for task in StreamArguments(benchmark="digits", class_order_seed=seed).load()]
        for seed in (None, 0)
    ]
    assert orders[0] != orders[1]
