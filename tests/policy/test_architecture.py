"""The shape that ARCHITECTURE.md gives the code, read from its syntax: who imports whom, and what
stands in one place only."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = {
    ".".join(path.relative_to(ROOT / "goose_lora").with_suffix("").parts): path
    for path in sorted((ROOT / "goose_lora").rglob("*.py"))
}
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.py"))}
FILES = {f"goose_lora.{name}": path for name, path in PACKAGE.items()}
FILES |= {f"recipes.{name}": path for name, path in RECIPES.items()}

# Which rooms each room may import, and no other. A room is a folder, or a file at the package's
# top; SAME_ROOM has files that share one. All but functional may import errors, which imports
# nothing. The order is from low to high: a line names lines above it only.
MAY_IMPORT: dict[str, set[str]] = {
    "files": set(),
    "terminal": {"files"},
    "functional": set(),
    "models": {"files", "functional"},
    "data": {"files", "terminal", "models"},
    "generation": {"functional", "models"},
    "training": {"files", "terminal", "models"},
    "rewards": {"files", "functional", "models", "data"},
    "evaluation": {"files", "functional", "models", "data", "generation", "rewards"},
    "reporting": {"files", "terminal", "models", "training"},
    "ppo": {"files", "functional", "models", "data", "generation", "training", "rewards", "reporting"},
    "planning": {"functional", "models", "ppo"},
    "sharing": {"files", "data", "models", "generation", "training", "reporting"},
    "apps": {"files", "data", "models", "generation", "rewards", "ppo", "sharing"},
    "instruct": {"files", "functional", "models", "generation"},
    "cli": {
        "files",
        "terminal",
        "models",
        "data",
        "generation",
        "training",
        "rewards",
        "evaluation",
        "reporting",
        "ppo",
        "planning",
        "sharing",
        "apps",
    },
}
SAME_ROOM = {
    "embedded": "files",
    "film_subjects": "files",
    "ownership": "files",
    "redaction": "files",
    "deadline": "files",
    "kinds": "files",
    "demo": "cli",
}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node):
    """Every module that is imported below ``node``: full dotted names; ``from a import b`` gives
    a.b where a is this package."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            found |= {alias.name for alias in inner.names}
        elif isinstance(inner, ast.ImportFrom):
            assert inner.level == 0, "relative import"
            ours = (inner.module or "").split(".")[0] == "goose_lora"
            names = [f"{inner.module}.{alias.name}" for alias in inner.names]
            found |= set(names if ours else [inner.module])
    return found


def own(names):
    """The modules of goose_lora among full dotted names, without the package's name; a name in a
    module counts as its module."""
    found = set()
    for name in names:
        parts = name.split(".")[1:] if name.startswith("goose_lora.") else []
        while parts and ".".join(parts) not in PACKAGE and ".".join([*parts, "__init__"]) not in PACKAGE:
            parts.pop()
        if parts:
            found.add(".".join(parts))
    return found


def room(module):
    name = module.split(".")[0]
    return SAME_ROOM.get(name, name)


