"""Reward models of other origin: read with their own tokenizer and template, and refused before
their weights are loaded."""

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from goose_lora.rewards.classifier import ClassifierReward, reward_sources

LETTERS = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz|"]


def save_classifier(folder, *, labels=1, template=None, kind="bert", **changes):
    """A classifier with random weights and one token a letter: no token of it is one of the
    policy's."""
    torch.manual_seed(4)
    shape = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 19,
        "max_position_embeddings": 31,
    }
    config = AutoConfig.for_model(
        kind, vocab_size=len(LETTERS), num_labels=labels, initializer_range=0.5, **shape | changes
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    inner = Tokenizer(
        models.WordLevel({letter: index for index, letter in enumerate(LETTERS)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", chat_template=template
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def loaded(folder, spec="model:{}", **options):
    return ClassifierReward(spec.format(folder), **options).load(tiny.arguments(), torch.device("cpu"))


def by_hand(folder, text, output=0):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([[LETTERS.index(letter) if letter in LETTERS else 1 for letter in text]])
    return model(input_ids=ids).logits[0, output].item()


def test_a_text_is_the_prompt_and_its_completion_in_the_classifiers_own_tokens(tmp_path):
    folder = save_classifier(tmp_path)
    scores = loaded(folder, batch_size=2)(prompts=["ab", "c", "d"], completions=["cde", "x", " fgh"])
    want = [by_hand(folder, text) for text in ("abcde", "cx", "d fgh")]
    assert scores == pytest.approx(want, abs=1e-5)
    assert len({round(score, 3) for score in scores}) == 3


def test_messages_go_through_the_classifiers_own_template(tmp_path):
    folder = save_classifier(
        tmp_path, template="{% for m in messages %}{{ m['role'][0] }}|{{ m['content'] }}|{% endfor %}"
    )
    scores = loaded(folder)(prompts=[[{"role": "user", "content": "hi"}]], completions=["yo"])
    assert scores == pytest.approx([by_hand(folder, "u|hi|a|yo|")], abs=1e-5)


def test_one_label_of_several_can_be_named(tmp_path):
    folder = save_classifier(tmp_path, labels=3)
    assert loaded(folder, "model:{}#LABEL_2")(prompts=["a"], completions=["b"]) == pytest.approx(
        [by_hand(folder, "ab", 2)], abs=1e-5
    )
    with pytest.raises(
        ValueError, match=r"has the labels LABEL_0, LABEL_1, LABEL_2. Name one of them: .*#LABEL_0"
    ):
        ClassifierReward(f"model:{folder}")
    with pytest.raises(ValueError, match="has the labels LABEL_0"):
        ClassifierReward(f"model:{folder}#GOOD")


def test_a_text_that_is_too_long_loses_its_beginning(tmp_path):
    folder = save_classifier(tmp_path)
    assert loaded(folder)(prompts=["x" * 40], completions=["ab"]) == pytest.approx(
        [by_hand(folder, "x" * 29 + "ab")], abs=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "shape", "read"),
    [
        ("roberta", {"pad_token_id": 0}, 30),  # positions begin beyond the padding's
        ("gpt2", {"n_positions": 31, "n_embd": 24, "n_layer": 2, "n_head": 2, "pad_token_id": 0}, 31),
        ("bloom", {"max_position_embeddings": None, "pad_token_id": 0}, 45),  # names no bound
    ],
)
def test_a_text_is_cut_where_this_kind_of_model_ends(tmp_path, kind, shape, read):
    folder, text = save_classifier(tmp_path, kind=kind, **shape), "x" * 43 + "ab"
    model = loaded(folder)
    want = pytest.approx([by_hand(folder, text[-read:])], abs=1e-5)
    assert model(prompts=[text[:-2]], completions=["ab"]) == want
    assert model.score_tokens([model.encode(text[:-2], "ab")]) == want


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("bert", {}), ("gpt2", {"n_positions": 31, "n_embd": 24, "n_layer": 2, "n_head": 2, "pad_token_id": 0})],
)
def test_a_text_scores_as_it_does_alone_whichever_side_its_tokenizer_pads(tmp_path, kind, shape):
    folder = save_classifier(tmp_path, kind=kind, **shape)
    AutoTokenizer.from_pretrained(folder, padding_side="left").save_pretrained(folder)
    texts = ["ab", "cdefghij", "k", "lmnopq"]
    model, want = loaded(folder), pytest.approx([by_hand(folder, text) for text in texts], abs=1e-5)
    assert model(prompts=[text[:1] for text in texts], completions=[text[1:] for text in texts]) == want
    assert model.score_tokens([model.encode(text[:1], text[1:]) for text in texts]) == want


def test_a_text_that_ends_in_the_tokenizers_padding_is_read_to_its_end(tmp_path):
    """As by the model itself, whose configuration has other padding."""
    folder = save_classifier(tmp_path, kind="llama", num_key_value_heads=2, pad_token_id=0)
    AutoTokenizer.from_pretrained(folder, eos_token="|", pad_token="|").save_pretrained(folder)
    scores = loaded(folder)(prompts=["ab", "c"], completions=["cdefg|", "d|"])
    assert scores == pytest.approx([by_hand(folder, "abcdefg|"), by_hand(folder, "cd|")], abs=1e-5)


def test_a_rows_tools_and_template_keywords_are_in_the_text(tmp_path):
    template = (
        "{% for t in tools or [] %}t{{ t['function']['name'] }}|{% endfor %}{{ mood or '' }}"
        "{% for m in messages %}{{ m['role'][0] }}|{{ m['content'] }}|{% endfor %}"
    )
    folder = save_classifier(tmp_path, template=template)
    tool = {"type": "function", "function": {"name": "go", "parameters": {}}}
    model, ask = loaded(folder), [{"role": "user", "content": "hi"}]
    scores = model(
        prompts=[ask, ask],
        completions=["yo", "yo"],
        tools=[[tool], None],
        chat_template_kwargs=[None, {"mood": "z"}],
        label=["a", "b"],
    )
    want = [by_hand(folder, "tgo|u|hi|a|yo|"), by_hand(folder, "zu|hi|a|yo|")]
    assert scores == pytest.approx(want, abs=1e-5)
    ids = [model.encode(ask, "yo", tools=[tool]), model.encode(ask, "yo", mood="z")]
    assert model.score_tokens(ids) == pytest.approx(want, abs=1e-5)


def test_a_decoder_without_a_pad_token_of_its_own_reads_each_rows_last_token(tmp_path):
    folder = save_classifier(tmp_path, kind="llama", num_key_value_heads=2, pad_token_id=0)
    scores = loaded(folder)(prompts=["ab", "c"], completions=["cdefg", "d"])
    assert scores == pytest.approx([by_hand(folder, "abcdefg"), by_hand(folder, "cd")], abs=1e-5)


def test_what_does_not_fit_is_said_before_weights_are_loaded(tmp_path):
    with pytest.raises(
        ValueError, match=r"a reward model is a sequence classifier, and this is LlamaForCausalLM"
    ):
        ClassifierReward(f"model:{tiny.save_base(tmp_path / 'base')}")
    model = ClassifierReward(f"model:{save_classifier(tmp_path / 'bert')}")
    model.check("text")
    with pytest.raises(
        ValueError, match="the prompts are chat messages, and its tokenizer has no chat template"
    ):
        model.check([{"role": "user", "content": "hi"}])
    assert model.model is None


def test_sources_are_the_adapter_functions_and_models(tmp_path):
    folder = save_classifier(tmp_path)
    adapter, function, model = reward_sources(
        ["adapter", f"{__file__}:constant", f"model:{folder}"], has_adapter=True
    )
    assert (
        adapter == "adapter" and function(completions=["a"]) == [1.0] and isinstance(model, ClassifierReward)
    )
    assert model.__name__ == tmp_path.name and model.model is None
    assert reward_sources(None, has_adapter=True) == ["adapter"]
    with pytest.raises(ValueError, match="nothing scores the replies"):
        reward_sources(None, has_adapter=False)
    with pytest.raises(ValueError, match="adapter is named, and there is none"):
        reward_sources([f"{__file__}:constant", "adapter"], has_adapter=False)


def constant(completions, **columns):
    return [1.0] * len(completions)


@pytest.mark.timeout(300)
def test_ppo_trains_on_a_classifier_beside_a_function(tiny_base, tmp_path):
    from recipe_runs import options, recipe

    from goose_lora.files import read_jsonl

    folder = save_classifier(tmp_path / "judge", labels=2)
    data = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompts(16))
    settings = {
        "model_name_or_path": tiny_base,
        "quantization": "none",
        "dtype": "float32",
        "lora_r": 3,
        "lora_layers": "top-2",
    }
    settings |= {
        "per_device_train_batch_size": 8,
        "num_rollouts": 2,
        "num_ppo_epochs": 1,
        "response_length": 4,
        "score_calibration_prompts": 8,
    }
    settings |= {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-2,
    }
    sources = [
        "--reward_function",
        f"model:{folder}#LABEL_1",
        f"{__file__}:constant",
        "--reward_weights",
        "2",
        "0.5",
    ]
    recipe("ppo").main(options(**settings, dataset_name=data, output_dir=tmp_path / "run") + sources)
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "objective/raw_score" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["objective/raw_score"] == pytest.approx(2 * row["reward/judge"] + 0.5, abs=1e-5)
        assert row["reward/judge"] != 0
