"""The public names of goose_lora.cli."""

from .commands import COMMANDS as COMMANDS
from .commands import command_line as command_line
from .commands import main as main
from .judging import begin_judging as begin_judging
from .judging import check_reward_judges as check_reward_judges
from .judging import judge_maker as judge_maker
from .judging import tell_judging as tell_judging
from .parser import check_settings as check_settings
from .parser import parse as parse
from .parser import read_config as read_config
from .process import command as command
from .process import continuing as continuing
from .process import keep_freed_memory as keep_freed_memory
from .process import quiet_libraries as quiet_libraries
from .reward_run import ListTrainer as ListTrainer
from .reward_run import PairTrainer as PairTrainer
from .reward_run import RewardRun as RewardRun
from .reward_run import check_members as check_members
from .reward_run import check_members_run as check_members_run
from .reward_run import rows_of_members as rows_of_members
from .stage import Stage as Stage
