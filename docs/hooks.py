# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
What mkdocs adds to the pages: the options, out of the docstring of `RdmDistillConfig`, and the files of the repository
that a page links to outside `docs/`. The package is read, not imported: a build needs mkdocs alone.
"""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
HEAD = "| option | type | default | meaning |"
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)\)")


def docstring(path: str, class_name: str) -> str:
    """A class's docstring, from its source."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return ast.get_docstring(node)


def tables(doc: str) -> str:
    """Tables, under the docstring's own headings, of its `name (type, ...):` entries and what stands below them."""
    lines = []
    for line in doc.splitlines():
        if heading := re.match(r"\s*> Parameters (.*?)\.?$", line):
            lines += ["", f"### Parameters {heading[1]}", "", HEAD, "|---|---|---|---|"]
        elif entry := re.match(r"\s+([\w, ]+) \(`(.+?)`(, \*optional\*)?(?:, defaults to `(.+?)`)?\):\s*(.*)$", line):
            names, kind, optional, default, text = entry.groups()
            default = f"`{default}`" if default else "none" if optional else "required"
            names = "<br>".join(f"`{name.strip()}`" for name in names.split(","))
            lines.append(f"| {names} | `{kind}` | {default} | {text} |")
        elif line.strip() and lines and lines[-1].endswith("|") and not lines[-1].startswith("|--"):
            lines[-1] = f"{lines[-1][:-1].rstrip()} {line.strip()} |"
    return "\n".join(lines)


def option_tables() -> str:
    """All options of the config and of the script `examples/train_gndm.py`."""
    config = tables(docstring("rdm_trl/config.py", "RdmDistillConfig"))
    return config + "\n\n## Of the script alone\n" + tables(docstring("examples/train_gndm.py", "ScriptArguments"))


def on_page_markdown(markdown: str, page, config, files) -> str:
    from mkdocs.structure.files import File  # the tables above are of use without it

    for target in OUTSIDE.findall(markdown):
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    markdown = OUTSIDE.sub(r"](\1)", markdown)
    return markdown.replace("<!-- every option -->", option_tables())
