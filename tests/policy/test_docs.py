"""README and docs say what is so: every command is parsed by what it calls, code compiles, settings
are known, links lead somewhere."""

import argparse
import ast
import importlib
import inspect
import re
import runpy
import sys
from dataclasses import fields

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from pages import PAGES, ROOT, anchors, blocks, commands, links, read, spans
from recipe_runs import settings_of

from goose_lora import cli
from goose_lora.cli import recipes as recipe_commands

COMMANDS = [command for path in PAGES for command in commands(path)]
RECIPES = ("sft", "reward", "ppo", "own_loop", "evaluate", "ppo_in_one_file")
WITHOUT_CONFIGURATION = {"ppo_in_one_file"}  # all its settings have defaults; its page is one_file.md
# Programs of others that the pages name, and scripts that run in other repositories.
FOREIGN = {"tensorboard", "trackio", "ollama", "llama-cli", "vllm"}
FOREIGN_SCRIPTS = {"examples/scripts/ppo/ppo.py", "convert_hf_to_gguf.py"}
OLD_TRL = "AutoModelForCausalLMWithValueHead"  # in code that docs/migration.md shows as it was


@pytest.fixture(scope="module")
def known():
    """The settings of each recipe: its dataclasses."""
    return {name: settings_of(name) for name in RECIPES}


def names_of(types):
    return {field.name for kind in types for field in fields(kind) if field.init}


# ---- Commands ----


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_one_that_its_program_takes(command, known, monkeypatch):
    words = command.words
    # A command that is named, and not called
    if words and not (command.is_span and words[1:] in [[name] for name in cli.COMMANDS]):
        run(words, known, monkeypatch)


def run(words, known, monkeypatch):
    program, arguments = words[0], words[1:]
    if program == "goose-lora" and arguments[0] in recipe_commands.RECIPES:
        # A file of the reader's own stands for the demo's
        demo = str(demo_settings(arguments[0].replace("-", "_")))
        is_own = [word.startswith("my_") and word.endswith(".yaml") for word in arguments]
        arguments = [demo if own else word for word, own in zip(arguments, is_own, strict=True)]
        script_name, _ = recipe_commands.RECIPES[arguments[0]]
        _, settings = recipe_commands.split_words(arguments[1:])
        recipe(f"recipes/{script_name}", settings, known)
    elif program == "goose-lora":
        assert cli.command_line().parse_args(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE)
        assert arguments and set(arguments) <= set(targets), f"the Makefile has {targets}"
    elif program == "accelerate":
        launch(arguments, known)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(arguments)
        recipe(parsed.training_script, parsed.training_script_args, known)
    elif program.startswith("recipes/"):
        recipe(program, arguments, known)
    elif program == "pytest" or arguments[:2] == ["-m", "pytest"]:
        for name in (word for word in arguments if "/" in word):
            path, _, test = name.partition("::")
            assert (ROOT / path).exists() and (not test or f"def {test}(" in read(ROOT / path)), name
    elif program == "python":
        script(arguments[0], arguments[1:], known, monkeypatch)
    elif program == "pip":
        extra = re.fullmatch(r"goose-lora\[(\w+)\]", arguments[-1])
        assert arguments[-1] in ("goose-lora", "vllm", ".") or (
            extra and re.search(rf"^{extra[1]} = \[", read(ROOT / "pyproject.toml"), re.MULTILINE)
        )
    else:
        assert program in FOREIGN, (
            f"no program of this project, and none that the pages are known to name: {program}"
        )


def launch(arguments, known):
    """accelerate's own parser takes its options, the recipe's the rest."""
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    has_script = any(word.endswith(".py") for word in arguments)
    parsed = launch_command_parser().parse_args([*arguments[1:], *([] if has_script else ["recipes/ppo.py"])])
    if parsed.training_script not in FOREIGN_SCRIPTS:
        assert parsed.config_file is None or (ROOT / parsed.config_file).is_file()
        if has_script:
            recipe(parsed.training_script, parsed.training_script_args, known)


def recipe(path, arguments, known):
    """A file of the reader's own, my_ppo.yaml, stands for the demo's."""
    name = path.removeprefix("recipes/").removesuffix(".py")
    assert name in known, f"{path}: no such recipe"
    if not arguments:
        return
    demo = str(demo_settings(name))
    options = {word.removeprefix("--") for word in arguments if word.startswith("--")} - {"config"}
    assert options <= names_of(known[name]), (
        "argparse takes an option that is cut short; a page writes it out"
    )
    if name in WITHOUT_CONFIGURATION:
        cli.parse(*known[name], args=arguments)
        return
    arguments = ["--config", demo, *arguments] if "--config" not in arguments else list(arguments)
    at = arguments.index("--config") + 1
    arguments[at] = demo if arguments[at].startswith("my_") else str(ROOT / arguments[at])
    on_cpu = [] if name == "evaluate" or arguments[at] == demo else ["--use_cpu", "True"]
    cli.parse(*known[name], args=[*arguments, *on_cpu])


