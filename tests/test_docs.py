"""The pages build strictly, and need nothing from elsewhere; what the repository says of itself is in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hf_clpeft


REPO = Path(__file__).parents[1]
WORKFLOWS = sorted((REPO / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((REPO / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        for tag in re.findall(r"<(?:script|img|link|iframe)\b[^>]*>", page.read_text(encoding="utf-8")):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), f"{page.name}: {tag}"


def test_files_of_the_repo_are_part_of_the_site(site):
    results = (site / "recipes/results/index.html").read_text(encoding="utf-8")
    assert 'src="main_cpu_accuracy.png"' in results and (site / "recipes/results/main_cpu_accuracy.png").is_file()
    shown = (site / "recipes/tutorials/new_method.py.html").read_text(encoding="utf-8")
    assert "MeanLora" in shown
    link = (site / "how-to/new_method.html").read_text(encoding="utf-8")
    assert 'href="../recipes/tutorials/new_method.py.html"' in link and "../../recipes" not in link


def test_every_public_name_is_explained_on_one_page(site):
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (REPO / "docs" / "api").glob("*.md"))
    assert sorted(re.findall(r"^::: hf_clpeft\.(\w+)$", pages, re.MULTILINE)) == hf_clpeft.__all__
    methods = (site / "api/methods.html").read_text(encoding="utf-8")
    assert "Rank of the LoRA adapters." in methods  # options are explained when a method is defined, at run time
    assert "[<code>" not in methods and "[`" not in methods


def test_actions_are_pinned_and_can_write_nothing():
    assert [path.stem for path in WORKFLOWS] == ["ci", "release"]
    updates = yaml.safe_load((REPO / ".github" / "dependabot.yml").read_text(encoding="utf-8"))["updates"]
    assert [update["package-ecosystem"] for update in updates] == ["github-actions"]
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for path in WORKFLOWS:
        text, workflow = path.read_text(encoding="utf-8"), yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] and job["runs-on"] != "ubuntu-latest"
            assert job.get("permissions", {}) in ({}, {"id-token": "write"})  # by which PyPI knows the workflow
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step)
                for target in re.findall(r"make ([\w-]+)", step.get("run", "")):
                    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        for line in re.findall(r"uses: .*", text):
            assert re.fullmatch(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line


def test_issues_have_forms():
    config, *forms = (
        yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in sorted(FORMS, key=lambda path: path.stem != "config")
    )
    assert "blank_issues_enabled" in config and len(forms) == 2
    for form in forms:
        assert form["name"] and form["description"] and form["body"]
        ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids)) > 0
        assert {part["type"] for part in form["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def test_the_citation_is_that_of_the_readme_and_of_this_version():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert citation["version"] == hf_clpeft.__version__
    readme, paper = (REPO / "README.md").read_text(encoding="utf-8"), citation["preferred-citation"]
    assert paper["title"] in readme and paper["journal"] in readme
    assert all(author["family-names"] in readme for author in paper["authors"])


def test_agents_read_one_screen():
    assert len((REPO / "AGENTS.md").read_text(encoding="utf-8").splitlines()) <= 60
