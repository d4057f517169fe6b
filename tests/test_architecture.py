"""The shape that ARCHITECTURE.md gives the code, read from its syntax: who imports whom, and what stands in one place only."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = {path.stem: path for path in sorted((ROOT / "goose_lora").glob("*.py"))}
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.py"))}
FILES = {f"goose_lora.{name}": path for name, path in PACKAGE.items()} | {f"recipes.{name}": path for name, path in RECIPES.items()}

# Which modules of goose_lora each may import, and no other. The order is from low to high: a line names lines above it only.
MAY_IMPORT: dict[str, set[str]] = {
    # imports nothing of the project
    "from_trl": set(),
    "ppo_math": set(),
    "kl_control": set(),
    "logprobs": set(),
    "trunk": set(),
    "batch": set(),
    "settings": set(),
    "model_files": set(),
    "adapters": {"model_files"},
    "data_formats": set(),
    "data": {"data_formats", "model_files"},
    "gates": set(),
    "preferences": {"data", "data_formats"},
    "ranked": {"ppo_math"},
    "rewards": {"batch"},
    "ppo_config": {"adapters", "from_trl", "settings", "trunk"},
    "evaluation": set(),
    "verdict": {"evaluation"},
    "held_out": {"preferences", "ranked", "verdict"},
    "findings": set(),
    "pictures": {"findings"},
    "reply_verdicts": {"findings"},
    "diagnosis": {"findings", "reply_verdicts"},
    "__init__": {"from_trl"},
    # one base, and what is made with it
    "launch": set(),
    "loading": {"adapters", "model_files", "trunk"},
    "trunk_sharing": {"adapters", "trunk"},
    "last_layer": {"trunk"},
    "views": {"adapters", "batch", "last_layer", "logprobs", "trunk", "trunk_sharing"},
    "shared_base": {"adapters", "trunk_sharing", "views"},
    "callbacks": {"batch", "diagnosis", "kl_control", "model_files", "shared_base"},
    "checkpoints": set(),
    "interrupts": set(),
    "resumable": {"adapters", "checkpoints", "interrupts", "loading", "model_files", "ppo_config", "shared_base"},
    "dense": {"adapters", "shared_base"},
    "shapes": {"adapters", "loading", "model_files", "ppo_config", "trunk"},
    "preflight": {"loading", "model_files", "shapes"},
    "memory": {"dense", "last_layer", "loading", "logprobs", "ppo_config", "shapes"},
    "stopping": set(),
    "sampling": {"adapters", "batch", "dense", "shared_base", "stopping", "trunk"},
    "vllm_engine": {"adapters", "batch", "dense", "sampling", "shared_base", "stopping"},
    "replies": {"adapters", "data", "dense", "evaluation", "sampling", "shared_base", "stopping"},
    "rollouts": {"adapters", "batch", "dense", "rewards", "sampling", "shared_base", "stopping", "views", "vllm_engine"},
    "experience": {"batch", "callbacks", "ppo_config", "ppo_math", "rewards", "rollouts"},
    "evaluating": {"ppo_math", "rewards", "rollouts"},
    "own_loop": {"batch", "data", "interrupts", "rewards", "stopping"},
    "schedules": {"ppo_config"},
    "loss": {"ppo_config", "ppo_math", "views"},
    "microbatches": set(),
    "passes": {"batch", "microbatches", "rollouts", "views"},
    "ppo_trainer": {"adapters", "batch", "callbacks", "data", "evaluating", "experience", "from_trl", "gates", "kl_control", "launch", "loss"}
    | {"own_loop", "passes", "ppo_config", "ppo_math", "resumable", "rewards", "rollouts", "sampling", "schedules", "shared_base", "vllm_engine"},
    "instruct": {"batch", "loading", "ppo_math", "rewards", "sampling", "shared_base", "trunk"},
    "reward_models": {"data", "evaluation", "loading", "model_files"},
    "export": {"checkpoints", "shared_base"},
    "report": {"model_files", "pictures", "verdict"},
    "data_report": {"data", "data_formats", "evaluation", "model_files"},
    # what leaves a run
    "lineage": {"adapters", "checkpoints", "loading"},
    "chain": {"adapters", "checkpoints", "lineage", "model_files", "report"},
    "card": {"adapters", "chain", "data", "lineage", "report"},
    "page": {"adapters", "card", "diagnosis", "pictures", "report"},
    "compare": {"adapters", "card", "evaluation", "page", "pictures", "report"},
    "hub": {"adapters", "card", "loading"},
    "stages": {"card", "hub", "launch", "lineage", "loading", "page", "ppo_config", "report", "resumable", "vllm_engine"},
    "merge": {"adapters", "batch", "card", "data", "dense", "lineage", "loading", "report", "sampling", "shared_base"},
    # people who ask, and who choose
    "voices": {"adapters", "data", "dense", "lineage", "loading", "ppo_config", "preflight", "sampling", "shared_base", "stopping"},
    "pages": set(),
    "chat_page": {"pages", "voices"},
    "chat": {"chat_page", "pages", "voices"},
    "label_file": set(),
    "label": {"adapters", "checkpoints", "data", "label_file", "ppo_config", "voices"},
    "label_page": {"label", "pages", "voices"},
    # the command line
    "cli": {"adapters", "chain", "chat", "compare", "data_report", "demo", "dense", "diagnosis", "from_trl", "hub", "interrupts", "label_page"}
    | {"loading", "memory", "merge", "ppo_config", "report", "settings", "shapes"},
    "demo": {"cli", "evaluation", "export", "loading", "report"},
}
# A cycle, opened by cli's import of demo at the moment when its command is called.
LATE = {("cli", "demo")}
RECIPES_MAY_IMPORT = {"adapters", "card", "cli", "data", "demo", "dense", "diagnosis", "evaluation", "export", "held_out", "hub", "launch"} | {
    "lineage", "loading", "memory", "page", "ppo_config", "ppo_trainer", "preferences", "preflight", "ranked", "replies", "report", "resumable",
    "reward_models", "sampling", "settings", "shared_base", "stages"
}  # fmt: skip


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node):
    """Every module that is imported below ``node``: full dotted names; ``from a import b`` gives a.b where a is this package."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            found |= {alias.name for alias in inner.names}
        elif isinstance(inner, ast.ImportFrom):
            assert inner.level == 0, "relative import"
            found |= {f"{inner.module}.{alias.name}" for alias in inner.names} if inner.module == "goose_lora" else {inner.module}
    return found