def demo_settings(name):
    folder = ROOT / "recipes" / "configs" / "demo_cpu"
    return folder / "raw" / "own_loop.yaml" if name == "own_loop" else folder / f"{name}.yaml"


class Parsed(Exception):
    """Instead of the work."""


def script(path, arguments, known, monkeypatch):
    if path.startswith("recipes/"):
        recipe(path, arguments, known)
    elif path not in FOREIGN_SCRIPTS:
        assert (ROOT / path).is_file(), f"{path}: no such file"
        if path.startswith("benchmarks/"):
            parse = argparse.ArgumentParser.parse_args

            def parse_only(self, *given):
                parse(self, *given)
                raise Parsed

            monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
            monkeypatch.setattr(sys, "argv", [path, *arguments])
            monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
            with pytest.raises(Parsed):
                runpy.run_path(str(ROOT / path), run_name="__main__")
        else:
            assert not arguments


def test_the_commands_that_a_reader_needs_are_there():
    named = {" ".join(command.words[:2]) for command in COMMANDS}
    every = {f"goose-lora {name}" for name in cli.COMMANDS}
    assert every <= named, f"on no page: {sorted(every - named)}"
    assert {"make demo", "make test", "make docs", "accelerate launch"} <= named and len(COMMANDS) > 60


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_paths_and_options_in_code_spans_exist(path, known):
    """Of the log the newest names hold: what has been renamed since is history."""
    options = {name for types in known.values() for name in names_of(types)}
    options |= {
        option.lstrip("-")
        for parser in subparsers()
        for action in parser._actions
        for option in action.option_strings
    }
    options |= {option.lstrip("-") for option in recipe_commands.LAUNCHER_OPTIONS}
    options |= {"debug", "verbose", "help", "help-all", "cpu", "full"}
    wrong = []
    for line, span in spans(path):
        if (
            re.fullmatch(r"(?:recipes|goose_lora|tests|benchmarks|docs)/[\w./]+", span)
            and not (ROOT / span).exists()
        ):
            wrong.append((line, span))
        if (
            span.startswith("--")
            and path.name != "migration.md"
            and set(re.findall(r"--(\w+)", span)) - options
        ):
            wrong.append((line, span))
    assert wrong == []


def subparsers():
    return next(
        action for action in cli.command_line()._actions if isinstance(action, argparse._SubParsersAction)
    ).choices.values()


# ---- Code and settings ----


@pytest.mark.parametrize("block", [block for path in PAGES for block in blocks(path, "python")], ids=str)
def test_python_compiles_and_what_it_imports_and_calls_is_there(block):
    tree = ast.parse(block.text)
    compile(tree, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(importlib.import_module(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert_imports(str(node.module), [alias.name for alias in node.names])
        elif isinstance(node, ast.Call) and OLD_TRL not in block.text:
            assert_keywords(node)


def assert_imports(module, names):
    found = importlib.import_module(module)
    assert [name for name in names if not hasattr(found, name)] == []


def assert_keywords(call):
    """Of calls of the project's own: no keyword that they do not have."""
    import goose_lora

    name = ast.unparse(call.func)
    given = {keyword.arg for keyword in call.keywords if keyword.arg}
    if name == "PPOConfig":
        assert given <= names_of([goose_lora.PPOConfig])
    elif name in ("PPOTrainer", "SharedBase.build", "trainer.step", "trainer.generate", "trainer.train"):
        owner = goose_lora.PPOTrainer if name.startswith("trainer.") else goose_lora
        target = (
            getattr(owner, name.removeprefix("trainer."))
            if "." not in name or owner is not goose_lora
            else goose_lora.SharedBase.build
        )
        assert given <= set(inspect.signature(target).parameters), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_imports_in_the_text_are_there(path):
    for _, span in spans(path):
        match = re.fullmatch(r"from (goose_lora[\w.]*) import ([\w, ]+)", span)
        if match:
            assert_imports(match[1], match[2].split(", "))


@pytest.mark.parametrize("block", [block for path in PAGES for block in blocks(path, "yaml")], ids=str)
def test_settings_in_yaml_are_those_of_one_recipe_which_takes_their_values(block, known, tmp_path):
    """What a block leaves out is the demo's."""
    settings = yaml.safe_load(block.text)
    takers = [name for name, types in known.items() if settings.keys() <= names_of(types)]
    assert takers, f"no recipe has all of {sorted(settings)}"
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump(yaml.safe_load(read(demo_settings(takers[0]))) | settings)
    )
    cli.parse(*known[takers[0]], args=["--config", str(tmp_path / "settings.yaml")])


@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if path.name not in ("LOG.md", "CONTRIBUTING.md")],
    ids=lambda path: path.name,
)
def test_settings_in_code_spans_are_known(path, known):
    every = {name for types in known.values() for name in names_of(types)}
    wrong = []
    for line, span in spans(path):
        match = re.match(r"([a-z]+(?:_[a-z]+)*): ", span)
        if match and match[1] not in every:
            wrong.append((line, span))
    assert wrong == []


