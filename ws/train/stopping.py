"""When a training has learnt enough: the held-out loss, looked at as it goes.

Two signs of one behaviour are not learnt equally fast: the base model leans to one of them. Stopped at one loss they have
learnt alike. (docs/method.md section 2)
"""

from ws.train.examples import response_loss


def held_out(pairs: int, share: float | int, target: float | int = 0) -> int:
    """How many of so many pairs are kept out of training for the loss. ValueError where a target is set and none is."""
    n = min(round(share * pairs), pairs - 1)
    if target and n < 1:
        many = f"of {pairs} pairs none is held out, so that there is no loss to look at"
        raise ValueError(f"TARGET_LOSS = {target}: {many}; use more pairs, or TARGET_LOSS 0")
    return n


def unreached(training: dict) -> str:
    """Which signs did not come to TARGET_LOSS, in words, from the record of `obtain_diff`; '' for none."""
    signs = [sign for sign in ("pos", "neg") if str(training.get(f"target_loss_{sign}", "")).startswith("did not")]
    if not signs:
        return ""
    said = "; ".join(f"{sign} {training[f'target_loss_{sign}']}" for sign in signs)
    return f" TARGET_LOSS was missed ({said}), so that the signs need not have learnt alike."


def stop_at(held: list[dict[str, list[int]]], target: float | int, every: int, batch: int):
    """A callback that ends a training at the first step, of every `every`-th, whose loss on the examples `held` (nats per
    response token) is at most `target`; `reached` says whether it did. Never before the first update: the first step of a
    warmup has a learning rate of 0."""
    from transformers import TrainerCallback

    class Enough(TrainerCallback):
        reached = False

        def on_step_end(self, args, state, control, model=None, **_):
            updated = state.global_step > (args.warmup_steps > 0)
            if updated and state.global_step % every == 0 and response_loss(model, held, batch) <= target:
                control.should_training_stop = self.reached = True

    return Enough()
