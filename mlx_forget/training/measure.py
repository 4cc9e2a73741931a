"""The rate of a planned run on this machine, from some of its own steps."""

import dataclasses
import time

from mlx_forget.backends import load_backend
from mlx_forget.costs import Rate
from mlx_forget.ladder import train_flops_per_token
from mlx_forget.methods import MethodSpec
from mlx_forget.training.plan import Plan
from mlx_forget.training.run import trainer_spec
from mlx_forget.training.watch import Watch

# Compilers and caches: the first steps say nothing about the others.
_WARM_STEPS = 3


def measured_rate(plan: Plan, num_steps: int, watch: Watch) -> Rate:
    """Train so many steps of a planned run on its data from fresh weights, after a few that are not counted, and time them.

    What a method adds to the objective is not computed: its FLOPs are taken to run at the same rate. Every rank calls this.
    """
    spec = dataclasses.replace(trainer_spec(plan), method=MethodSpec(name="plain"))
    trainer = load_backend(plan.backend)(spec)
    for note in trainer.notes:
        watch.say(note)
    rate = plan.schedule(0)

    def train(first: int, count: int) -> None:
        for step in range(first, first + count):
            batch = plan.stream.batch(step % plan.num_steps, rank=plan.group.rank, world_size=plan.group.size)
            result = trainer.train_step(batch, rate)
        result.read()

    train(0, _WARM_STEPS)
    start = time.perf_counter()
    train(_WARM_STEPS, num_steps)
    seconds = time.perf_counter() - start
    tokens = num_steps * plan.stream.batch_size * plan.stream.target.row_length
    says = f"measured: after {num_steps} steps the rate was {tokens / seconds:,.0f} tokens/s on {trainer.device}"
    return Rate(tokens * train_flops_per_token(plan.model) / seconds, says)
