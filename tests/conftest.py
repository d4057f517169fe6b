"""What every test needs before it imports anything: one thread, no network, no GPU but for the
tests of one, and shapes checked."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# Before the first import of the module: the hook adds the checks of shapes to its functions as it
# is loaded.
jaxtyping.install_import_hook("goose_lora.functional", "beartype.beartype")

# No database: with derandomize nothing is replayed from it.
settings.register_profile("dev", max_examples=25, derandomize=True, deadline=None, database=None)
settings.register_profile("ci", max_examples=60, derandomize=True, deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help=(
            "all cells of the matrix, 240 drawn combinations of settings, more kills, accelerate's launcher,"
            " a step's time to 15 %"
        ),
    )


def pytest_configure(config: pytest.Config) -> None:
    # Tests make their tensors on the CPU, and recipes and commands take a GPU that they find. Only
    # -m gpu, so spelt, shows them one, and no more.
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = seen if config.option.markexpr == "gpu" else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and -m gpu"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama and its tokenizer; tests read it and leave it as it is."""
    import tiny

    return tiny.save_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def adapter_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny nf4 chain, ``base``, ``sft``, ``reward`` and ``ppo``, as
    ``tiny_chain.build`` makes it; tests leave it as it is."""
    import tiny_chain

    return tiny_chain.build(tmp_path_factory.mktemp("chain"))
