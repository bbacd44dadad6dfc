"""Flora in Hugging Face's Trainer and in those that extend it: TRL's SFTTrainer, DPOTrainer, GRPOTrainer."""

from floragrad.torch.integrations.transformers import FloraFactory, FloraTrainer, FloraTrainerMixin

__all__ = ["FloraFactory", "FloraTrainer", "FloraTrainerMixin"]
