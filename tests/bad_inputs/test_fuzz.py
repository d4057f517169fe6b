"""Whatever bytes stand in a file, its reader gives a value of the right kind or a UserError, and
comes to an end."""

import json
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from goose_lora import cli
from goose_lora.data.formats import CONVERSATIONS
from goose_lora.data.rows import DataArguments, load_rows
from goose_lora.errors import UserError
from goose_lora.evaluation.verdict import require_verdict
from goose_lora.files import read_json_object, read_jsonl
from goose_lora.models.arguments import ModelArguments
from goose_lora.models.folders import (
    ADAPTER_CONFIG,
    LINEAGE,
    read_adapter_config,
    read_lineage,
    saved_chat_template,
    tensor_shapes,
)
from goose_lora.ppo.callbacks import RolloutState
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.kl_control import AdaptiveKL, FixedKL
from goose_lora.reporting.run_files import read_metrics

pytestmark = pytest.mark.timeout(120)

numbers = st.integers() | st.floats() | st.sampled_from([10**400, -1, 0, 2**63])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def objects(*names, **sound):
    """Objects with some of ``names`` and values of all kinds; or sound ones of which up to one name
    has another value."""
    anything = st.fixed_dictionaries({}, optional={name: values for name in (*names, *sound)})
    change = st.dictionaries(st.sampled_from([*names, *sound]), scalars | values, max_size=1)
    return change.map(lambda changed: sound | changed) | anything if sound else anything


def as_bytes(content):
    """``content`` as JSON; or cut, joined with noise, or noise alone."""
    text = content.map(lambda value: json.dumps(value).encode())
    cut = st.tuples(text, st.integers(0, 60)).map(lambda pair: pair[0][: pair[1]])
    return st.one_of(
        text, text, text, cut, st.binary(max_size=60), st.tuples(text, st.binary(max_size=6)).map(b"".join)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module", autouse=True)
def rows_are_cached_here(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.delenv("HF_TOKEN", raising=False)
        yield


def answered(read, *arguments, **options):
    """The value that ``read`` gives, or None where it refuses."""
    try:
        return read(*arguments, **options)
    except UserError as error:
        assert str(error).strip(), "an error without a word"
        return None


@settings(max_examples=150, derandomize=True, deadline=None)
@given(content=as_bytes(objects("base", reward_bias=0.5, append_eos=True, reward_references=7)))
def test_lineage_is_a_dictionary_whose_bias_is_a_number_or_refused(content, folder):
    (folder / LINEAGE).write_bytes(content)
    lineage = answered(read_lineage, folder)
    if lineage is not None:
        assert isinstance(lineage, dict) and abs(float(lineage.get("reward_bias", 0))) < float("inf")
        assert isinstance(lineage.get("append_eos", True), bool)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(content=as_bytes(objects(peft_type="LORA", r=3, base_model_name_or_path="org/base")))
def test_an_adapters_configuration_is_that_of_a_lora_or_refused(content, folder):
    (folder / ADAPTER_CONFIG).write_bytes(content)
    (folder / "adapter_model.safetensors").touch()
    config = answered(read_adapter_config, "policy_adapter", str(folder))
    assert config is None or (config["peft_type"] == "LORA" and config["r"] >= 1)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    header=as_bytes(objects("__metadata__", a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})),
    size=st.integers(0, 2**64 - 1) | st.none(),
    body=st.just(bytes(4)) | st.binary(max_size=20),
)
def test_the_head_of_a_safetensors_file_is_read_or_refused(header, size, body, folder):
    path = folder / "some.safetensors"
    path.write_bytes((len(header) if size is None else size).to_bytes(8, "little") + header + body)
    shapes = answered(tensor_shapes, path)
    assert shapes is None or all(
        isinstance(name, str) and isinstance(shape, list) for name, shape in shapes.items()
    )


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    content=as_bytes(
        objects(
            "chat_template",
            "step",
            "objective/kl",
            accuracy=0.8,
            accuracy_ci=[0.4, 0.9],
            n_pairs=9,
            warnings=["a"],
        )
    )
)
def test_what_a_stage_left_is_read_or_refused(content, folder):
    for name in ("verdict.json", "tokenizer_config.json", "metrics.jsonl"):
        (folder / name).write_bytes(content)
    assert isinstance(answered(read_json_object, folder / "verdict.json"), dict | None)
    assert isinstance(answered(saved_chat_template, str(folder)), str | None)
    answered(require_verdict, folder, force=False)
    for read in (read_jsonl, read_metrics):
        rows = answered(read, folder / "metrics.jsonl")
        assert rows is None or all(isinstance(row, dict) for row in rows)


