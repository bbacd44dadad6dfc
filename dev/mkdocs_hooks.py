"""Hooks of the documentation site: pages of the whole repository, docstrings as Markdown, checks of the reference."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "dev/LOG.md", "dev/upstream/README.md")
FOLDERS = ("docs", "benchmarks/results", "replication")
SUFFIXES = {".md", ".png", ".svg"}
TRAINERS = ("accelerate", "axolotl", "lightning", "swift", "torchtitan", "transformers")
PUBLIC = ("", "torch", "torch.accumulation", "torch.integrations", "jax", *TRAINERS)
"""Modules of floragrad whose ``__all__`` is the public interface."""

SOURCE_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]*\.(?:py|ipynb)\)")
ROLE = re.compile(r":\w+:`~?([\w.]+)`")

log = logging.getLogger("mkdocs.hooks.floragrad")


def on_files(files: Files, config: Any) -> Files:
    """Replace the files of ``docs_dir`` by the repository's pages, at their paths: links are those of GitHub."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    found = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    names = [*DOCUMENTS, *(path.relative_to(ROOT).as_posix() for path in found)]
    pages = [File.generated(config, name, abs_src_path=str(ROOT / name)) for name in names]
    return Files([*theme, *pages])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Adapt what Python-Markdown reads otherwise than GitHub: bars in the code of a table; unlink source files."""
    lines = [line.replace(r"\|", "|") if line.startswith("|") else line for line in markdown.splitlines()]
    return SOURCE_LINK.sub(r"\1", "\n".join(lines))


def on_pre_build(config: Any) -> None:
    """Warn, so that a strict build fails, of public names without a docstring or without a place in the reference."""
    pages = "".join(page.read_text(encoding="utf-8") for page in (Path(config.docs_dir) / "api").glob("*.md"))
    package = griffe.load("floragrad", search_paths=[str(ROOT / "src")])
    directives = re.findall(r"^::: floragrad\.(\S+)", pages, flags=re.MULTILINE)
    placed = {package[path].canonical_path for path in directives}
    for public in _public_objects(package):
        if not public.has_docstring:
            log.warning("%s has no docstring", public.canonical_path)
        if public.canonical_path not in placed:
            log.warning("%s is on no page of docs/api", public.canonical_path)
        if public.is_class:
            for member in public.members.values():
                is_special = member.name.startswith("_")
                if member.is_function and not is_special and not member.has_docstring:
                    log.warning("%s has no docstring", member.canonical_path)


def _public_objects(package: griffe.Module) -> Iterator[griffe.Object]:
    for module in PUBLIC:
        home = package[module] if module else package
        for name in home.exports or ():
            if not name.startswith("__"):
                found = home[name]
                yield found.final_target if found.is_alias else found


class Docstrings(griffe.Extension):
    """Translates the reStructuredText in docstrings: roles, literal blocks, and Google's singular ``Example``."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Translate one docstring before it is parsed."""
        if obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