def own(names):
    return {name.split(".")[1] for name in names if name.startswith("goose_lora.")}


def calls(path, *names):
    """(line, name) of each call of a function or method of one of ``names``."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
            if name in names:
                found.append((node.lineno, name))
    return found


def test_the_reader_of_imports_sees_them_all():
    code = "import goose_lora.a\nfrom goose_lora import b\ndef f():\n    from goose_lora.c import d\n    import torch.nn as nn"
    assert own(imports(ast.parse(code))) == {"a", "b", "c"}
    assert "torch.nn" in imports(ast.parse(code))


@pytest.mark.parametrize("name", PACKAGE)
def test_a_module_imports_only_what_it_may(name):
    assert name in MAY_IMPORT, f"say in MAY_IMPORT what goose_lora/{name}.py may import"
    assert own(imports(tree(PACKAGE[name]))) <= MAY_IMPORT[name]


def test_the_table_names_no_module_or_import_that_is_not_there():
    assert MAY_IMPORT.keys() == PACKAGE.keys()
    for name, path in PACKAGE.items():
        assert MAY_IMPORT[name] - own(imports(tree(path))) == set(), name


def test_nobody_imports_what_stands_above_it():
    order = list(MAY_IMPORT)
    for name, allowed in MAY_IMPORT.items():
        for other in allowed:
            assert order.index(other) < order.index(name) or (name, other) in LATE, f"{name} imports {other}"


@pytest.mark.parametrize(("name", "other"), sorted(LATE))
def test_a_late_import_stands_inside_a_function(name, other):
    at_the_top = ast.Module([node for node in tree(PACKAGE[name]).body if not isinstance(node, ast.FunctionDef)], [])
    assert other not in own(imports(at_the_top))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_imports_only_what_recipes_may(name):
    found = imports(tree(RECIPES[name]))
    assert own(found) <= RECIPES_MAY_IMPORT
    assert not any(module.split(".")[0] == "recipes" for module in found)


def test_no_module_imports_a_recipe_or_a_test():
    for name, path in PACKAGE.items():
        assert not {module.split(".")[0] for module in imports(tree(path))} & {"recipes", "tests", "tiny", "reference", "pytest"}, name


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("ppo_math", {"torch", "jaxtyping"}),
        ("logprobs", {"torch", "jaxtyping"}),
        ("batch", {"torch", "jaxtyping"}),
        ("trunk", {"torch"}),
        ("microbatches", {"torch"}),
        ("gates", {"torch", "jaxtyping"}),
        ("rewards", {"torch", "jaxtyping", "goose_lora"}),
        ("kl_control", set()),
    ],
)
def test_a_pure_module_imports_nothing_but_the_standard_library_and_torch(name, allowed):
    outside = {module.split(".")[0] for module in imports(tree(PACKAGE[name]))} - set(sys.stdlib_module_names)
    assert outside <= allowed


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_short(name):
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert lines < (120 if name.startswith("recipes.") else 420), f"{lines} lines: split by topic"


@pytest.mark.parametrize("name", sorted(PACKAGE.keys() - {"cli", "report", "demo"}))
def test_the_library_does_not_print(name):
    assert calls(PACKAGE[name], "print") == []


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_unpickled(name):
    source = tree(FILES[name])
    assert not {module.split(".")[0] for module in imports(source)} & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
    loads = [
        node
        for node in ast.walk(source)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load", "torch.jit.load", "torch.serialization.load")
    ]
    for node in loads:
        safe = [keyword for keyword in node.keywords if keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"]
        assert safe, f"line {node.lineno}: torch.load without weights_only=True"


SWITCHES = {"set_adapter", "set_adapters", "disable_adapter", "disable_adapters", "enable_adapters"} | {
    "disable_adapter_layers", "enable_adapter_layers"
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"goose_lora.shared_base"}))
def test_only_the_shared_base_switches_adapters(name):
    assert calls(FILES[name], *SWITCHES) == []


def test_the_shared_base_switches_adapters_in_one_place():
    source = tree(PACKAGE["shared_base"])
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
            assert not isinstance(node.value, ast.Constant), f"line {node.value.lineno}: device_map={ast.unparse(node.value)}"


def test_nothing_private_of_the_libraries_trainer_is_overridden():
    from transformers import Trainer

    from goose_lora.ppo_trainer import PPOTrainer

    ours = [cls for cls in PPOTrainer.__mro__ if cls.__module__.startswith("goose_lora.")]
    names = {name for cls in ours for name in vars(cls) if name.startswith("_") and not name.startswith("__")}
    assert len(ours) >= 4 and len(names) > 10
    assert {name for name in names if hasattr(Trainer, name)} == set()


def test_each_mutant_stands_in_its_source():
    """`make mutants` takes minutes: a bug whose place is gone is found here."""
    source = ast.parse((ROOT / "tests" / "mutants.py").read_text())
    (listed,) = (node.value for node in source.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MUTANTS")
    files = {"MATH": "ppo_math.py", "CONTROL": "kl_control.py"}
    mutants = [(files[mutant.elts[0].id], mutant.elts[1].value) for mutant in listed.elts]
    sources = {name: (ROOT / "goose_lora" / name).read_text() for name in files.values()}
    assert len(mutants) > 90
    assert not [(name, old) for name, old in mutants if old not in sources[name]]
