"""What the README and the docs show runs as it stands there; what they name and link to exists."""

import ast
import re
import shlex
import shutil
import subprocess
from dataclasses import fields
from functools import cache, partial
from pathlib import Path

import click
import pytest
import typer
from conftest import BACKBONE, pattern_rows
from hub_server import User
from typer.testing import CliRunner

from hf_clpeft import (
    BENCHMARKS,
    METHODS,
    ROUTERS,
    ContinualModel,
    ContinualTrainer,
    ContinualTrainingArguments,
    cli,
    load_benchmark,
    load_task,
    slda_pp,
)
from hf_clpeft.config.method import OPTIONS
from hf_clpeft.streams.digits import load_digits_dataset
from hf_clpeft.training.options import BackboneArguments, RunArguments, StreamArguments


REPO = Path(__file__).parents[1]
DOCS = sorted((REPO / "docs").rglob("*.md"))
PAGES = {
    path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8")
    for path in [*REPO.glob("*.md"), *DOCS, *(REPO / "recipes").rglob("*.md")]
}
README = PAGES["README.md"]
SNIPPETS = [
    pytest.param(snippet, id=f"{page}-{number}")
    for page, text in PAGES.items()
    if page != "README.md"
    for number, snippet in enumerate(re.findall(r"```py\n(.*?)```", text, re.DOTALL))
]
COMMANDS = [
    (page, line)
    for page, text in PAGES.items()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
OF_OURS = {
    page: [
        line
        for where, line in COMMANDS
        if where == page and "hf-clpeft " in line
        # Servers, and what takes long, have tests of their own.
        if not re.search(r"pip install|hf-clpeft (demo|test|compare)|--onnx", line)
    ]
    for page in PAGES
}
SYSTEM = "cd cp curl docker export find git hf pip sbatch source".split()  # programs that are not ours


@pytest.fixture(scope="session")
def birds(tmp_path_factory):
    """Pictures of three birds in folders, and models: of two, of these and one more in October, and of that alone."""
    folder, rows = tmp_path_factory.mktemp("birds"), pattern_rows(num_classes=3, per_class=12)
    for number, (image, label) in enumerate(zip(rows["image"], rows["label"], strict=True)):
        path = folder / ("my/pictures/robin", "my/pictures/wren", "new/pictures/finch")[label] / f"{number % 12}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    for name in ("first", "both"):
        model = ContinualModel.from_backbone(BACKBONE, slda_pp(adapt=False))
        trainer = ContinualTrainer(model, ContinualTrainingArguments(folder / name, disable_tqdm=True))
        trainer.learn(load_task(folder / "my/pictures", name="first"))
    trainer.learn(load_task(folder / "new/pictures", name="october"))
    model = ContinualModel.from_backbone(BACKBONE, slda_pp(adapt=False))
    args = ContinualTrainingArguments(folder / "theirs", disable_tqdm=True)
    ContinualTrainer(model, args).learn(load_task(folder / "new/pictures", name="first"))
    return folder


@pytest.fixture
def me(hub, learnt, birds, monkeypatch, tmp_path):
    """The reader: logged in, with pictures, and owner of what the pages have pushed before."""
    for name in ("me", "you"):
        monkeypatch.setitem(hub.users, f"hf_{name}", User(name, [name]))
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    for name in ("my", "new"):
        (tmp_path / name).symlink_to(birds / name)
    load_digits_dataset()["test"][0]["image"].save("digit.png")
    (tmp_path / "photo.jpg").symlink_to(birds / "my/pictures/robin/0.jpg")

    def owner_of_what_it_loads(snippet):
        needed = re.findall(
            r"\b((?:me|you)/\w+)\b", " ".join(re.findall(r"(?:from_pretrained|combine)\(.*|hf-clpeft .*", snippet))
        )
        for repo in set(needed):
            token = f"hf_{repo.split('/')[0]}"
            if repo == "me/digits":
                learnt.model.push_to_hub(repo, token=token)
                hub.repo(repo).set_ref("refs/tags/task-001", "main")
            elif repo in ("me/birds", "you/butterflies"):
                own = "both" if re.search(r"remove\(\"october\"\)|remove me/birds october", snippet) else "first"
                model = ContinualModel.from_pretrained(birds / ("theirs" if repo[:3] == "you" else own))
                model.push_to_hub(repo, token=token)

    return owner_of_what_it_loads


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
def test_the_readme_keeps_its_word(me, hub):
    (snippet,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    me(snippet)
    exec(compile(snippet.replace("google/vit-base-patch16-224-in21k", BACKBONE), "<snippet>", "exec"), space := {})
    assert space["found"].label == "robin" and len(space["found"].classes) == 3
    assert space["both"].config.classes == ["robin", "wren", "finch"] and len(space["both"].config.tasks) == 3
    never = ContinualModel.from_pretrained("me/birds")
    assert never.config.classes == ["robin", "wren"] and list(hub.repo("me/birds").tags) == ["first"]


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_a_snippet_runs(me, snippet, request, monkeypatch):
    few = partial(load_benchmark, max_train_samples_per_task=32, max_test_samples_per_task=16)
    monkeypatch.setattr("hf_clpeft.load_benchmark", few)
    for registry in (METHODS, OPTIONS, ROUTERS, BENCHMARKS):  # what a snippet adds is gone afterwards
        for name in ("nearest_mean", "manhattan", "birds"):
            monkeypatch.setitem(registry, name, None)
            monkeypatch.delitem(registry, name)
    me(snippet)
    if "127.0.0.1:7860" in snippet:  # where the demo is
        snippet = snippet.replace("http://127.0.0.1:7860", request.getfixturevalue("page"))
    exec(compile(snippet.replace("google/vit-base-patch16-224-in21k", BACKBONE), "<snippet>", "exec"), {})


@pytest.mark.parametrize("learnt", ["s_lora"], indirect=True)
@pytest.mark.parametrize("page", [page for page, lines in OF_OURS.items() if lines])
def test_the_commands_of_a_page_run_one_after_another(me, page, birds, learnt, tmp_path):
    lines = OF_OURS[page]
    if not any("learn my/pictures" in line for line in lines):  # which makes me/birds
        me("\n".join(lines))
    (tmp_path / "more").symlink_to(birds / "my")
    for name in ("photos", "scans"):
        (tmp_path / name).symlink_to(birds / "my/pictures/robin")
    shutil.copy(birds / "my/pictures/robin/0.jpg", birds / "new/photo.jpg")
    shutil.copytree(birds / "first", "birds")
    shutil.copytree(learnt.args.output_dir, "out")
    for line in lines:
        line, given = re.sub(r" > \S+", "", line), ""
        if " | " in line:
            before, line = line.split(" | ")
            given = subprocess.run(shlex.split(before), capture_output=True, text=True, check=True).stdout
        _, *words = shlex.split(line, comments=True)
        words += ["--yes"] if words[0] == "remove" else []  # nobody is asked here
        result = CliRunner().invoke(cli.app, words, input=given)
        assert result.exit_code == 0, (line, result.output, result.exception)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """On GitHub, that is: files from the page on, and headings by their words."""
    for link in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (REPO / page).parent / path if path else REPO / page
        assert target.exists(), f"{page}: {link}"
        if anchor and not anchor.startswith("hf_clpeft."):  # explained by its docstring, which the site's build checks
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page}: {link}"


def test_the_pages_name_no_file_that_is_not_there():
    for page, text in PAGES.items():
        if page != "CHANGELOG.md":
            for path in re.findall(r"`((?:recipes|hf_clpeft|tests|docs|notebooks)/[\w/.-]+)`", text):
                assert (REPO / path).exists(), f"{page}: {path}"


def test_every_how_to_is_one_click_from_the_readme_and_from_the_first_page_of_the_site():
    pages = [path.relative_to(REPO / "docs").as_posix() for path in DOCS if path.parent.name == "how-to"]
    assert len(pages) == 15
    for page in pages:
        assert f"](docs/{page})" in README and f"]({page})" in PAGES["docs/index.md"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_stands_in_the_docs(name):
    kind = METHODS[name]
    if "peft" in {option.name for option in fields(kind.Config)} or not kind.__module__.startswith("hf_clpeft."):
        return  # the general form of others, or one that a test defines
    assert f"`{name}`" in PAGES["docs/methods.md"]
    assert kind.paper is None or kind.paper in PAGES["docs/methods.md"] + PAGES["docs/slda_pp.md"]
    section = README.partition("## Methods")[2].partition("\n## ")[0]
    assert name == "closed_form" or kind.title.partition(",")[0].lower() in section.lower()


def test_the_commands_at_the_top_are_the_ones_that_ci_runs():
    assert "make demo" in README and "make test" in README
    assert "make test" in (REPO / ".ci" / "run").read_text()


@cache
def sources():
    return "\n".join(path.read_text(encoding="utf-8") for path in (REPO / "hf_clpeft").rglob("*.py"))


@cache
def options_of_recipe(script):
    """Options of a script that runs methods; `None` of another one."""
    text = (REPO / script).read_text(encoding="utf-8")
    methods = [name for name in re.findall(r'"(\w+)"', text.partition("run_recipe(")[2]) if name in METHODS]
    if "run_recipe(" not in text:
        return None
    kinds = [StreamArguments, BackboneArguments, ContinualTrainingArguments, RunArguments]
    kinds += [METHODS[name].Config for name in methods or ["s_x"]]  # a tutorial's own method
    return {"config", "method"} | {option.name for kind in kinds for option in fields(kind)}


@cache
def options_of_command(name, asked):
    command = typer.main.get_command(cli.app).get_command(click.Context(click.Command("x")), name)
    if command.context_settings.get("ignore_unknown_options"):  # it reads its words itself, by fields of dataclasses
        return {option for option in asked if re.search(rf"^    {option}: ", sources(), re.MULTILINE)}
    known = {word for option in command.params for word in option.opts + option.secondary_opts}
    return {word.lstrip("-").replace("-", "_") for word in known}


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_files_and_options_that_the_pages_show_exist(page, line):
    words = shlex.split(line, comments=True)
    for part in " ".join(shlex.quote(word) for word in words).split(" '|' "):
        program, *arguments = [word.strip("'") for word in part.split()]
        options = [word.partition("=")[0].lstrip("-").replace("-", "_") for word in arguments if word[:2] == "--"]
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", (REPO / "Makefile").read_text(), re.MULTILINE), line
        elif program == "hf-clpeft":
            assert set(options) <= options_of_command(arguments[0], tuple(options)), line
        elif program in ("python", "accelerate"):
            script = next(word for word in arguments if word.endswith(".py"))
            assert (REPO / script).is_file(), line
            before, after = arguments[: arguments.index(script)], arguments[arguments.index(script) :]
            assert {word for word in before if word[:2] == "--"} <= {"--quiet", "--num_processes"}, line
            known = options_of_recipe(script) or (REPO / script).read_text(encoding="utf-8") + sources()
            for word in after:
                name = word.lstrip("-").replace("-", "_")
                if word[:2] == "--":
                    assert name in known, f"{line}: {word}"
                assert not word.endswith((".yaml", ".sbatch")) or "/" not in word or (REPO / word).is_file(), line
        else:
            assert program in SYSTEM, line


def test_commands_within_sentences_exist():
    commands = {command.callback.__name__ for command in cli.app.registered_commands}
    for page, text in PAGES.items():
        if page != "CHANGELOG.md":
            assert set(re.findall(r"`hf-clpeft (\w+)", text)) <= commands, page


@cache
def messages():
    """Every string of the package, with … for what is filled in."""
    found = []
    for path in (REPO / "hf_clpeft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found).replace("`", "")


TROUBLES = re.findall(r"^\| (`.*?) \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)


@pytest.mark.parametrize("words", TROUBLES)
def test_the_messages_in_troubleshooting_are_those_of_the_package(words):
    for message in re.findall(r"`([^`]+)`", words):
        text = re.sub(r"^k=0 ", "", message)
        assert text in messages() or re.sub(r" …$", "", text) in messages(), message