def calls(path, *names):
    """(line, name) of each call of a function or method of one of ``names``."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else node.func.id
                if isinstance(node.func, ast.Name)
                else ""
            )
            if name in names:
                found.append((node.lineno, name))
    return found


MODULES = {name: path for name, path in PACKAGE.items() if name != "__init__"}


def test_the_reader_of_imports_sees_them_all():
    code = (
        "import goose_lora.files\nfrom goose_lora import demo\ndef f():\n    from goose_lora.models.roles"
        " import Role\n    import torch.nn as nn"
    )
    assert own(imports(ast.parse(code))) == {"files", "demo", "models.roles"}
    assert "torch.nn" in imports(ast.parse(code))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_its_room_may(name):
    if name == "errors":
        assert not own(imports(tree(PACKAGE[name])))
        return
    assert room(name) in MAY_IMPORT, f"goose_lora/{name}: which room is it in?"
    others = {
        other for other in own(imports(tree(PACKAGE[name]))) if room(other) not in (room(name), "errors")
    }
    wrong = {other for other in others if room(other) not in MAY_IMPORT[room(name)]}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_the_table_names_no_room_or_import_that_is_not_there():
    used = {name: set() for name in MAY_IMPORT}
    for name, path in (item for item in MODULES.items() if item[0] != "errors"):
        used[room(name)] |= {room(other) for other in own(imports(tree(path)))} - {room(name)}
    assert {name: MAY_IMPORT[name] - found for name, found in used.items() if MAY_IMPORT[name] - found} == {}


def test_a_room_imports_rooms_that_stand_below_it():
    order = list(MAY_IMPORT)
    for name, allowed in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(name) for other in allowed), name


def test_nobody_below_imports_recipes_apps_or_the_command_line():
    assert not [
        name
        for name, allowed in MAY_IMPORT.items()
        if ("apps" in allowed and name != "cli") or "cli" in allowed
    ]


def test_no_module_imports_itself_by_way_of_others():
    """A circle inside a room; between rooms the table has none."""
    below = {name: own(imports(tree(path))) - {name} for name, path in MODULES.items()}
    while below:
        free = [name for name, others in below.items() if not others & below.keys()]
        assert free, f"a circle among {sorted(below)}"
        for name in free:
            del below[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_imports_no_recipe(name):
    assert not any(module.split(".")[0] == "recipes" for module in imports(tree(RECIPES[name])))


def test_no_module_imports_a_recipe_or_a_test():
    for name, path in PACKAGE.items():
        assert not {module.split(".")[0] for module in imports(tree(path))} & {
            "recipes",
            "tests",
            "tiny",
            "reference",
            "pytest",
        }, name


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        *((name, {"torch", "jaxtyping", "goose_lora"}) for name in PACKAGE if name.startswith("functional.")),
        ("generation.rollout", {"torch", "jaxtyping", "goose_lora"}),
        ("ppo.microbatches", {"torch", "jaxtyping", "goose_lora"}),
        ("ppo.first_step_checks", {"torch", "jaxtyping", "goose_lora"}),
        ("rewards.sources", {"torch", "jaxtyping", "goose_lora"}),
        ("ppo.kl_control", set()),
    ],
)
def test_a_pure_module_imports_nothing_but_the_standard_library_and_torch(name, allowed):
    outside = {module.split(".")[0] for module in imports(tree(PACKAGE[name]))} - set(sys.stdlib_module_names)
    assert outside <= allowed


@pytest.mark.parametrize(
    "name",
    sorted(PACKAGE.keys() - {"cli.process", "cli.commands", "cli.stage", "evaluation.verdict", "demo"}),
)
def test_the_library_does_not_print(name):
    assert calls(PACKAGE[name], "print") == []


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_unpickled(name):
    source = tree(FILES[name])
    assert not {module.split(".")[0] for module in imports(source)} & {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "shelve",
    }
    loads = [
        node
        for node in ast.walk(source)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("torch.load", "load", "torch.jit.load", "torch.serialization.load")
    ]
    for node in loads:
        safe = [
            keyword
            for keyword in node.keywords
            if keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"
        ]
        assert safe, f"line {node.lineno}: torch.load without weights_only=True"


SWITCHES = {"set_adapter", "set_adapters", "disable_adapter", "disable_adapters", "enable_adapters"} | {
    "disable_adapter_layers",
    "enable_adapter_layers",
}


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"goose_lora.models.shared_base"}))
def test_only_the_shared_base_switches_adapters(name):
    assert calls(FILES[name], *SWITCHES) == []


def test_the_shared_base_switches_adapters_in_one_place():
    source = tree(PACKAGE["models.shared_base"])
    places = {
        function.name
        for function in ast.walk(source)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr in SWITCHES
    }
    assert places == {"_switch_to"}


@pytest.mark.parametrize("name", FILES)
def test_device_map_is_never_auto(name):
    for node in ast.walk(tree(FILES[name])):
        if isinstance(node, ast.keyword) and node.arg == "device_map":
            assert not isinstance(node.value, ast.Constant), (
                f"line {node.value.lineno}: device_map={ast.unparse(node.value)}"
            )


def test_nothing_private_of_the_libraries_trainer_is_overridden():
    from transformers import Trainer

    from goose_lora.ppo.trainer import PPOTrainer

    ours = [cls for cls in PPOTrainer.__mro__ if cls.__module__.startswith("goose_lora.")]
    names = {name for cls in ours for name in vars(cls) if name.startswith("_") and not name.startswith("__")}
    assert len(ours) == 2 and len(names) > 2
    assert {name for name in names if hasattr(Trainer, name)} == set()


def test_each_mutant_stands_in_its_source():
    """`make mutants` takes minutes: a bug whose place is gone is found here."""
    source = ast.parse((ROOT / "tests" / "policy" / "mutants.py").read_text())
    (listed,) = (
        node.value
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MUTANTS"
    )
    mutants = [(mutant.elts[0].id, mutant.elts[1].value) for mutant in listed.elts]
    files = {name: "functional" for name in ("MASKED", "ADVANTAGES", "LOSSES", "KL", "LOGPROBS")} | {
        "CONTROL": "ppo"
    }
    stems = {"CONTROL": "kl_control"}
    sources = {
        name: (ROOT / "goose_lora" / folder / f"{stems.get(name, name.lower())}.py").read_text()
        for name, folder in files.items()
    }
    assert len(mutants) > 90
    assert not [(name, old) for name, old in mutants if old not in sources[name]]


def test_the_mathematics_imports_nothing_of_the_project():
    for name in (name for name in MODULES if room(name) == "functional"):
        assert {room(other) for other in own(imports(tree(PACKAGE[name])))} <= {"functional"}, name


def test_modules_import_modules_and_leave_a_rooms_own_names_to_its_users():
    """A room's names are lazy: an import through them hides a circle."""
    rooms = {name.removesuffix(".__init__") for name in PACKAGE if name.endswith(".__init__")} - {
        "functional",
        "cli",
    }
    for name, path in MODULES.items():
        assert not own(imports(tree(path))) & rooms, name


@pytest.mark.parametrize("name", sorted(name for name in PACKAGE if name.endswith(".__init__")))
def test_a_room_gives_each_name_that_it_lists(name):
    package = importlib.import_module(f"goose_lora.{name.removesuffix('.__init__')}")
    assert package.__doc__
    for public in package.__all__:
        assert getattr(package, public) is not None
    # Such a name would hide the module: goose_lora.room.name is the one or the other.
    assert not set(package.__all__) & {path.stem for path in PACKAGE[name].parent.glob("*.py")}