REMEMBERED = ("kl_control_state", *RolloutState.REMEMBERED)
sound_state = {"kl_control_state": {"coef": 0.1}, "score_scale": [0.0, 1.0], "score_moments": None} | {
    "evaluation_scale": None,
    "best_objective": 0.5,
    "evaluations_without_gain": 0,
}


@settings(max_examples=150, derandomize=True, deadline=None)
@given(change=objects(*REMEMBERED), whole=st.booleans(), other=values, adaptive=st.booleans())
def test_the_state_of_a_checkpoint_is_taken_whole_or_refused(change, whole, other, adaptive):
    state = RolloutState(AdaptiveKL(0.2, 6.0, 100) if adaptive else FixedKL(0.2))
    saved = {"attributes": sound_state | change} if whole else other
    taken = SimpleNamespace(global_step=4, stateful_callbacks={"RolloutState": json.loads(json.dumps(saved))})
    try:
        state.on_train_begin(None, taken, None)
    except UserError:
        return
    assert abs(state.kl_control.coef) < float("inf")
    for name in ("score_scale", "evaluation_scale"):
        assert getattr(state, name) is None or [float(number) for number in getattr(state, name)] == list(
            getattr(state, name)
        )
    assert state.evaluations_without_gain + 1 > 0 or state.evaluations_without_gain < 0


def test_a_sound_state_is_taken():
    state = RolloutState(FixedKL(0.2))
    state.on_train_begin(
        None,
        SimpleNamespace(global_step=4, stateful_callbacks={"RolloutState": {"attributes": sound_state}}),
        None,
    )
    # A fixed price is the new setting's, which a resumed run may change
    assert (state.kl_control.coef, state.score_scale, state.best_objective) == (0.2, (0.0, 1.0), 0.5)


# Settings

yaml_text = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "model_name_or_path",
                "lora_r",
                "lora_dropout",
                "lora_layers",
                "dataset_name",
                "column_mapping",
                "max_rows",
                "dtype",
            ]
        ),
        st.sampled_from(
            [": ", ":", " : [", ": {", ": &a [*a, ", ": !!python/name:os.system ", ": |\n ", "\t: "]
        ),
        st.text(alphabet="ab01.-:[]{}&*!|>'\"%@\n\t#~nulltrue", max_size=10) | st.text(max_size=5),
    ).map("".join),
    max_size=5,
).map("\n".join)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    content=yaml_text.map(str.encode)
    | st.binary(max_size=60)
    | objects("env", lora_r=3, dataset_name="x").map(lambda x: yaml.safe_dump(x).encode())
)
def test_a_file_of_settings_is_read_or_refused(content, folder):
    path = folder / "config.yaml"
    path.write_bytes(content)
    required = ["--model_name_or_path", "a", "--dataset_name", "b"]
    parsed = answered(cli.parse, ModelArguments, DataArguments, args=["--config", str(path), *required])
    assert parsed is None or (parsed[0].lora_r >= 1 and isinstance(parsed[0].lora_layers, str))


OWN = [name for name in PPOConfig.__annotations__ if name not in ("trust_remote_code",)]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    change=st.dictionaries(
        st.sampled_from(OWN),
        numbers | st.floats(0, 2) | st.integers(0, 9) | scalars | values,
        min_size=1,
        max_size=2,
    )
)
def test_a_setting_of_ppo_with_any_value_is_taken_or_refused(change, folder):
    path = folder / "ppo.yaml"
    path.write_text(
        yaml.safe_dump({"use_cpu": True, "num_rollouts": 1, "output_dir": str(folder / "out"), **change})
    )
    config = answered(cli.parse, PPOConfig, args=["--config", str(path)])
    assert config is None or (
        config.rollout_batch_size >= 1 and 0 <= config.kl_coef < float("inf") and config.temperature > 0
    )


# Rows

roles = st.sampled_from(["user", "assistant", "x"])
messages = st.lists(
    st.fixed_dictionaries({}, optional={"role": roles | values, "content": st.text() | values}), max_size=2
)
lines = st.lists(
    as_bytes(objects("prompt", "text", "chosen", "rejected") | st.fixed_dictionaries({"messages": messages})),
    max_size=4,
).map(b"\n".join)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(content=lines, stage=st.sampled_from([None, "sft", "reward", "ppo"]))
def test_rows_of_any_bytes_are_read_or_refused(content, stage, folder):
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    rows = answered(load_rows, str(path), stage=stage)
    assert rows is None or len(rows) > 0
    if rows is not None and stage == "sft" and "messages" in rows.column_names:
        assert set(CONVERSATIONS.columns) <= set(rows.column_names)
