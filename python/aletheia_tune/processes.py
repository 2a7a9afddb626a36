"""What the processes of one run have in common: the scores of all their batches, and one plan.

Alone, without a process group, each function gives back what it was given.
"""

from __future__ import annotations

import torch.distributed as dist

from aletheia_tune.plan import Plan
from aletheia_tune.scores import Scores
from aletheia_tune.scores.merge import merge_scores


def scores_of_all(scores: Scores) -> Scores:
    """The scores of all processes' batches, from each process's own; the same in every process.

    Every process probes the whole model, before it is sharded, on batches of its own.

    Raises:
        UserError: what `merge_scores` refuses.
    """
    if not _several():
        return scores
    texts = [""] * dist.get_world_size()
    dist.all_gather_object(texts, scores.to_json())
    return merge_scores([Scores.from_json(text) for text in texts])


def plan_of_first(plan: Plan) -> Plan:
    """The first process's plan, in every process: what was timed, or rounded, may lead others to another."""
    if not _several():
        return plan
    text = [plan.to_json()]
    dist.broadcast_object_list(text, src=0)
    return Plan.from_json(text[0])


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
