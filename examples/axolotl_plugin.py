"""This package's operators under Axolotl, which calls the hooks of the plugins that its YAML names.

PYTHONPATH=examples axolotl train examples/axolotl.yml
"""

from contextlib import ExitStack

from axolotl.integrations.base import BasePlugin

from aletheia_tune import use_kernels


class KernelsPlugin(BasePlugin):
    """The adapters' arithmetic on the operators from the trainer's creation to the end of training."""

    def __init__(self):
        super().__init__()
        self.in_use = ExitStack()

    def post_trainer_create(self, cfg, trainer):
        print(self.in_use.enter_context(use_kernels(trainer.model)))  # and why the rest is not

    def post_train(self, cfg, model):
        self.in_use.close()
