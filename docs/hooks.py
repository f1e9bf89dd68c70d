"""What the pages need beyond Markdown: files of the repo that they link to, and docstrings with links.

Pages link to files as they do on GitHub, `../recipes/s_lora.py`. Pages, pictures and tables from outside of `docs/`
become part of the site; a file of code becomes a page that shows it.
"""

import json
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

import hf_clpeft


ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^()#\s:]+)((?:#[^()\s]*)?\))")
PAGES = "recipes/results/*.md", "recipes/results/*.png", "recipes/results/*.csv"
SHOWN = {".py": "py", ".sh": "sh", ".sbatch": "sh", ".yaml": "yaml", ".cff": "yaml"}


def in_repo(link, page):
    """Path in the repo of what a page links to, or None."""
    folder = "" if page.startswith("recipes/") else "docs"
    path = posixpath.normpath(posixpath.join(folder, posixpath.dirname(page), link))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def in_site(path):
    """Where the site has a file of the repo."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.endswith((".md", ".png", ".svg", ".csv")) else f"{path}.md"


def shown(path):
    """A page for a file of code; for a notebook, its cells."""
    text, language = path.read_text(encoding="utf-8"), SHOWN.get(path.suffix, "text")
    if path.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        cells = [cell for cell in cells if "[![" not in cell[1]]  # a badge is a picture from elsewhere
        return "\n\n".join(source if kind == "markdown" else f"```py\n{source}\n```" for kind, source in cells)
    name = path.relative_to(ROOT).as_posix()
    return f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n````{language}\n{text}\n````\n"


def on_files(files, config):
    found = {path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern)}
    for page in [file.src_uri for file in files.documentation_pages()] + sorted(found):
        if page.endswith(".md"):
            text = (ROOT / ("" if page in found else "docs") / page).read_text(encoding="utf-8")
            found |= {path for _, link, _ in LINK.findall(text) if (path := in_repo(link, page))}
    for path in sorted(found):
        if path.startswith("docs/") or path == "README.md":
            continue
        if in_site(path) == path:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        else:
            files.append(File.generated(config, in_site(path), content=shown(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    here = page.file.src_uri

    def moved(match):
        path = in_repo(match[2], here)
        if path is None:
            return match[0]
        return f"{match[1]}{posixpath.relpath(in_site(path), posixpath.dirname(here) or '.')}{match[3]}"

    return LINK.sub(moved, markdown)


class Linked(griffe.Extension):
    """Names in docstrings, [`Task`], become links where the pages explain them; in the types before a colon, text."""

    def on_object(self, *, obj, **_):
        if obj.is_attribute and "property" not in obj.labels:
            obj.docstring = None  # an attribute looked at from outside has the docstring of its type
        if obj.docstring:
            types = (
                r"^( +\w+ \()(.*)(\):)",  # of Args
                r"^( +)(\[?`[^`]+`(?:[\[\], ]+`[^`]+`)*\]?)(:)",  # of Returns and Raises
            )
            for pattern in types:
                obj.docstring.value = re.sub(pattern, self.plain, obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"\[`~?([\w.]+)`\]", self.linked, obj.docstring.value)

    def plain(self, match):
        return match[1] + re.sub(r"\[`~?|`\]|[`*]", "", match[2]) + match[3]

    def linked(self, match):
        name = match[1].removeprefix("hf_clpeft.")
        return f"[`{name}`][hf_clpeft.{name}]" if name.split(".")[0] in hf_clpeft.__all__ else f"`{name}`"
