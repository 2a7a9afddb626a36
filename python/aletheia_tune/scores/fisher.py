"""The trace of the empirical Fisher information, by batch: Σ over batches b, Σ over parameters p, ‖∂loss_b / ∂p‖₂².

The gradient is that of a batch's mean loss, with the labels of the data: neither of single examples nor of labels drawn
from the model. A parameter with a large gradient outweighs the others more than in the gradient score.
"""

from __future__ import annotations

from aletheia_tune.scores.gradient import GradientScore


class FisherScore(GradientScore):
    """Sums squared gradient norms into scores by layer and by parameter."""

    @staticmethod
    def _term(norm_sq: float) -> tuple[float, float]:
        return norm_sq, 1.0
