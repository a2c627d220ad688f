"""The controller's state travels inside of its optimizer's, whoever saves that."""

import copy
import io

import oracle
import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed import carried_workers as workers
from distributed import launch
from distributed.carried_workers import run
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import anybatch


def through_torch_save(model, optimizer, fresh):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh[1].load_state_dict(torch.load(buffer, weights_only=True))


def through_memory(model, optimizer, fresh, **options):
    options = StateDictOptions(**options)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    get_optimizer_state_dict(fresh[0], fresh[1], options=options)
    set_optimizer_state_dict(fresh[0], fresh[1], saved, options=options)


def through_files(model, optimizer, fresh, *, path, **options):
    options = StateDictOptions(**options)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=path)
    parts = {"optimizer": get_optimizer_state_dict(fresh[0], fresh[1], options=options)}
    dcp.load(parts, checkpoint_id=path)
    set_optimizer_state_dict(fresh[0], fresh[1], parts["optimizer"], options=options)


FLAT = {"flatten_optimizer_state_dict": True}
WAYS = {
    "torch.save": lambda path: through_torch_save,
    "in memory": lambda path: through_memory,
    "in memory, flat": lambda path: lambda *a: through_memory(*a, **FLAT),
    "files": lambda path: lambda *a: through_files(*a, path=path),
    "files, flat": lambda path: lambda *a: through_files(*a, path=path, **FLAT),
}


def after(steps, **options):
    """A run of so many steps: model, optimizer, scheduler and controller."""
    parts = run(**options)
    workers.train(*parts, steps)
    return parts


def numbers(controller):
    return controller.state_dict()


@pytest.mark.filterwarnings("ignore:.*TypedStorage.*", "ignore:torch.distributed is")
@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_with_no_line_for_the_controller(way, tmp_path):
    model, optimizer, scheduler, controller = after(5)
    fresh = run()
    fresh[0].load_state_dict(model.state_dict())
    WAYS[way](tmp_path)(model, optimizer, fresh)
    fresh[2].load_state_dict(scheduler.state_dict())
    assert numbers(fresh[3]) == numbers(controller)
    for parts in ((model, optimizer, scheduler, controller), fresh):
        workers.train(*parts, 4, start=5)
    assert numbers(fresh[3]) == numbers(controller)
    assert all(map(torch.equal, model.parameters(), fresh[0].parameters()))


def test_loaded_before_it_waits_for_attach():
    model, optimizer, scheduler, controller = after(5)
    new = oracle.make_model()
    new.load_state_dict(model.state_dict())
    bare = torch.optim.SGD(new.parameters(), lr=oracle.LR, momentum=oracle.MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(bare, lambda i: oracle.cosine(i) / oracle.LR)
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else the two share their momentum
    schedule.load_state_dict(scheduler.state_dict())
    options = {"base_batch": 4, "micro_batch": 4, "total": oracle.TOTAL}
    resumed = anybatch.attach(bare, model=new, scheduler=schedule, **options)
    assert numbers(resumed) == numbers(controller)
    workers.train(model, optimizer, scheduler, controller, 3, start=5)
    workers.train(new, bare, schedule, resumed, 3, start=5)
    assert all(map(torch.equal, model.parameters(), new.parameters()))


def test_a_bare_optimizer_loads_it_and_trains():
    model, optimizer, *_ = after(3)
    bare = torch.optim.SGD(model.parameters(), lr=oracle.LR, momentum=oracle.MOMENTUM)
    bare.load_state_dict(optimizer.state_dict())
    x, y = oracle.micro_batch(0, 0)
    oracle.loss_fn(model(x), y).backward()
    bare.step()


def test_detached_it_carries_nothing():
    _, optimizer, _, controller = after(3)
    names = set(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9).state_dict()["param_groups"][0])
    assert {name for name in optimizer.state_dict()["param_groups"][0] if name.startswith("anybatch_run_")}
    controller.detach()
    assert set(optimizer.state_dict()["param_groups"][0]) <= {*names, "initial_lr"}


def test_a_copy_between_two_saves_carries_nothing_of_the_past():
    model, optimizer, scheduler, controller = after(3)
    saved = optimizer.state_dict()
    assert copy.deepcopy(optimizer).param_groups[0]["anybatch_run_tau"] == saved["param_groups"][0]["anybatch_run_tau"]
    workers.train(model, optimizer, scheduler, controller, 1, start=3)
    assert not any(name.startswith("anybatch_run_") for name in copy.deepcopy(optimizer).param_groups[0])


