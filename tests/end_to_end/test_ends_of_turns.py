"""A chat model whose turn ends in a token that is not the tokenizer's EOS, from fine-tuning to the
merged model: each stage ends replies where the template does."""

import io
import json

import pytest
import tiny
from recipe_runs import options, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from goose_lora.apps.chat import chat
from goose_lora.apps.label import open_queue
from goose_lora.apps.session import PolicySession, inspect_run
from goose_lora.files import read_json, read_jsonl
from goose_lora.sharing.export_programs import export
from goose_lora.sharing.merge import merge

# Turns close with a token of their own, and the tokenizer's EOS is never written
TEMPLATE = (
    "{% for m in messages %}<turn> {{ m['role'] }} : {{ m['content'] }} <over>{% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant :{% endif %}"
)
ROLES = ["<turn>", "<over>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and all stages on it."""
    folder = tmp_path_factory.mktemp("chain")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(ROLES, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 66, "head_dim": 22, "intermediate_size": 64}
    model = tiny.base(vocab_size=len(tokenizer), **sizes)
    model.generation_config = GenerationConfig(eos_token_id=tiny.EOS)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    ask = [tiny.user("ba de")]
    rows = {
        "sft": {"messages": [*ask, tiny.assistant("good")]},
        "pairs": {
            "prompt": ask,
            "chosen": [tiny.assistant("good")],
            "rejected": [tiny.assistant("ba bo")],
        },
        "prompts": {"prompt": ask},
    }
    files = {name: tiny.write_rows(folder / f"{name}.jsonl", [row] * 16) for name, row in rows.items()}
    base = {"model_name_or_path": folder / "base", "quantization": "none", "dtype": "float32"}
    base |= {"lora_r": 3, "lora_alpha": 6}
    tuned = base | {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    tuned |= {"per_device_train_batch_size": 8, "save_strategy": "no", "learning_rate": 3e-2}
    steps = {"gradient_checkpointing": False, "max_steps": 40}
    recipe("sft").main(options(**tuned, **steps, dataset_name=files["sft"], output_dir=folder / "sft"))
    recipe("reward").main(
        options(
            **tuned,
            **steps | {"max_steps": 4},
            dataset_name=files["pairs"],
            eval_dataset_name=files["pairs"],
            output_dir=folder / "reward",
        )
    )
    ppo = {"num_rollouts": 1, "num_ppo_epochs": 1, "response_length": 6, "score_normalization": "none"}
    roles = {"policy_adapter": folder / "sft", "reward_adapter": folder / "reward"}
    recipe("ppo").main(
        options(
            **tuned | {"learning_rate": 1e-4},
            **ppo,
            **roles,
            dataset_name=files["prompts"],
            output_dir=folder / "ppo",
        )
    )
    recipe("evaluate").main(
        options(
            **base,
            policy_adapter=folder / "ppo",
            sft_adapter=folder / "sft",
            reward_adapter=folder / "reward",
            dataset_name=files["prompts"],
            response_length=6,
            output_dir=folder / "evaluation",
        )
    )
    merge(folder / "ppo", folder / "merged")
    return folder


def test_sft_teaches_the_end_of_the_turn_and_rollouts_end_there(folder):
    row = next(row for row in read_jsonl(folder / "ppo" / "metrics.jsonl") if "rollout/eos_rate" in row)
    assert row["rollout/eos_rate"] > 0.9 and row["rollout/response_tokens"] < 4


def test_evaluated_replies_end_there_too(folder):
    figures = dict(_flat(read_json(folder / "evaluation" / "evaluation.json")))
    rates = [value for name, value in figures.items() if name.endswith((".ppo.ended", ".sft.ended"))]
    assert len(rates) == 2 and min(rates) > 0.9


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "merged"])
def test_each_folder_has_the_tokenizer_that_ends_there(folder, stage):
    over = AutoTokenizer.from_pretrained(folder / "base").convert_tokens_to_ids("<over>")
    noted = json.dumps(read_json(folder / stage / "goose_lora.json"))
    assert "<over>" in noted or str(over) in noted


def test_the_merged_model_generates_to_the_end_of_the_turn(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype="float32")
    asked = tokenizer.apply_chat_template(
        [tiny.user("ba de")], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**asked, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(out[0, asked["input_ids"].shape[1] :]) == "good <over>"


def test_chat_answers_to_the_end_of_the_turn(folder, capsys, monkeypatch):
    """A line of a pipe is a conversation; both roles say what they were taught, and are not cut."""
    monkeypatch.setattr("sys.stdin", io.StringIO("ba de\n"))
    chat(str(folder / "ppo"), roles=["sft", "ppo"], temperature=0)
    printed = capsys.readouterr().out
    assert printed.count("good") == 2
    assert printed.count("ended") == 2 and "cut off" not in printed and "<over>" not in printed


def test_replies_to_label_are_those_of_such_a_session(folder, tmp_path):
    """A labeler sees whether a reply ended, and not the token that ended it."""
    session = PolicySession(inspect_run(folder / "ppo"))
    replies = session.reply("ppo", [tiny.user("ba de")], seed=0, count=16)
    assert sum(reply.ended for reply in replies) >= 14
    assert {reply.text for reply in replies if reply.ended and reply.tokens == 2} == {"good"}
    # Hot enough for two that differ, cut or ended
    asked = tiny.write_rows(tmp_path / "asked.jsonl", [{"prompt": [tiny.user("ba de")]}])
    queue = open_queue(folder / "ppo", str(asked), tmp_path / "out.jsonl", candidates=32, temperature=4.0)
    pair = queue.next("me")
    assert pair is not None and "<over>" not in pair.left.text + pair.right.text


def test_ollama_is_told_the_end_of_the_turn(folder, tmp_path):
    export(folder / "ppo", tmp_path / "out", to="ollama")
    written = (tmp_path / "out" / "Modelfile").read_text()
    assert 'PARAMETER stop "<over>"' in written and "{{ .Content }} <over>" in written


def _flat(figures, name=""):
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.{key}")
        elif isinstance(value, float):
            yield f"{name}.{key}", value
