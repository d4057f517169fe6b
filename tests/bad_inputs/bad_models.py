"""Bad models, tokenizers, adapters, reward functions and paths to them."""

import json

import tiny
from bad_case import LEFT_OUT, Case, edited, json_edited, own_copy, path_to, rows, without
from peft import get_peft_model
from safetensors.torch import load_file, save_file


def _tensors(folder_name, edit):
    def change(folder):
        path = own_copy(folder, folder_name) / "adapter_model.safetensors"
        save_file(edit(load_file(path)), path)
        return {}

    return change


def _wider(tensors):
    return {name: tensor.repeat(2, 2) for name, tensor in tensors.items()}


def _without_head(tensors):
    return {name: tensor for name, tensor in tensors.items() if "score" not in name}


def _of_another_width(folder):
    base = tiny.base(hidden_size=66, head_dim=22)
    base.name_or_path = "org/base"
    get_peft_model(base, tiny.lora(base, layers="top-2")).save_pretrained(folder / "wide")
    return {"policy_adapter": str(folder / "wide")}


def _of_another_family(folder):
    base = tiny.base("gpt2")
    base.name_or_path = "org/base"
    get_peft_model(base, tiny.lora(base, layers="top-2")).save_pretrained(folder / "gpt2")
    return {"policy_adapter": str(folder / "gpt2")}


def _base(edit):
    """``edit`` changes a copy of the base's folder."""

    def change(folder):
        edit(own_copy(folder, "base"))
        return {}

    return change


