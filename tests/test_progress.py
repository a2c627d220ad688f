"""The bar in tau: what it shows on a terminal, and that it is silent and leaves nothing behind elsewhere."""

import io
import re
import sys

import pytest
import torch
from rich.console import Console

import anybatch


def training(**options):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"base_batch": 4, "micro_batch": 8, "total": 40, **options}
    controller = anybatch.attach(optimizer, model=model, **options)

    def take():
        for _ in range(2):
            (model(torch.randn(8, 2)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    return controller, take


def terminal():
    file = io.StringIO()
    return file, Console(file=file, force_terminal=True, width=120)


def pictures(file):
    """What stood on the terminal, one text for each time the line was drawn."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    return [line.strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def test_the_bar_shows_tau_gain_scale_rate_and_the_time_left():
    file, console = terminal()
    controller, take = training()
    with controller.progress(console=console):
        while not controller.done:
            take()
    first, last = pictures(file)[0], pictures(file)[-1]
    assert first.startswith("tau 0/40")
    assert last.startswith(f"tau {controller.tau:.0f}/40")
    assert f"gain {controller.gain:.3g}" in last
    assert "scale 4" in last
    assert f"lr {0.1 * controller.lr_factor:.3g}" in last
    assert re.search(r"\d:\d\d:\d\d", last)


def test_every_move_of_the_clock_may_be_drawn_but_ten_pictures_a_second_are_enough(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("anybatch._record.progress.time.monotonic", lambda: now[0])
    drawn = []
    for seconds in (0.0, 0.2):
        file, console = terminal()
        controller, _ = training()
        with controller.progress(console=console):
            for _ in range(20):
                now[0] += seconds
                controller.clock.advance(1.0)
        drawn.append(len(set(re.findall(r"tau (\d+)/", "\n".join(pictures(file))))))
    assert drawn == [2, 21]


def test_a_run_without_an_end_and_a_rule_without_a_gain_have_a_bar_too():
    file, console = terminal()
    controller, take = training(total=None, base_batch=None, micro_batch=None, scale=4, rule=anybatch.Linear())
    with controller.progress(console=console):
        take()
    last = pictures(file)[-1]
    assert last.startswith("tau 4 ")
    assert "scale 4  lr 0.4" in last
    assert "gain" not in last


def test_a_resumed_run_starts_where_it_is():
    controller, take = training()
    take()
    state = controller.state_dict()
    file, console = terminal()
    controller, take = training()
    controller.load_state_dict(state)
    with controller.progress(console=console):
        pass
    assert pictures(file)[0].startswith(f"tau {state['tau']:.0f}/40")


@pytest.mark.parametrize("shown", [True, False])
def test_it_is_silent_where_there_is_no_terminal_and_on_other_ranks(capfd, shown):
    file = io.StringIO()
    console = Console(file=file, force_terminal=not shown)
    controller, take = training()
    if not shown:
        controller._ranks = type("Ranks", (), {"first": False, "size": 2, "group": None})()
    before = len(controller.clock._subscribers)
    with controller.progress(console=console):
        controller.clock.advance(1.0)
        assert len(controller.clock._subscribers) == before
    with controller.progress():  # standard error is captured: no terminal
        controller.clock.advance(1.0)
    assert file.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_it_ends_with_its_context_also_after_an_error():
    file, console = terminal()
    controller, take = training()
    before = len(controller.clock._subscribers)
    with pytest.raises(ZeroDivisionError), controller.progress(console=console):
        take()
        raise ZeroDivisionError
    assert len(controller.clock._subscribers) == before
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")  # the cursor is shown again
    kept = file.getvalue()
    take()
    assert file.getvalue() == kept


def test_without_rich_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    controller, _ = training()
    with pytest.raises(anybatch.UsageError, match=r"anybatch\[cli\]"), controller.progress():
        pass
