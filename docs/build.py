"""python docs/build.py [--serve]: the pages of this folder, and those made from the code, as a site in build/site.

`<!-- settings -->`, `<!-- api -->`, `<!-- commands -->` and `<!-- rooms -->` in a page are replaced by what the package
says of itself. `launch.md` and `benchmarks.md` are the READMEs of those folders. The whole is written to build/docs and
handed to Zensical (`pip install -e '.[docs]'`), which also reads the settings of MkDocs.
"""

import argparse
import ast
import contextlib
import html
import importlib
import inspect
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from jaxrlhf.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "docs"


# The API page's parts: first module name under the package, heading. Others come after them under their own name.
ROOMS = {
    "models": "Models and adapters",
    "hf": "Files in and out",
    "data": "Data",
    "rollout": "Sampling",
    "steps": "Steps",
    "stages": "PPO on control tasks",
    "environments": "Environments",
    "algorithms": "Algorithms",
    "config": "Settings",
    "records": "Records",
}
WITH_METHODS = ("stages", "environments")  # rooms whose classes are shown with their methods


def write_pages():
    """All pages and images of the site, in build/docs."""
    shutil.rmtree(TARGET, ignore_errors=True)
    shutil.copytree(ROOT / "docs", TARGET, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for folder in ("launch", "benchmarks"):
        shutil.copy(ROOT / folder / "README.md", TARGET / f"{folder}.md")
    for image in (ROOT / "benchmarks").glob("*.svg"):
        shutil.copy(image, TARGET)
    for page in TARGET.glob("*.md"):
        text = re.sub(r"\.\./(launch|benchmarks)/README\.md", r"\1.md", page.read_text())
        text = text.replace("../benchmarks/", "")
        for make in (settings, api, commands, rooms):
            marker = f"<!-- {make.__name__} -->"
            text = text.replace(marker, make()) if marker in text else text
        page.write_text(text)


def main():
    parser = argparse.ArgumentParser(description="Builds the site in build/site; a warning is an error.")
    parser.add_argument("--serve", action="store_true", help="shows the site at http://localhost:8000")
    arguments = parser.parse_args()
    write_pages()
    command = ["serve"] if arguments.serve else ["build", "--strict", "--clean"]
    return subprocess.run([sys.executable, "-m", "zensical", *command, "-f", str(ROOT / "mkdocs.yml")]).returncode


# ---------------------------------------------------------------- settings


NOTES = {
    "free": "may change on resume",
    "rounding": "may change on resume",
    "choice": "may change on resume if <code>checkpoints.result</code> is last",
    "evaluated": "may change on resume if <code>checkpoints.result</code> is last and no early stopping or plateau "
    "waits for evaluations",
    "longer": "may grow on resume, or end at the newest checkpoint",
}


def settings():
    """A heading for each section, and a table of its settings."""
    from jaxrlhf.config import table

    sections = {(): ("", [])}
    for place, setting in table.settings().items():
        if table.ANY in place:  # the parts of a sum: as where they stand alone
            continue
        if setting.is_section:
            sections[place] = (setting.description, [])
        else:
            kind = place[-2].removeprefix("kind=") if len(place) > 1 else ""
            section = sections.setdefault(place[:-1], (f"With `kind: {kind}`", []))
            section[1].append(row(table, place, setting))
    parts = []
    for place, (description, rows) in sections.items():
        name = table.dotted(place)
        if name:
            level, text = "##" if len(place) == 1 else "###", sentence(html.escape(description))
            parts.append(f"{level} {name} {{ #{name} }}\n\n{text}\n")
        if rows:
            parts.append(f'<table class="settings"><tbody>\n{"".join(rows)}</tbody></table>\n')
    return "\n".join(parts)


def row(table, place, setting):
    required, path = setting.default is table.REQUIRED, table.dotted(table.without_kinds(place))
    facts = [html.escape(setting.kind)]
    facts.append("required" if required else f"default <code>{table.as_yaml(setting.default)}</code>")
    facts.append("traced" if setting.metadata.get("traced") else "")
    facts.append(NOTES.get(setting.metadata.get("on_resume"), ""))
    name = f"<code>{path}</code><br><small>{' · '.join(filter(None, facts))}</small>"
    text = sentence(html.escape(setting.description))
    return f'<tr id="{table.dotted(place)}"><td>{name}</td><td>{text}</td></tr>\n'


def sentence(text):
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")


# ---------------------------------------------------------------- API


def section_of():
    """Settings class -> key path of the first section that it is."""
    from jaxrlhf.config import RunConfig, Settings

    found = {}

    def walk(cls, path):
        for name, field in cls.model_fields.items():
            for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if inspect.isclass(kind) and issubclass(kind, Settings) and kind not in found:
                    found[kind] = f"{path}{name}"
                    walk(kind, f"{path}{name}.")

    walk(RunConfig, "")
    return found


def api():
    """Every public name under its room, from its docstring."""
    package, sections = importlib.import_module("jaxrlhf"), section_of()
    by_room = {}
    for name in package.__all__:
        thing = getattr(package, name)
        by_room.setdefault(thing.__module__.split(".")[1], []).append((name, thing))
    parts = []
    for room in sorted(by_room, key=lambda room: [*ROOMS, room].index(room)):
        parts.append(f"## {ROOMS.get(room, room.capitalize())}\n")
        for _, thing in by_room[room]:
            parts.append(f"::: {thing.__module__}.{thing.__qualname__}")
            if thing in sections:
                section = sections[thing]
                parts.append("    options: {members: false}\n")
                parts.append(f"Its fields are the settings of [`{section}`](settings.md#{section}).\n")
            elif room == "records":  # the shapes stand in comments
                parts.append("    options: {members: false, show_source: true}\n")
            else:
                without_members = inspect.isclass(thing) and room not in WITH_METHODS
                parts.append("    options: {members: false}\n" if without_members else "")
    return "\n".join(parts)


# ---------------------------------------------------------------- commands


def commands():
    """The help page of each command; that of train without its list of settings."""
    parts = []
    for name in COMMANDS:
        module = importlib.import_module(f"jaxrlhf.cli.{name}")
        for words in ([], *([word] for word in getattr(module, "PARSERS", ()))):  # `data` has commands of its own
            text = io.StringIO()
            with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
                module.parse([*words, "--help"])
            page = text.getvalue().split("\nsettings:\n")[0].rstrip()
            parts.append(f"## {' '.join([name, *words])}\n\n```text\n{page}\n```\n")
    return "\n".join(parts)


# ---------------------------------------------------------------- rooms


def rooms():
    """The package's folders and their files, each with the first line of its docstring."""
    parts = []
    for folder in ["", *sorted(path.name for path in (ROOT / "jaxrlhf").iterdir() if (path / "__init__.py").is_file())]:
        files = sorted((ROOT / "jaxrlhf" / folder).glob("*.py"))
        lines = [f"| `{path.name}` | {first_line(path)} |" for path in files if path.read_text().strip()]
        parts.append(f"### {folder}/\n" if folder else "### jaxrlhf/\n")
        parts.append("\n".join(["| file | what it is |", "| --- | --- |", *lines]) + "\n")
    return "\n".join(parts)


def first_line(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.sub(r"\s+", " ", text.split("\n\n")[0]).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