def _pickled_base(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _no_eos(path):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(path)


def _no_pad(path):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    inner = json.loads(tokenizer._tokenizer.to_str())
    inner["model"]["vocab"]["<one>"] = inner["model"]["vocab"].pop("<pad>")
    inner["added_tokens"] = [token for token in inner["added_tokens"] if token["content"] != "<pad>"]
    (path / "tokenizer.json").write_text(json.dumps(inner))
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def _more_tokens(path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<new{number}>" for number in range(9)])
    tokenizer.save_pretrained(path)


def _custom_code(path):
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "own_kind",
        "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.OwnModel"},
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text(f"open({str(path / 'ran')!r}, 'w')\n")


def _bin_adapter(folder_name):
    def change(folder):
        path = own_copy(folder, folder_name)
        (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
        return {}

    return change


def _reward(content, setting="reward_function"):
    """``setting`` names the function ``reward`` of a new file."""

    def change(folder):
        (folder / "own.py").write_text(content)
        spec = f"{folder}/own.py:reward"
        return {setting: [spec] if setting == "reward_function" else spec}

    return change


# What a function does when it is called on one reply: a name, its code, and words of the error.
GIVEN = "def reward(prompts, completions, **columns): "
STRANGERS = [
    (
        "takes other names",
        "def reward(prompt, reply): return [1.0]",
        ("cannot be called", "prompts, completions"),
    ),
    (
        "takes one text",
        "def reward(text): return 1.0",
        ("cannot be called", "prompts, completions, **columns"),
    ),
    ("wants a column that is not there", GIVEN.replace("**", "answer, **") + "return [1.0]", ("'answer'",)),
    ("is a class", "class reward: pass", ("cannot be called", "prompts, completions")),
    ("leaves when called", "import sys\n" + GIVEN + "sys.exit(0)", ("raised SystemExit (own.py, line 2)",)),
    ("is closed", GIVEN + "raise GeneratorExit", ("raised GeneratorExit (own.py, line 1)",)),
    (
        "is cancelled",
        "import asyncio\nasync " + GIVEN + "raise asyncio.CancelledError",
        ("raised CancelledError (own.py, line 2)",),
    ),
    (
        "raises what cannot be shown",
        "class Mute(Exception):\n  def __str__(self): raise OSError\n" + GIVEN + "raise Mute",
        ("raised Mute (own.py, line 3)", "whose text cannot be had"),
    ),
    ("divides by zero", GIVEN + "return [1 / 0]", ("raised ZeroDivisionError (own.py, line 1)", "division")),
    ("returns nothing", GIVEN + "pass", ("returned NoneType for 1 replies", "one number (or None) a reply")),
    ("returns one number for all", GIVEN + "return 1.0", ("returned float for 1 replies", "one number")),
    ("returns two for one", GIVEN + "return [1.0, 2.0]", ("returned 2 numbers for 1 replies", "one number")),
    ("returns text", GIVEN + "return ['good']", ("no number for reply 0: good",)),
    ("returns 10**400", GIVEN + "return [10**400]", ("too large for reply 0",)),
    ("returns NaN", GIVEN + "return [float('nan')]", ("returned nan for reply 0",)),
    ("returns infinity", GIVEN + "return [float('inf')]", ("returned inf for reply 0",)),
    (
        "looks for a file where it went",
        "import os\n" + GIVEN + "os.chdir('/'); return [float(open('no.txt').read())]",
        ("raised FileNotFoundError (own.py, line 2)", "no.txt"),
    ),
    ("returns more than tokens", GIVEN + "return [[1.0] * 9]", ("returned 9 numbers for the",)),
]
ONLY_OF_COLUMNS = ("wants a column that is not there", "returns more than tokens", "takes one text")


def _classifier(folder):
    return {"reward_function": [f"model:{folder}/base"]}


OTHER_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"


def _other_template(folder):
    edited("reward", "chat_template.jinja", OTHER_TEMPLATE)(folder)
    rows = [{"prompt": [{"role": "user", "content": "ba be"}]}] * 4
    return {"dataset_name": tiny.write_rows(folder / "chat.jsonl", rows)}


CASES = [
    # Base and tokenizer
    Case(
        "a base that is not there",
        "ppo",
        path_to("model_name_or_path", "none"),
        ("none: no such folder", "Check the path, or give a name on the Hub"),
    ),
    Case(
        "a base that is a file",
        "sft",
        path_to("model_name_or_path", "prompts.jsonl"),
        ("a file, not a model", "Give the folder that holds its config.json"),
    ),
    Case(
        "a base that is an adapter",
        "ppo",
        path_to("model_name_or_path", "sft"),
        ("sft: has no config.json", "It is an adapter", "policy_adapter"),
    ),
    Case(
        "a Hub model offline",
        "ppo",
        {"model_name_or_path": "org/base"},
        ("org/base: not a folder here", "HF_HUB_OFFLINE=1", "unset it"),
    ),
    Case(
        "a Hub name of wrong form",
        "sft",
        {"model_name_or_path": "org/a/b"},
        ("org/a/b: no such folder", "such as org/model"),
    ),
    Case(
        "config.json that is no JSON",
        "ppo",
        edited("base", "config.json", "{"),
        ("base", "cannot be read", "Save or download it again"),
    ),
    Case(
        "config.json of an unknown kind",
        "sft",
        json_edited("base", "config.json", model_type="own_kind"),
        ("base: its configuration cannot be read", "own_kind", "update transformers"),
    ),
    Case(
        "an encoder",
        "sft",
        json_edited("base", "config.json", model_type="t5"),
        ("t5 is not a causal language model", "Use one that"),
    ),
    Case(
        "no weights",
        "sft",
        without("base", "model.safetensors"),
        ("has no weights in safetensors", "Download or save it again"),
    ),
    Case(
        "weights that are a pickle",
        "reward",
        _base(_pickled_base),
        ("only pytorch_model.bin, a pickle", "Convert it where you trust it"),
    ),
    Case(
        "weights cut short",
        "ppo",
        edited("base", "model.safetensors", lambda b: b[: len(b) // 2]),
        ("model.safetensors", "cut short", "again"),
    ),
    Case(
        "a tokenizer that is not there",
        "sft",
        without("base", "tokenizer.json", "tokenizer_config.json"),
        ("base", "tokenizer", "again"),
    ),
    Case(
        "tokenizer.json that is broken",
        "sft",
        edited("base", "tokenizer.json", "{"),
        ("base: the tokenizer cannot be read", "Save or download it again"),
    ),
    Case(
        "a tokenizer without EOS",
        "sft",
        _base(_no_eos),
        ("the tokenizer has no EOS token", "tokenizer_config.json"),
    ),
    Case(
        "a tokenizer without pad or a spare token",
        "sft",
        _base(_no_pad),
        ("no unused token was found", "Set pad_token in its tokenizer_config.json"),
    ),
    Case(
        "a tokenizer larger than the model",
        "sft",
        _base(_more_tokens),
        ("the tokenizer has 70 tokens and the model 61", "the model came with"),
    ),
    Case(
        "code from the model's folder",
        "sft",
        _base(_custom_code),
        ("needs Python code of its own repository", "set trust_remote_code: true"),
    ),
    Case(
        "replies beyond the context",
        "ppo",
        {"response_length": 125},
        ("make 130 tokens", "context of 127", "Lower max_prompt_tokens or response_length"),
    ),
    Case(
        "replies beyond the context, evaluation",
        "evaluate",
        {"response_length": 125},
        ("context of 127", "Lower max_prompt_tokens"),
    ),
    # Adapters
    Case(
        "a policy that is not there",
        "ppo",
        path_to("policy_adapter", "none"),
        ("policy_adapter", "has no adapter_config.json", "Give the output_dir"),
    ),
    Case(
        "a policy that is a file",
        "evaluate",
        path_to("policy_adapter", "prompts.jsonl"),
        ("policy_adapter", "is a file", "Give the folder"),
    ),
    Case(
        "a reward model not finished",
        "ppo",
        without("reward", "adapter_model.safetensors"),
        ("reward_adapter", "run to its end"),
    ),
    Case(
        "an adapter that is a pickle",
        "ppo",
        _bin_adapter("sft"),
        ("only adapter_model.bin, a pickle", "Convert it where you trust it"),
    ),
    Case(
        "a reward adapter that is a pickle",
        "evaluate",
        _bin_adapter("reward"),
        ("only adapter_model.bin, a pickle", "Convert it"),
    ),
    Case(
        "adapter_config.json that is no JSON",
        "ppo",
        edited("sft", "adapter_config.json", "{"),
        ("adapter_config.json: not JSON", "train the stage again"),
    ),
    Case(
        "adapter_config.json that is a list",
        "ppo",
        edited("sft", "adapter_config.json", "[]"),
        ("a JSON list, expected an object", "again"),
    ),
    Case(
        "adapter_config.json not UTF-8",
        "ppo",
        edited("sft", "adapter_config.json", b"\xff"),
        ("adapter_config.json: not JSON", "again"),
    ),
    Case(
        "an adapter without a rank",
        "ppo",
        json_edited("sft", "adapter_config.json", r=LEFT_OUT),
        ("r=None", "Copy the folder again"),
    ),
    Case(
        "an adapter that is no LoRA",
        "ppo",
        json_edited("sft", "adapter_config.json", peft_type="IA3"),
        ("is a IA3 adapter", "the roles of a shared base are LoRA adapters"),
    ),
    Case(
        "an adapter of another name",
        "ppo",
        json_edited("reward", "adapter_config.json", base_model_name_or_path="org/other"),
        ("was trained on org/other", "All stages share one base"),
    ),
    Case(
        "an adapter of another width",
        "ppo",
        _of_another_width,
        ("does not fit", "where the base has", "trained on this base model"),
    ),
    Case(
        "an adapter of another family",
        "ppo",
        _of_another_family,
        ("does not fit", "a module that the base does not have", "trained on this base model"),
    ),
    Case(
        "an adapter cut short",
        "ppo",
        edited("sft", "adapter_model.safetensors", lambda b: b[:-100]),
        ("damaged or cut short", "Copy it again"),
    ),
    Case(
        "an adapter that is empty",
        "ppo",
        edited("sft", "adapter_model.safetensors", b""),
        ("damaged or cut short", "Copy it again"),
    ),
    Case(
        "an adapter of wrong shapes",
        "evaluate",
        _tensors("sft", _wider),
        ("does not fit", "of shape", "trained on this base model"),
    ),
    Case(
        "a reward adapter without its head",
        "ppo",
        _tensors("reward", _without_head),
        ("has no score head", "Train it with recipes/reward.py"),
    ),
    Case(
        "a policy as the reward model",
        "ppo",
        path_to("reward_adapter", "sft"),
        ("has no score head", "Train it with recipes/reward.py"),
    ),
    Case(
        "lineage that is no JSON",
        "ppo",
        edited("reward", "goose_lora.json", "{"),
        ("goose_lora.json: not JSON", "train the stage again"),
    ),
    Case(
        "lineage with a bias that is text",
        "ppo",
        edited("reward", "goose_lora.json", '{"reward_bias": "0.5"}'),
        ("reward_bias='0.5'", "Train the stage again"),
    ),
    Case(
        "a verdict that is chance",
        "ppo",
        edited("reward", "verdict.json", '{"accuracy": 0.5, "accuracy_ci": [0.4, 0.6], "n_pairs": 9}'),
        ("may be chance", "force: true"),
    ),
    Case(
        "a verdict that is none",
        "ppo",
        edited("reward", "verdict.json", '{"accuracy": 0.9}'),
        ("verdict.json: no verdict", "or delete the file"),
    ),
    Case(
        "another chat template",
        "ppo",
        _other_template,
        ("was trained with another chat template", "Train both with one template"),
    ),
    # Rewards
    Case(
        "nothing that scores",
        "ppo",
        {"reward_adapter": LEFT_OUT},
        ("nothing scores the replies", "set reward_adapter"),
    ),
    Case(
        "a reward of wrong form",
        "ppo",
        {"reward_function": ["my_reward"]},
        ("there is no colon", 'Accepted: "module:function"'),
    ),
    Case(
        "a reward module that is not there",
        "ppo",
        {"reward_function": ["no_such_thing:f"]},
        ("no module 'no_such_thing'", "Accepted"),
    ),
    Case(
        "a reward file that is not there",
        "ppo",
        {"reward_function": ["no/such.py:f"]},
        ("there is no file 'no/such.py'", "Accepted"),
    ),
    Case(
        "a reward module that does not parse",
        "ppo",
        _reward("def reward(:\n"),
        ("failed with SyntaxError", "Mend it"),
    ),
    Case(
        "a reward module that raises", "ppo", _reward("1 / 0\n"), ("failed with ZeroDivisionError", "Mend it")
    ),
    Case(
        "a reward module that leaves",
        "ppo",
        _reward("import sys\nsys.exit(0)\n"),
        ("failed with SystemExit", "Mend it"),
    ),
    Case(
        "a reward module that needs more",
        "ppo",
        _reward("import no_such_dependency\n"),
        ("ModuleNotFoundError", "install what it imports"),
    ),
    Case(
        "a reward that is not in it",
        "ppo",
        _reward("def rewards(): pass\n"),
        ("has no 'reward'; the nearest name is 'rewards'",),
    ),
    Case(
        "a reward that cannot be called",
        "ppo",
        _reward("reward = 3\n"),
        ("not callable but of type int", "Accepted"),
    ),
    *(
        Case(f"a reward that {what}", "ppo", _reward(f"{code}\n"), ("the reward function reward", *says))
        for what, code, says in STRANGERS
    ),
    *(
        Case(f"a {setting} that {what}", recipe, _reward(f"{code}\n", setting), ("function reward", *says))
        for setting, recipe in (("judge", "evaluate"), ("rating", "own_loop"))
        for what, code, says in STRANGERS
        if what not in ONLY_OF_COLUMNS
    ),
    Case(
        "a reward that is a method, and a column self",
        "ppo",
        lambda folder: (
            _reward(
                "class Judge:\n  def reward(self, prompts, **rest): return [1.0]\nreward = Judge().reward\n"
            )(folder)
            | rows(*[{"prompt": "ba", "self": 1}] * 4)(folder)
        ),
        (
            "the reward function reward cannot be called",
            "multiple values for argument 'self'",
            "column_mapping",
        ),
    ),
    Case(
        "a judge that is not there",
        "evaluate",
        {"judge": "math:sqrd"},
        ("has no 'sqrd'; the nearest name is 'sqrt'",),
    ),
    Case(
        "a judge behind a server that is not there",
        "evaluate",
        {"judge": "openai:m", "judge_base_url": "http://127.0.0.1:9/v1"},
        ("openai:m at http://127.0.0.1:9/v1 cannot be reached", "mend judge_base_url"),
    ),
    Case(
        "an address of a judge, and no such judge",
        "evaluate",
        {"judge_base_url": "http://127.0.0.1:9/v1"},
        ("judge_base_url=http://127.0.0.1:9/v1", "Set judge: openai:MODEL"),
    ),
    Case(
        "an address of a judge with a password",
        "evaluate",
        {"judge": "openai:m", "judge_base_url": "http://me:word@127.0.0.1:9/v1"},
        ("judge_base_url: has more than a server and a path", "OPENAI_API_KEY"),
    ),
    Case(
        "a rubric that is not there",
        "evaluate",
        {"judge": "openai:m", "judge_base_url": "http://127.0.0.1:9/v1", "judge_rubric": "none.txt"},
        ("judge_rubric: none.txt cannot be read", "the package's own rubric"),
    ),
    Case(
        "a reward by a judge that has one reply a prompt",
        "ppo",
        {"reward_function": "openai:m", "judge_base_url": "http://127.0.0.1:9/v1"},
        ("m compares the replies to a prompt with one another", "Set num_generations: 2 or more"),
    ),
    Case(
        "a reward by a judge that is not there",
        "ppo",
        {"reward_function": "openai:m", "judge_base_url": "http://127.0.0.1:9/v1", "num_generations": 2},
        ("openai:m at http://127.0.0.1:9/v1 cannot be reached", "mend judge_base_url"),
    ),
    Case(
        "an address of a judge, and no such reward",
        "ppo",
        {"judge_base_url": "http://127.0.0.1:9/v1"},
        ("judge_base_url=http://127.0.0.1:9/v1", "Set reward_function: openai:MODEL"),
    ),
    Case("a rating of wrong form", "own_loop", {"rating": "math"}, ("there is no colon", "Accepted")),
    Case(
        "too many weights",
        "ppo",
        {"reward_weights": [1.0, 0.5]},
        ("2 weights for 1 sources of reward (adapter)", "give one to each"),
    ),
    Case(
        "weights that are NaN",
        "ppo",
        {"reward_weights": [float("nan")]},
        ("reward_weights=nan", "must be a finite number"),
    ),
    Case(
        "weights that are words",
        "ppo",
        {"reward_weights": ["much"]},
        ("reward_weights: ['much'] is not a list of numbers",),
    ),
    Case(
        "a reward model that is no classifier",
        "ppo",
        _classifier,
        ("a reward model is a sequence classifier", "LlamaForCausalLM", "saved with its score head"),
    ),
    Case(
        "a reward model that is not there",
        "ppo",
        {"reward_function": ["model:./none"]},
        ("./none: no such folder", "Check the path"),
    ),
    Case(
        "a critic from no reward adapter",
        "ppo",
        {"critic": "reward_features", "reward_adapter": LEFT_OUT, "reward_function": ["math:sqrt"]},
        ("there is no reward adapter", "Use adapter or shared"),
    ),
    Case(
        "a critic that starts from nothing",
        "ppo",
        {"critic": "shared", "critic_init": "policy"},
        ("critic_init: policy", "Possible: zero"),
    ),
]
