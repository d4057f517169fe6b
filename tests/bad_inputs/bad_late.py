"""Settings that transformers, TRL and torch would take, and stumble over once the model is there;
and settings that YAML or argparse would read otherwise than they are meant."""

from bad_case import Case, file, json_edited

TOO_LARGE, TOO_SMALL = "is too large for the arithmetic", "is too small for the arithmetic"


def setting(recipe, name, value, *says):
    return Case(f"late: {recipe}, {name} {str(value)[:40]}", recipe, {name: value}, says)


def line(name, *words, says):
    return Case(f"line: {name}", "sft", {}, says, words)


def yaml(name, text, *says):
    """A file of settings of its own; what it lacks stands on the command line."""
    config = f"{name.replace(' ', '-')}.yaml"
    words = ("--config", f"{{folder}}/{config}", "--model_name_or_path", "{folder}/base", "--dataset_name")
    words += (
        "{folder}/texts.jsonl",
        "--output_dir",
        "{folder}/output",
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    )
    return Case(f"YAML: {name}", "sft", file(config, text), says, words)


def config_of_base(name, says, **changes):
    return Case(f"base: {name}", "sft", json_edited("base", "config.json", **changes), says)


CASES = [
    # What a stage would pass over, though training or a checkpoint depends on it
    setting("sft", "bf16_full_eval", True, "bf16_full_eval=True", "adapters stay in float32", "Leave it out"),
    setting("ppo", "fp16_full_eval", True, "fp16_full_eval=True", "adapters stay in float32", "Leave it out"),
    setting(
        "reward", "save_only_model", True, "save_only_model=True", "no run could go on", "save_total_limit"
    ),
    setting("sft", "ignore_data_skip", True, "ignore_data_skip=True", "the same rows again", "Leave it out"),
    setting("reward", "label_names", ["x"], "label_names=['x']", "names its labels itself", "Leave it out"),
    setting("sft", "dataset_kwargs", {"a": 1}, "dataset_kwargs={'a': 1}", "prepares the rows itself"),
    setting("ppo", "fsdp_config", "none.json", "fsdp_config=none.json", "with fsdp alone", "leave it out"),
    setting("sft", "fsdp_config", {"a": 1}, "fsdp_config={'a': 1", "with fsdp alone", "leave it out"),
    setting(
        "sft", "dataloader_multiprocessing_context", "spawn", "context=spawn", "dataloader_num_workers to"
    ),
    setting("reward", "dataloader_multiprocessing_context", "x", "context: 'x' is none of fork, spawn"),
    setting(
        "ppo", "label_smoothing_factor", 0.1, "label_smoothing_factor=0.1", "fine-tuning", "Leave it out"
    ),
    setting("reward", "label_smoothing_factor", 0.1, "label_smoothing_factor=0.1", "fine-tuning", "margins"),
    setting("ppo", "neftune_noise_alpha", 5.0, "neftune_noise_alpha=5.0", "have no noise", "Leave it out"),
    setting(
        "own_loop", "auto_find_batch_size", True, "auto_find_batch_size=True", "halves a microbatch itself"
    ),
    setting("ppo", "warmup_steps", 10, "warmup_steps=10", "no warm-up", "constant_with_warmup"),
    setting("ppo", "warmup_steps", 0.1, "warmup_steps=0.1", "no warm-up", "constant_with_warmup"),
    setting("ppo", "debug", "underflow_overflow", "debug=underflow_overflow", "Leave it out"),
    setting("sft", "debug", True, "debug=True: is none of underflow_overflow"),
    setting("reward", "debug", 3, "debug=3: is none of underflow_overflow"),
    setting("ppo", "debug", ["nope"], "debug=['nope']: is none of", "leave it out"),
    setting("ppo", "train_sampling_strategy", "x", "train_sampling_strategy: 'x' is none of random"),
    setting("sft", "train_sampling_strategy", "x", "train_sampling_strategy: 'x' is none of random"),
    setting(
        "ppo",
        "train_sampling_strategy",
        "sequential",
        "=sequential: rollouts draw their prompts at random",
        "Leave it out",
    ),
    setting("sft", "packing_strategy", "x", "packing_strategy: 'x' is none of bfd"),
    setting("sft", "ddp_backend", "x", "ddp_backend: 'x' is none of nccl, gloo"),
    setting("reward", "eval_accumulation_steps", 0, "eval_accumulation_steps=0", "must be above 0"),
    setting(
        "sft",
        "accelerator_config",
        {"gradient_accumulation_kwargs": {"num_steps": 3}},
        "num_steps=3: here it is gradient_accumulation_steps: 3",
    ),
    setting("ppo", "accelerator_config", {"split_batches": True}, "split_batches: true", "Leave it out"),
    setting("sft", "model_revision", "v1", "model_revision=v1", "is no model of the Hub", "Leave it out"),
    setting("evaluate", "dataset_split", "dev", "dataset_split=dev", "has no splits", "Leave it out"),
    setting("reward", "eval_dataset_split", "dev", "eval_dataset_split=dev", "has no splits", "Leave it out"),
    setting(
        "ppo", "dataset_config", "main", "dataset_config=main", "is no dataset of the Hub", "Leave it out"
    ),
    setting("sft", "data_dir", "d", "data_dir=d", "is no dataset of the Hub", "Leave it out"),
    setting("own_loop", "dataset_revision", "v1", "dataset_revision=v1", "no dataset of the Hub"),
    *(
        setting(recipe, name, ending.rjust(300, "x"), f"{name}=", "takes so long a name. Shorten it.")
        for recipe, name, ending in (
            ("sft", "output_dir", "y"),
            ("ppo", "policy_adapter", "/sft"),
            ("reward", "dataset_name", ".jsonl"),
            ("evaluate", "model_name_or_path", "/base"),
        )
    ),
    # Trackers
    setting("sft", "report_to", "wandb", "report_to: wandb is not installed", "report_to: none"),
    setting("ppo", "report_to", ["tensorboard", "mlflow"], "report_to: mlflow is not installed", "none"),
    setting("reward", "report_to", "wanbd", "report_to: 'wanbd' is no tracker", "Did you mean wandb?"),
    setting("sft", "report_to", "zzz", "report_to: 'zzz' is no tracker", "There are", "tensorboard"),
    # Optimizers and schedules
    setting("sft", "adam_beta1", 1.0, "adam_beta1=1.0", "below 1; 0.9 and 0.999 are usual"),
    setting("ppo", "adam_beta2", -0.1, "adam_beta2=-0.1", "below 1; 0.9 and 0.999 are usual"),
    setting("sft", "adam_epsilon", 0.0, "adam_epsilon=0.0", "must be above 0"),
    setting("sft", "optim", "galore_adamw", "optim: galore_adamw cannot be had", "install"),
    setting("ppo", "optim", "lomo", "optim: lomo cannot be had", "lomo"),
    setting("sft", "optim", "schedule_free_adamw", "optim: schedule_free_adamw cannot be had", "install"),
    setting("sft", "optim_args", "fast", "optim:", "cannot be had"),
    setting("sft", "lr_scheduler_type", "linearr", "'linearr' is none of the values", "Near it: linear"),
    setting("sft", "lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler_kwargs=None", "min_lr"),
    setting("sft", "lr_scheduler_kwargs", {"min": 1}, "lr_scheduler_kwargs={'min': 1}", "linear", "min"),
    setting("sft", "lr_scheduler_type", "reduce_lr_on_plateau", "reduce_lr_on_plateau", "eval"),
    # Numbers that float32 and counts of 64 bits do not have
    setting("ppo", "temperature", 1e-300, "temperature=1e-300", TOO_SMALL),
    setting("evaluate", "temperature", 1e-300, "temperature=1e-300", TOO_SMALL),
    setting("ppo", "temperature", 1e300, "temperature=1e+300", TOO_LARGE),
    setting("ppo", "kl_coef", 1e300, "kl_coef=1e+300", TOO_LARGE),
    setting("sft", "weight_decay", 1e39, "weight_decay=1e+39", TOO_LARGE),
    setting("sft", "learning_rate", 1e-45, "learning_rate=1e-45", TOO_SMALL),
    setting("sft", "num_train_epochs", 1e300, "num_train_epochs=1e+300", TOO_LARGE),
    setting("ppo", "reward_timeout", 1e300, "reward_timeout=1e+300", TOO_LARGE),
    setting("sft", "max_steps", 2**62, "max_steps=4611686018427387904", "too large"),
    setting("sft", "lora_alpha", 2**70, "lora_alpha=1180591620717411303424", "too large"),
    setting("sft", "lora_r", 2**40, "lora_r=1099511627776", "16 is usual"),
    setting("ppo", "response_length", 2**62, "response_length=4611686018427387904", "too large"),
    setting("evaluate", "seed", -1, "seed=-1", "must not be negative"),
    setting("evaluate", "seed", 2**40, "seed=1099511627776", "at most 4294967295"),
    setting("sft", "data_seed", -1, "data_seed=-1", "at most 4294967295"),
    setting("reward", "data_seed", 2**33, "data_seed=8589934592", "at most 4294967295"),
    # Counts and weights
    setting("sft", "max_length", 1, "max_length=1", "one token has nothing to predict"),
    setting("reward", "max_length", 1, "max_length=1", "one token has nothing to predict"),
    setting("sft", "dataset_num_proc", 0, "dataset_num_proc=0", "must be above 0"),
    setting("sft", "ddp_timeout", -1, "ddp_timeout=-1", "must be above 0"),
    setting("sft", "neftune_noise_alpha", -1.0, "neftune_noise_alpha=-1.0", "must not be negative"),
    setting("sft", "label_smoothing_factor", -0.5, "label_smoothing_factor=-0.5", "must not be negative"),
    setting("reward", "center_rewards_coefficient", -1.0, "coefficient=-1.0", "not be negative"),
    setting("sft", "torch_empty_cache_steps", 0, "torch_empty_cache_steps", "bigger than 0"),
    setting("sft", "logging_steps", 0.0, "logging", "non-zero --logging_steps"),
    setting("sft", "logging_steps", 1.5, "logging_steps", "integer"),
    setting("sft", "lora_target_modules", [], "lora_target_modules=[]", "all-linear"),
    setting("sft", "lora_layers", "top-0", "lora_layers='top-0'", "top-10"),
    # Tokens of the tokenizer
    setting("sft", "pad_token", "<none>", "pad_token='<none>'", "has no such token", "leave it out"),
    setting("sft", "eos_token", "<none>", "eos_token='<none>'", "has no such token", "leave it out"),
    setting("reward", "pad_token", "<none>", "pad_token='<none>'", "has no such token", "leave it out"),
    setting("ppo", "stop_token_ids", [10**9], "stop_token_ids: 1000000000 is no token", "from 0 to 60"),
    setting("ppo", "stop_token_ids", [-1], "stop_token_ids: -1 is no token", "from 0 to 60"),
    # Settings of torch and the model
    setting(
        "ppo", "gradient_checkpointing_kwargs", {"no": 1}, "gradient_checkpointing_kwargs: no is none of"
    ),
    setting("sft", "gradient_checkpointing_kwargs", {"use_reentrant": True}, "use_reentrant", "Leave it out"),
    setting("sft", "model_init_kwargs", {"device_map": "auto"}, "model_init_kwargs", "quantization, dtype"),
    setting("sft", "model_init_kwargs", {"token": "a-secret"}, "token looks like a secret", "HF_TOKEN"),
    setting("sft", "accelerator_config", {"no": 1}, "unexpected keyword argument 'no'"),
    setting("sft", "loss_type", "nope", "loss_type='nope'", "there are nll and dft"),
    setting("sft", "fp16", True, "fp16: true", "a CPU", "Leave it out"),
    setting("sft", "attn_implementation", "flash_attention_2", "FlashAttention2", "Use sdpa"),
    # Best of what, averages of what
    setting("sft", "load_best_model_at_end", True, "no best without an evaluation", "eval_strategy: steps"),
    setting("ppo", "load_best_model_at_end", True, "no best without an evaluation", "eval_strategy: steps"),
    setting("sft", "save_strategy", "best", "best", "evaluation", "eval_strategy: steps"),
    setting("own_loop", "ema_decay", 0.9, "ema_decay=0.9", "keeps no average. Leave it out"),
    # Where results go
    setting("sft", "output_dir", "", "output_dir=''", "need a folder"),
    setting("ppo", "output_dir", "  ", "output_dir=' '", "need a folder"),
    setting("evaluate", "output_dir", "", "output_dir=''", "need a folder"),
    setting("reward", "output_dir", "a\0b", "output_dir='a\\x00b'", "need a folder"),
    # YAML
    yaml(
        "a key that stands twice",
        "seed: 1\nlora_r: 3\nseed: 2\n",
        "'seed' stands in lines 1 and 3",
        "Keep one",
    ),
    yaml("a key twice in braces", "optim_args: {a: 1, a: 2}\n", "'a' stands in lines 1 and 1", "Keep one"),
    yaml("a time for a number", "seed: 1:30\n", "--seed", "invalid int value: '1:30'"),
    yaml("a date for a number", "seed: 2020-01-01\n", "--seed", "invalid int value: '2020-01-01'"),
    yaml("a number for text", "run_name: 010\n", "run_name: 10 is not text", "Put it in quotes"),
    yaml("an octal number that is none", "seed: 0o9\n", "--seed", "invalid int value: '0o9'"),
    yaml("a version for a number", "seed: 1.2.3\n", "--seed", "invalid int value: '1.2.3'"),
    yaml("a count with an exponent", "seed: 1e3\n", "seed: 1000.0 is not a whole number"),
    yaml("two documents", "seed: 1\n---\nseed: 2\n", "expected a single document", "line 2", "Mend it there"),
    yaml("nothing", "", "expected lines of the form 'setting: value', found NoneType"),
    yaml("one word", "seed\n", "expected lines of the form 'setting: value', found str"),
    yaml("an alias of nothing", "seed: *x\n", "undefined alias", "line 1", "Mend it there"),
    yaml("a list for a key", "? [a]\n: 1\n", "unhashable key", "Mend it there"),
    yaml("a key with a space", "lora r: 3\n", "unknown setting 'lora'", "Did you mean lora_"),
    yaml("env with a list", "env: {A: [1]}\n", "env: expected names of environment variables"),
    yaml("env with nothing", "env: {A: }\n", "env: expected names of environment variables"),
    yaml("env with a zero byte", 'env: {A: "x\\0y"}\n', "env: expected names of environment variables"),
    yaml("a number of 5000 digits", f"seed: {'9' * 5000}\n", "4300 digits", "Mend it there"),
    # The command line
    line(
        "a beginning of a name", "--learning_rat", "1", says=("'learning_rat'", "Did you mean learning_rate?")
    ),
    line("a beginning with =", "--learning_rat=1", says=("'learning_rat'", "Did you mean learning_rate?")),
    line("a short beginning", "--out", "x", says=("'out'", "Did you mean out")),
    line("a beginning of a secret", "--hub_tok", "abcdefgh", says=("'hub_tok'", "Did you mean hub_token?")),
    line("a negative exponent", "--learning_rate", "-1e-4", says=("rate=-0.0001", "not be negative")),
    line("a negative infinity", "--learning_rate", "-inf", says=("learning_rate=-inf", "a finite number")),
    line("a word too many", "--seed", "1", "2", says=("--seed: '2' behind its value", "quotes")),
    line("a setting without dashes", "seed=1", says=("belongs to no setting",)),
    line("one dash", "-seed", "1", says=("'seed' belongs to no setting", "two dashes")),
    line("a value left out", "--seed", says=("--seed", "expected one argument")),
    line("a number with a comma", "--learning_rate", "1,5", says=("invalid float value: '1,5'",)),
    line("a fraction for a count", "--lora_r", "1.5", says=("invalid int value: '1.5'",)),
    line("a word for true", "--packing", "on", says=("Truthy value expected: got on", "yes/no")),
    line(
        "a list in two places",
        "--column_mapping",
        "a=b",
        "--column-mapping=c=d",
        says=("--column_mapping stands twice", "at once"),
    ),
    line(
        "a second file",
        "--config",
        "a.yaml",
        "--config",
        "x.yaml",
        says=("--config stands twice",),
    ),
    # A base whose config.json says what cannot be
    config_of_base("no layers", ("has 0 layers (num_hidden_layers)", "Copy it again"), num_hidden_layers=0),
]
