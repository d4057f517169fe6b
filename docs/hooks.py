"""mkdocs' hook: pages link to files of the repository as on GitHub, ../recipes/ppo.py, and the site
has a page for each file that is linked.

A link to a file that is not there stays as it is, and mkdocs --strict ends the build at it.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\((\.\./[^)#\s]+)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash"}


def on_files(files: Files, config, **kwargs) -> Files:
    """Add a page for each file outside docs/ that a page links to."""
    root = Path(config.docs_dir).parent
    pages = [file for file in files if file.is_documentation_page()]
    linked = {target for page in pages for target in LINK.findall(page.content_string)}
    for target in sorted(linked):
        path = root / target.removeprefix("../")
        if path.is_file() and path.suffix in LANGUAGES:
            name = target.removeprefix("../")
            text = (
                "---\nhide: [navigation, toc]\n---\n\n#"
                f" {name}\n\n````{LANGUAGES[path.suffix]}\n{path.read_text(encoding='utf-8')}\n````\n"
            )
            files.append(File.generated(config, f"source/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, files: Files, **kwargs) -> str:
    """Turn links to such files into links to their pages."""

    def turned(match: re.Match[str]) -> str:
        name = match[1].removeprefix("../")
        return f"](source/{name}.md" if files.get_file_from_path(f"source/{name}.md") else match[0]

    return LINK.sub(turned, markdown)
