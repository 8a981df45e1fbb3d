"""An interrupt at any moment of weight steering leaves the model as it was: weights, hooks, attributes, signal handlers."""

import os
import random
import signal
import sys
import threading
import time

import pytest
import torch
from conftest import random_model
from test_steer import bits, clean, diff_for, same

import ws.model.guard as guard
import ws.steer.weights as steer
from ws.model.guard import MARKS, Guarded
from ws.steer.weights import weight_steer

# an interrupt at a bad moment could hang what comes after it: soon over, then
pytestmark = [pytest.mark.usefixtures("pythons_own_handler"), pytest.mark.timeout(90)]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request):
    return random_model("llama", layers=2).to(getattr(torch, request.param))


def untouched(model, before) -> bool:
    """Every bit, no hook, no mark, nobody's handler."""
    marks = [p for p in (*model.parameters(), *model.modules()) if any(name in p.__dict__ for name in MARKS)]
    left = guard._open or guard._standing or guard._noted
    handlers = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return same(model, before) and clean(model) and not marks and not left and handlers


def nested(model, w, v):
    """Two contexts on overlapping parameters."""
    with weight_steer(model, w, 1.0):
        with weight_steer(model, v, -1.0):
            for _ in range(4000):
                pass


def bombard(model, tries: int, each: int, seconds: float) -> dict[str, int]:
    """At least `tries` interrupts at random moments between before and after `nested`, until `each` were raised in entering and
    in leaving, as long as `seconds` last; how many were raised where."""
    w, v = diff_for(model, 0.3), diff_for(model, 0.2, seed=9, roles=("o_proj", "gate_proj"))
    before, rng, landed = bits(model), random.Random(0), {"__enter__": 0, "__exit__": 0, "body": 0, "after": 0}
    times = []
    for _ in range(5):
        start = time.perf_counter()
        nested(model, w, v)
        times.append(time.perf_counter() - start)
    span, start = min(times), time.perf_counter()

    def interrupt(delay: float) -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    interval = sys.getswitchinterval()  # half of the delays aim at the last quarter, for leaving is short
    sys.setswitchinterval(1e-6)
    try:
        while time.perf_counter() - start < seconds:
            if sum(landed.values()) >= tries and min(landed["__enter__"], landed["__exit__"]) >= each:
                break
            sender = threading.Thread(target=interrupt, args=(rng.uniform(rng.choice((0, 0.75)) * span, 1.1 * span),))
            try:
                sender.start()
                nested(model, w, v)
                sender.join()
                time.sleep(0.01)
                pytest.fail("no interrupt came")
            except KeyboardInterrupt as error:
                landed[where(error.__traceback__)] += 1
            sender.join()
            assert untouched(model, before), landed
    finally:
        sys.setswitchinterval(interval)
    return landed


def where(trace) -> str:
    """Whether an interrupt was raised in `__enter__` or `__exit__` (where one noted there is raised), in the body of
    `nested`, or after it."""
    codes = []
    while trace is not None:
        codes.append(trace.tb_frame.f_code)
        trace = trace.tb_next
    inside = [code.co_name for code in codes if code in guard.GUARDED]
    return inside[0] if inside else "body" if nested.__code__ in codes else "after"


def test_five_hundred_interrupts_at_random_moments(model):
    landed = bombard(model, 500, 20, 60.0)
    assert sum(landed.values()) >= 100 and min(landed["__enter__"], landed["__exit__"]) >= 20, landed


class Stepper:
    """Raises SIGINT at the k-th bytecode that runs in the frames of entering and leaving."""

    def __init__(self, k: int):
        self.left, self.seen, self.files = k, 0, (guard.__file__, steer.__file__)

    def __call__(self, frame, event, _argument):
        if event == "call":
            if frame.f_code.co_filename not in self.files or frame.f_code.co_name == "__call__":
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return self
        if event == "opcode":
            self.seen += 1
            if self.seen == self.left:
                signal.raise_signal(signal.SIGINT)
        return self


def stepped(model, w, v, k: int) -> tuple[bool, int]:
    """Whether KeyboardInterrupt came out of two nested contexts, and how many bytecodes ran in them."""
    contexts, stepper = (weight_steer(model, w, 1.0), weight_steer(model, v, 1.0)), Stepper(k)
    sys.settrace(stepper)
    try:
        with contexts[0]:
            with contexts[1]:
                pass
        return False, stepper.seen
    except KeyboardInterrupt:
        return True, stepper.seen
    finally:
        sys.settrace(None)


def small(model, roles=("layers.0.mlp.down_proj",)):
    return diff_for(model, 0.3, roles=roles)


def test_an_interrupt_at_every_bytecode_of_entering_and_leaving(model, monkeypatch):
    """Also where the interpreter would look for signals a moment later only."""
    w, v = small(model), small(model, ("layers.0.mlp.down_proj", "layers.0.mlp.up_proj"))
    slots = {id(x): steer.check_fits(model, x) for x in (w, v)}
    monkeypatch.setattr(steer, "check_fits", lambda _, w: slots[id(w)])  # it only reads, in thousands of bytecodes
    before = bits(model)
    _, total = stepped(model, w, v, 0)
    assert total > 500
    missed = []
    for k in range(1, total + 1):
        arrived, _ = stepped(model, w, v, k)
        missed += [] if arrived else [k]
        assert untouched(model, before), k
    assert not missed


