"""The beginning and the end of a run whose replies a judge behind a server compares."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from goose_lora.cli.stage import Prompts, Stage
from goose_lora.ownership import claim
from goose_lora.ppo.config import PPOConfig
from goose_lora.ppo.judging import judging_plan, require_groups
from goose_lora.rewards.classifier import listed_sources
from goose_lora.rewards.group_judge import GroupJudge, served_judge
from goose_lora.rewards.pairwise_judge import CACHE_FILE, SERVED, cache_file, check_judge_settings
from goose_lora.rewards.sources import RewardMix, RewardSource


def check_reward_judges(names: Sequence[str] | str | None, base_url: str | None, rubric: str | None) -> None:
    """Look at the settings of the judges that ``--reward_function`` names, as those of one judge.

    Raises:
        UserError: as ``check_judge_settings``.
    """
    listed = listed_sources(names)
    served = [name for name in listed if name.startswith(SERVED)]
    for name in served or [", ".join(listed) or None]:
        check_judge_settings(name, base_url, rubric, setting="reward_function")


def judge_maker(config: PPOConfig, base_url: str | None, rubric: str | None) -> Callable[[str], GroupJudge]:
    """Return what makes a source of reward of ``openai:MODEL`` in the run of ``config``."""
    return partial(
        served_judge,
        base_url=base_url,
        rubric=rubric,
        cache=Path(config.output_dir or ".") / CACHE_FILE,
        process=config.process_index,
    )


def begin_judging(
    stage: Stage, sources: Sequence[RewardSource], weights: Sequence[float] | None, prompts: Prompts
) -> None:
    """Tell what the judges among the sources will be asked, and ask each one made-up question.

    Raises:
        UserError: they have nothing to compare, or a server does not answer as it should.
    """
    # What is compared with what is refused before a server is asked
    config = stage.config
    assert isinstance(config, PPOConfig)
    reward = RewardMix(sources, weights)
    require_groups(reward, config)
    if not reward.judges:
        return
    # What it will cost comes before the first call
    for line in judging_plan(reward, config, len(prompts.train), resumed=stage.checkpoint is not None):
        stage.say(line)
    for judge in reward.judges.values():
        stage.say(f"Asking {judge.name} one made-up question ...")
        judge.judge.check()
    # A run that is refused leaves its folder as it was; one process notes for all what they write
    if config.process_index == 0:
        files = [cache_file(Path(CACHE_FILE), process) for process in range(config.world_size)]
        claim(config.output_dir or ".", *map(str, files))


def tell_judging(stage: Stage, sources: Sequence[RewardSource]) -> None:
    """Tell what the judges among the sources were asked; of several processes, by the first."""
    for source in sources:
        if isinstance(source, GroupJudge):
            of_process = "" if stage.config.world_size == 1 else "Of the first process alone: "
            stage.say(f"{of_process}{source.judge.told()}")
