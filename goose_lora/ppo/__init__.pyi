"""The public names of goose_lora.ppo."""

from .config import PPOConfig as PPOConfig
from .trainer import PPOTrainer as PPOTrainer