def test_without_the_guard_bytecodes_are_found_that_break_the_model(monkeypatch):
    """The test above can fail."""
    model = random_model("llama", layers=1)
    w, before, broken = small(model), bits(model), 0
    monkeypatch.setattr(guard, "GUARDED", ())
    total = stepped(model, w, w, 0)[1]
    for k in range(1, total, 7):
        stepped(model, w, w, k)
        broken += not untouched(model, before)
        for held in guard._standing:
            signal.signal(held.number, held.before)
        for left in (guard._open, guard._standing, guard._noted):
            left.clear()
        for name, p in model.named_parameters():
            p.data.copy_(before[name])
            p.__dict__.clear()
    assert broken > 5


def test_an_undoing_that_raises_does_not_keep_the_others(model, monkeypatch):
    w, before, kind = (
        diff_for(model, 0.3),
        bits(model),
        steer._InPlace if model.dtype == torch.float32 else steer._Hooked,
    )
    leave, calls = kind.exit, []

    def broken(self):
        calls.append(self)
        leave(self)
        if len(calls) in (2, 5):
            raise MemoryError(f"at {len(calls)}")

    monkeypatch.setattr(kind, "exit", broken)
    with pytest.raises(MemoryError, match="at 2"), weight_steer(model, w, 1.0):
        assert not same(model, before) or model.dtype != torch.float32
    assert len(calls) == len(w) == 8 and untouched(model, before)


@pytest.mark.parametrize("at", [1, 4, 8])
def test_an_error_in_the_middle_of_entering_undoes_what_was_changed(model, at, monkeypatch):
    w, before, calls = diff_for(model, 0.3), bits(model), []
    kind = steer._InPlace if model.dtype == torch.float32 else steer._Hooked
    enter = kind.enter

    def short_of_memory(self):
        calls.append(self)
        if len(calls) == at:
            raise MemoryError
        enter(self)

    monkeypatch.setattr(kind, "enter", short_of_memory)
    with pytest.raises(MemoryError), weight_steer(model, w, 1.0):
        pytest.fail("entered")
    assert len(calls) == at and untouched(model, before)


def test_an_error_while_leaving_out_of_order_loses_no_bits(monkeypatch):
    model = random_model("llama", layers=1)
    w, before = small(model), bits(model)
    contexts = [weight_steer(model, w, a) for a in (1.0, 2.0, 3.0)]
    for context in contexts:
        context.__enter__()
    dense = steer._dense

    def fails(*_):
        raise MemoryError

    for context in contexts[:2]:
        monkeypatch.setattr(steer, "_dense", fails)
        with pytest.raises(MemoryError):
            context.__exit__(None, None, None)
        monkeypatch.setattr(steer, "_dense", dense)
    contexts[2].__exit__(None, None, None)
    assert untouched(model, before)


def test_the_bodys_interrupt_arrives_as_such(model):
    before = bits(model)
    with pytest.raises(KeyboardInterrupt) as caught, weight_steer(model, diff_for(model, 0.3), 1.0):
        start = time.perf_counter()
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not interrupted")
    assert caught.value.__context__ is None and time.perf_counter() - start < 1 and untouched(model, before)


class Interrupted(Guarded):
    """Raises a signal while it is entered (`at` 0) or left (`at` 1)."""

    def __init__(self, number: int, at: int):
        super().__init__(None)
        self.number, self.at, self.starts, self.done = number, at, 0, []

    def start(self):
        self.starts += 1
        self.undo += [lambda: self.done.append("a"), self.leave, lambda: self.done.append("b")]
        if self.at == 0 and self.starts == 1:
            signal.raise_signal(self.number)

    def leave(self):
        if self.at == 1:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("at", [0, 1])
def test_a_python_handler_of_sigterm_waits_and_comes_last(at):
    class Stop(Exception):
        pass

    def stop(*_):
        context.done.append("handled")
        raise Stop

    context, before = Interrupted(signal.SIGTERM, at), signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stop), context:
            pass
        assert context.done == ["b", "a", "handled"] and signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("at", [0, 1])
def test_a_handler_that_returns_does_not_leave_the_body_without_the_change(at):
    heard, context = [], Interrupted(signal.SIGINT, at)
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(len(context.done)))
    try:
        with context:
            assert context.undo and context.starts == 2 - at
        assert heard == [2] and len(context.done) == 4 - 2 * at
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_that_are_not_pythons_stay_and_ones_own_of_the_body_too():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupted(signal.SIGINT, 1):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def own(*_):
        pass

    try:
        with Interrupted(signal.SIGTERM, 2), Interrupted(signal.SIGTERM, 2):
            signal.signal(signal.SIGINT, own)
            with Interrupted(signal.SIGINT, 2):
                assert signal.getsignal(signal.SIGINT) is not own
        assert signal.getsignal(signal.SIGINT) is own and not guard._standing
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_steer_without_handlers_and_do_not_disturb_the_main_one():
    models = [random_model("llama", layers=1, seed=i) for i in (0, 1)]
    before, seen = [bits(m) for m in models], []

    def work():
        with weight_steer(models[1], small(models[1]), 1.0):
            seen.append(signal.getsignal(signal.SIGINT) is handler and not same(models[1], before[1]))

    with weight_steer(models[0], small(models[0]), 1.0):
        handler = signal.getsignal(signal.SIGINT)
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        assert signal.getsignal(signal.SIGINT) is handler is not signal.default_int_handler
    assert seen == [True] and all(map(untouched, models, before))


def test_a_context_is_entered_once_at_a_time_and_may_be_used_again(model):
    before, context = bits(model), weight_steer(model, diff_for(model, 0.3), 1.0)
    for _ in range(2):
        with context:
            with pytest.raises(RuntimeError, match="is open already; make another"), context:
                pass
            assert clean(model) is False
        assert untouched(model, before)
