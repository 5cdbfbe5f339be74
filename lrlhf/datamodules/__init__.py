"""Data: rows, prompts, batches."""

from lrlhf.datamodules.alpaca import AlpacaDataModule
from lrlhf.datamodules.prompts import AlpacaTemplate, ChatTemplate, Template, TextTemplate

__all__ = ["AlpacaDataModule", "AlpacaTemplate", "ChatTemplate", "Template", "TextTemplate"]