def test_a_state_without_one_leaves_the_clock_alone():
    model, optimizer, scheduler, controller = after(3)
    before = numbers(controller)
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=oracle.LR, momentum=oracle.MOMENTUM).state_dict())
    assert numbers(controller) == before


def test_several_optimizers_share_what_the_first_carries():
    model = oracle.make_model()
    states = before = None
    for steps in (3, 2):
        halves = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[2])]
        controller = anybatch.attach(halves, model=model, total=100, base_batch=2, micro_batch=2)
        if states is not None:
            for half, state in zip(halves, states, strict=True):
                half.load_state_dict(state)
            assert numbers(controller) == before
        for t in range(steps):
            x, y = oracle.micro_batch(t, 0)
            for part, share in controller.parts((x, y), 2):
                (oracle.loss_fn(model(part[0]), part[1]) * share).backward()
            for half in halves:
                half.step()
                half.zero_grad()
        states, before = [half.state_dict() for half in halves], numbers(controller)
        controller.detach()
    assert before["steps"] == 5


# ---- another run's state ----


def loaded(*, total=oracle.TOTAL, base_batch=4, saved_total=oracle.TOTAL, steps=3, change=lambda group: None):
    _, optimizer, scheduler, _ = after(steps, total=saved_total)
    state = optimizer.state_dict()
    change(state["param_groups"][0])
    fresh = run(total=total, base_batch=base_batch)
    fresh[2].load_state_dict(scheduler.state_dict())
    fresh[1].load_state_dict(state)
    return fresh


def test_of_a_finished_run_it_says_so():
    with pytest.warns(anybatch.AnybatchWarning, match=r"of a run of 4 base iterations, at tau = \d") as seen:
        *_, controller = loaded(total=4, saved_total=4)
    assert "remove what begins with 'anybatch_run_'" in str(seen[0].message)
    assert controller.done


@pytest.mark.parametrize(("saved", "whose"), [(100, "a run of 100 base iterations"), (None, "a run without a total")])
def test_of_a_run_of_another_length_it_says_so_and_goes_on(saved, whose):
    with pytest.warns(anybatch.AnybatchWarning, match=f"{whose}, at tau .*: this run, of 200, continues there"):
        *_, controller = loaded(saved_total=saved)
    assert controller.steps == 3


def test_what_is_removed_begins_anew():
    def removed(group):
        for name in [name for name in group if name.startswith("anybatch_run_")]:
            del group[name]

    _, _, _, controller = loaded(saved_total=4, change=removed)
    assert controller.tau == 0


def test_of_another_base_batch_it_is_an_error():
    with pytest.raises(
        anybatch.StateError, match=r"base_batch=4.*was in the optimizer's state.*begins with 'anybatch_run_'"
    ):
        loaded(base_batch=8)


def test_damaged_it_is_an_error_and_the_optimizer_free_again():
    def damaged(group):
        group["anybatch_run_tau"] = -3.0

    with pytest.raises(anybatch.StateError, match="The state is damaged: tau"):
        loaded(change=damaged)
    model, optimizer, *_ = after(3)
    state = optimizer.state_dict()
    damaged(state["param_groups"][0])
    bare = torch.optim.SGD(model.parameters(), lr=oracle.LR, momentum=oracle.MOMENTUM)
    bare.load_state_dict(state)
    with pytest.raises(anybatch.StateError, match="The state is damaged: tau"):
        anybatch.attach(bare, model=model, base_batch=4, micro_batch=4)
    assert anybatch.attach(bare, model=model, base_batch=4, micro_batch=4).tau == 0


# ---- killed and resumed elsewhere ----


def test_on_two_processes_at_twice_the_batch_it_goes_on_at_the_same_tau(tmp_path):
    model, optimizer, scheduler, controller = after(5)
    path = str(tmp_path / "checkpoint.pt")
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)
    for result in launch.run(workers.resume, world=2, args=(path,)):
        assert result["state"] == numbers(controller)
        assert result["scale"] == 4
        assert result["tau"] > controller.tau
        assert result["lr"] == pytest.approx(oracle.cosine(int(result["tau"])), rel=1e-12)