def sections(path):
    """Text below each heading of the second level, by heading."""
    parts = re.split(r"^## (.+)$", read(path), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def first_column(text, heading):
    """Cells of the first column of the table whose heading begins so."""
    table = text[text.index(f"\n| {heading} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [row.split("|")[1].strip() for row in table]


def test_each_recipe_has_a_section_and_names_settings_of_its_own(known):
    found = sections(ROOT / "docs" / "recipes.md")
    for name, types in known.items():
        if name in WITHOUT_CONFIGURATION:
            continue
        text = next(text for heading, text in found.items() if heading.endswith(f"{name}.py"))
        named = {
            setting for cell in first_column(text, "setting") for setting in re.findall(r"`(\w+)`", cell)
        }
        assert len(named) >= 4 and named <= names_of(types), named - names_of(types)


def test_the_page_of_the_recipes_has_each_line_of_the_diagnosis():
    text = next(
        text for heading, text in sections(ROOT / "docs" / "recipes.md").items() if heading.endswith("ppo.py")
    )
    files = [ROOT / "goose_lora" / "reporting" / f"{name}.py" for name in ("diagnosis", "reply_checks")]
    code = [ast.parse(read(path)) for path in files]
    calls = [
        node
        for tree in code
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Finding"
    ]
    assert sorted({ast.literal_eval(call.args[1]) for call in calls}) == sorted(first_column(text, "line"))


# ---- Links, and the site ----


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_and_anchor_leads_somewhere(path):
    wrong = []
    for line, target in links(path):
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        if not page.exists() or (anchor and anchor not in anchors(page)):
            wrong.append((line, target))
    assert wrong == []


def site(source, target):
    """The site of the folder ``source`` as ``make docs`` builds it, with the navigation if it is
    docs/."""
    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(source), site_dir=str(target), strict=True)
    if source != ROOT / "docs":
        config.nav, config.extra_css = None, []
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return site(ROOT / "docs", tmp_path_factory.mktemp("site"))


def test_the_site_has_every_page_and_the_files_that_they_link_to(built):
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= {
        path.stem for path in built.glob("*.html")
    }
    assert "def main(" in re.sub(r"<[^>]+>", "", read(built / "source" / "recipes" / "ppo.py.html"))
    assert 'href="source/recipes/ppo.py.html"' in read(built / "recipes.html")
    for page in (ROOT / "docs").glob("*.md"):
        assert read(built / f"{page.stem}.html").count("<h1") == 1, (
            f"{page.name}: a line that begins with #180 is a heading"
        )


def test_every_page_is_in_the_navigation_or_waits_there_as_a_comment():
    text = read(ROOT / "mkdocs.yml")
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"- {path.name}\n" not in text] == []


def test_nothing_on_the_site_is_loaded_from_elsewhere(built):
    elsewhere = r"""=["']?(https?:|//)"""
    loaded = re.compile(
        rf"<(?:script|img|iframe|source)\b[^>]*\bsrc{elsewhere}|<link\b[^>]*\bhref{elsewhere}"
    )
    for page in built.rglob("*.html"):
        assert not loaded.search(read(page)), page.name
    for sheet in built.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:|//)|@import", read(sheet)), sheet.name


@pytest.mark.parametrize(
    "text",
    [
        "[x](nowhere.md)",
        "[x](index.md#nowhere)",
        "[x](#nowhere)",
        "[x](../recipes/nowhere.py)",
        "[x](/index.md)",
        "![x](no.png)",
        "[x](../README.md)",
    ],
)
def test_a_link_that_leads_nowhere_ends_the_build(text, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{text}\n")
    with pytest.raises(Abort, match="1 warnings in strict mode"):
        site(tmp_path / "docs", tmp_path / "site")


def test_make_docs_is_strict_and_not_quiet():
    """With --quiet mkdocs does not see its own warnings, and --strict lets every broken link
    pass."""
    assert re.search(r"^docs: .*\n\t.*/mkdocs build --strict$", read(ROOT / "Makefile"), re.MULTILINE)
    assert "make docs\n" in read(ROOT / ".ci" / "run")


def test_a_page_with_sound_links_builds(tmp_path):
    for folder in ("docs", "recipes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "recipes" / "a.py").write_text("a = 1\n")
    (tmp_path / "docs" / "index.md").write_text(
        "# A page of 1.12, and more\n\n[x](#a-page-of-112-and-more) [y](../recipes/a.py)\n"
    )
    assert (site(tmp_path / "docs", tmp_path / "site") / "source" / "recipes" / "a.py.html").is_file()
