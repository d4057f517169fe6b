"""Measure the form of the code: names, widths, comments, and the size of functions.

    python tests/policy/form.py

Prints a table, and below it what is over a limit.
"""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "goose_lora").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
ALL = [
    path
    for folder in ("goose_lora", "recipes", "tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
CODE_COLUMNS = 110
PROSE_COLUMNS = 100
MOST_STATEMENTS = 40
MARKS = re.compile(r"\s*#\s*(type:|noqa|pyright:).*$")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def wide_lines(paths: list[Path]) -> list[str]:
    """Return ``file:line`` of each line over 110 columns, and of each line of prose over 100."""
    found = []
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        prose = set(prose_lines(path))
        for number, line in enumerate(lines, 1):
            line = MARKS.sub("", line)  # which ruff does not count either
            if len(line) > (PROSE_COLUMNS if number in prose else CODE_COLUMNS):
                found.append(f"{path.relative_to(ROOT)}:{number}")
    return found


def prose_lines(path: Path) -> Iterator[int]:
    """Yield the numbers of the lines of docstrings, and of comments that have a line of their
    own."""
    for node in ast.walk(parse(path)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
            and ast.get_docstring(node, clean=False) is not None
        ):
            yield from range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    yield from own_comments(path)


def own_comments(path: Path) -> list[int]:
    """Return the numbers of the lines that hold a comment and nothing else."""
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = text.splitlines()
    return [
        token.start[0]
        for token in tokens
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#")
    ]


def comments(path: Path) -> int:
    """Return the number of lines with a comment, at their end or alone, ``type: ignore`` and
    ``fmt`` left out."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    marks = re.compile(r"#\s*(type:|noqa|fmt:|isort:|pyright:)")
    return len(
        {
            token.start[0]
            for token in tokens
            if token.type == tokenize.COMMENT and not marks.match(token.string)
        }
    )


def statements(function: ast.AST) -> int:
    """Return how many statements a function has, those of blocks in it included, its docstring and
    inner functions' own not."""
    inner = {
        id(below)
        for node in ast.walk(function)
        if isinstance(node, FUNCTIONS) and node is not function
        for below in ast.walk(node)
    }
    inner -= {id(node) for node in ast.walk(function) if isinstance(node, FUNCTIONS)}
    number = sum(isinstance(node, ast.stmt) and id(node) not in inner for node in ast.walk(function)) - 1
    return number - (ast.get_docstring(function) is not None)


def long_functions(paths: list[Path]) -> list[str]:
    """Return ``file:name (number)`` of each function with more than 40 statements."""
    found = []
    for path in paths:
        for node in ast.walk(parse(path)):
            if isinstance(node, FUNCTIONS) and statements(node) > MOST_STATEMENTS:
                found.append(f"{path.relative_to(ROOT)}:{node.name} ({statements(node)})")
    return found


def any_annotations(paths: list[Path]) -> list[str]:
    """Return ``file:line`` of each parameter, result or variable whose annotation is ``Any``."""
    return [f"{path.relative_to(ROOT)}:{line}" for path in paths for line in bare_any(parse(path))]


def bare_any(tree: ast.Module) -> list[int]:
    found = []
    for node in ast.walk(tree):
        marks = [node.returns] if isinstance(node, FUNCTIONS) else []
        marks += [node.annotation] if isinstance(node, (ast.arg, ast.AnnAssign)) else []
        found += [mark.lineno for mark in marks if isinstance(mark, ast.Name) and mark.id == "Any"]
    return found


def selfs_of_any_kind(paths: list[Path]) -> list[str]:
    """Return ``file:line`` of each method whose ``self`` is annotated as another class."""
    return [
        f"{path.relative_to(ROOT)}:{method.lineno}"
        for path in paths
        for owner in ast.walk(parse(path))
        if isinstance(owner, ast.ClassDef)
        for method in owner.body
        if isinstance(method, FUNCTIONS)
        and any(arg.arg in ("self", "cls") and arg.annotation is not None for arg in method.args.args)
    ]


def docstrings_without_a_first_line(paths: list[Path]) -> list[str]:
    """Return ``file:line`` of each docstring whose first sentence goes on in the second line."""
    found = []
    for path in paths:
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
                lines = (ast.get_docstring(node) or "").splitlines()
                if len(lines) > 1 and lines[1].strip():
                    found.append(f"{path.relative_to(ROOT)}:{node.body[0].lineno}")
    return found


def public_names(path: Path) -> set[str]:
    """Return the public names that a module defines at its top: functions, classes and
    constants."""
    names = set()
    for node in parse(path).body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)
            }
    return {name for name in names if not name.startswith("_")} - {"logger"}


def names_with_two_meanings() -> dict[str, list[str]]:
    """Return each public name of the package that two modules define, with the modules."""
    homes = defaultdict(list)
    for path in PACKAGE:
        if path.name != "__init__.py":
            for name in public_names(path):
                homes[name].append(str(path.relative_to(ROOT / "goose_lora")))
    return {name: found for name, found in sorted(homes.items()) if len(found) > 1}


def inline_ifs(paths: list[Path]) -> int:
    return sum(isinstance(node, ast.IfExp) for path in paths for node in ast.walk(parse(path)))


def lines_of(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def parents_of_the_trainer() -> list[str]:
    """Return the classes that PPOTrainer names as its parents."""
    tree = parse(ROOT / "goose_lora" / "ppo" / "trainer.py")
    (trainer,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "PPOTrainer")
    return [ast.unparse(base) for base in trainer.bases]


def imports_of_a_recipe(path: Path) -> tuple[list[str], set[str]]:
    """Return the names that a recipe imports from goose_lora, and the rooms that they come from."""
    names, rooms = [], set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "goose_lora":
            for alias in node.names:
                names.append(alias.name)
                rooms.add(alias.name if node.module == "goose_lora" else (node.module or "").split(".")[1])
    return names, rooms


def statements_of_main(path: Path) -> int:
    (main,) = (node for node in parse(path).body if isinstance(node, FUNCTIONS) and node.name == "main")
    return statements(main)


def figures() -> dict[str, float]:
    """Return the figures of the table, by what they say."""
    lines = lines_of(PACKAGE)
    ppo = ROOT / "recipes" / "ppo.py"
    names, rooms = imports_of_a_recipe(ppo)
    return {
        "lines of the package": lines,
        "lines that are too wide": len(wide_lines(ALL)),
        "inline if-else per 100 lines": round(100 * inline_ifs(PACKAGE) / lines, 2),
        "comment lines in per cent": round(100 * sum(map(comments, PACKAGE)) / lines, 2),
        "Any in annotations": len(any_annotations(PACKAGE)),
        "self annotated": len(selfs_of_any_kind(PACKAGE)),
        "functions over 40 statements": len(long_functions(PACKAGE + RECIPES)),
        "public names with two meanings": len(names_with_two_meanings()),
        "names imported by recipes/ppo.py": len(names),
        "rooms imported by recipes/ppo.py": len(rooms),
        "statements of its main": statements_of_main(ppo),
        "parents of PPOTrainer": len(parents_of_the_trainer()),
    }


if __name__ == "__main__":
    for name, number in figures().items():
        print(f"{name:36} {number:>8g}")
    print("\nToo wide:", *wide_lines(ALL)[:40], sep="\n  ")
    print("\nLong functions:", *long_functions(ALL), sep="\n  ")
    print(
        "\nTwo meanings:",
        *(f"{name}: {', '.join(homes)}" for name, homes in names_with_two_meanings().items()),
        sep="\n  ",
    )
    print("\nAny:", *any_annotations(PACKAGE), sep="\n  ")
