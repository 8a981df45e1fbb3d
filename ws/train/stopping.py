"""When a training has learnt enough: the held-out loss, looked at as it goes.

Two signs of one behaviour are not learnt equally fast: the base model leans to one of them. Stopped at one loss they have
learnt alike. (docs/method.md section 2)
"""

from ws.train.examples import response_loss


def stop_at(held: list[dict[str, list[int]]], target: float | int, every: int, batch: int):
    """A callback that ends a training at the first step, of every `every`-th, whose loss on the examples `held` (nats per
    response token) is at most `target`."""
    from transformers import TrainerCallback

    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step % every == 0 and response_loss(model, held, batch) <= target:
                control.should_training_stop = True

    return Enough()
