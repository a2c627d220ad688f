"""ModelEMA and what a model does besides: buffers, replaced parameters, checkpoints inside of applied(), offloading."""

import io

import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import anybatch
from anybatch._ema.offload import Offload


def shift(model, by):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def saved_and_loaded(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- buffers


def norm_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), parametrizations.spectral_norm(nn.Linear(4, 2)))


def test_buffers_are_the_models_inside_and_after():
    """Inside of applied() a forward in training mode changes statistics, counters, power iterations: not for good."""
    model = norm_model()
    ema = anybatch.ModelEMA(model, 0.5)
    model(torch.randn(8, 3))
    before = copies(model.buffers())
    with ema.applied():
        assert all(map(torch.equal, before, model.buffers()))
        model.train()(torch.randn(8, 3))
        model[1].running_mean = torch.zeros(4)  # another tensor in its place
        assert not torch.equal(model[1].num_batches_tracked, before[2])
    assert all(map(torch.equal, before, model.buffers()))
    assert len(list(model.buffers())) == len(before) == 5


def test_recalibrated_statistics_stay_inside():
    model = norm_model()
    ema = anybatch.ModelEMA(model, 0.5)
    data = [torch.randn(64, 3) for _ in range(3)]
    shift(model, 1.0)
    own = copies(model.buffers())
    with ema.applied():
        torch.optim.swa_utils.update_bn(data, model)
        whole = torch.cat([model[0](x) for x in data])
        torch.testing.assert_close(model[1].running_mean, whole.mean(0))
    assert all(map(torch.equal, own, model.buffers()))


def test_statistics_are_averaged_on_request_and_nothing_else():
    model = norm_model()
    ema = anybatch.ModelEMA(model, 0.75, average_statistics=True)
    names = {n for n, _ in model.named_parameters()} | {"1.running_mean", "1.running_var"}
    assert set(ema.state_dict()["averages"]) == names
    plain = {n: getattr(model[1], n).clone() for n in ("running_mean", "running_var")}
    for seed in range(3):
        torch.manual_seed(seed)
        model(torch.randn(8, 3))
        ema.update(2)
        plain = {n: 0.75**2 * v + (1 - 0.75**2) * getattr(model[1], n) for n, v in plain.items()}
    own = copies(model.buffers())
    with ema.applied():
        for name, value in plain.items():
            torch.testing.assert_close(getattr(model[1], name), value)
        assert model[1].num_batches_tracked == 3
    assert all(map(torch.equal, own, model.buffers()))
    fresh = anybatch.ModelEMA(norm_model(), 0.75, average_statistics=True)
    fresh.load_state_dict(saved_and_loaded(ema.state_dict()))
    for name, value in plain.items():
        torch.testing.assert_close(fresh.state_dict()["averages"][f"1.{name}"], value)


# ---- parameters that change their place


@pytest.mark.parametrize("how", ["data", "replaced", "assigned", "swapped", "in place"])
def test_weights_that_were_replaced_are_followed(how):
    model = nn.Linear(3, 2).double()
    start, new = copies(model.parameters()), [torch.randn(2, 3).double(), torch.randn(2).double()]
    ema = anybatch.ModelEMA(model, 0.5)
    ema.update(0)  # the lists are cached now
    if how == "data":
        model.weight.data, model.bias.data = new[0].clone(), new[1].clone()
    elif how == "replaced":
        model.weight, model.bias = (nn.Parameter(t.clone()) for t in new)
    elif how == "assigned":
        model.load_state_dict({"weight": new[0].clone(), "bias": new[1].clone()}, assign=True)
    elif how == "swapped":
        torch.utils.swap_tensors(model.weight, nn.Parameter(new[0].clone()))
        torch.utils.swap_tensors(model.bias, nn.Parameter(new[1].clone()))
    else:
        model.load_state_dict({"weight": new[0], "bias": new[1]})
    ema.update()
    for a, b, c in zip(ema.state_dict()["averages"].values(), start, new, strict=True):
        torch.testing.assert_close(a, (b + c) / 2)
    with ema.applied():
        torch.testing.assert_close(model.weight.detach(), (start[0] + new[0]) / 2)
    assert torch.equal(model.weight, new[0])


def test_a_model_that_changes_its_type_keeps_its_averages():
    model = nn.Linear(3, 2)
    start = copies(model.parameters())
    ema = anybatch.ModelEMA(model, 0.5)
    ema.update(0)
    model.to(torch.bfloat16)
    shift(model, 2)
    ema.update()
    for a, s in zip(ema.state_dict()["averages"].values(), start, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, s + 1, rtol=1e-2, atol=1e-2)


def test_trap_a_parameter_that_has_gone_is_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    ema = anybatch.ModelEMA(model, 0.5)
    parametrizations.weight_norm(model[1])
    with pytest.raises(anybatch.UsageError, match=r"1\.weight.*after parametrizing"):
        ema.update()
    model = nn.Linear(3, 3)
    ema = anybatch.ModelEMA(model, 0.5)
    model.bias = None
    with pytest.raises(anybatch.UsageError, match="bias"), ema.applied():
        pass
    model.bias = nn.Parameter(torch.zeros(3))
    model.weight = nn.Parameter(torch.zeros(1, 3))  # would broadcast
    with pytest.raises(anybatch.UsageError, match="weight has another shape"), ema.applied():
        pass


def test_parametrizations_are_averaged_where_they_are_stored():
    model = parametrizations.orthogonal(nn.Linear(3, 3, bias=False).double())
    ema = anybatch.ModelEMA(model, 0.5)
    assert set(ema.state_dict()["averages"]) == {"parametrizations.weight.original"}
    shift(model, 0.3)
    ema.update()
    with ema.applied():
        torch.testing.assert_close(model.weight @ model.weight.T, torch.eye(3).double())
    assert parametrize.is_parametrized(model)


def test_the_meta_device_is_refused():
    with pytest.raises(anybatch.InvalidValueError, match="meta"):
        anybatch.ModelEMA(nn.Linear(2, 2, device="meta"), 0.5)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_model_is_refused_until_it_has_shapes():
    model = nn.LazyLinear(2)
    with pytest.raises(anybatch.InvalidValueError, match=r"lazy.*forward"):
        anybatch.ModelEMA(model, 0.5)
    model(torch.zeros(1, 3))
    anybatch.ModelEMA(model, 0.5).update()


def test_wrappers_leave_no_trace_in_the_names():
    model = oracle.make_model()
    model[2] = torch.compile(model[2], backend="eager")
    names = {"0.weight", "0.bias", "2.weight", "2.bias"}
    state = anybatch.ModelEMA(torch.compile(model, backend="eager"), 0.5).state_dict()
    assert set(state["averages"]) == names
    anybatch.ModelEMA(oracle.make_model(), 0.5).load_state_dict(state)


def test_a_compiled_model_is_not_compiled_again():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = oracle.make_model()
    compiled = torch.compile(model, backend=counter)
    ema = anybatch.ModelEMA(compiled, 0.5)
    x, _ = oracle.micro_batch(0, 0)
    compiled(x)
    shift(model, 1)
    ema.update()
    with ema.applied():
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


# ---- checkpoints inside of applied()


def test_exporting_inside_of_applied():
    """The model's own state dict holds the averages there; copied, it loads into a bare model."""
    model = norm_model()
    ema = anybatch.ModelEMA(model, 0.5)
    shift(model, 1)
    ema.update()
    with ema.applied():
        exported = saved_and_loaded(model.state_dict())
    bare = norm_model()
    bare.load_state_dict(exported)
    for name, average in ema.state_dict()["averages"].items():
        assert torch.equal(exported[name], average)
        assert torch.equal(dict(bare.named_parameters())[name], average)


def test_trap_a_checkpoint_inside_of_applied_loses_nothing():
    """There the state is refused, for the model's part would be the averages; `withdrawn()` is the way, anywhere."""
    model = norm_model()
    ema = anybatch.ModelEMA(model, 0.5)
    shift(model, 1)
    ema.update()
    own, averages = copies(model.state_dict().values()), copies(ema.state_dict()["averages"].values())

    def checkpoint():
        with ema.withdrawn():
            return saved_and_loaded({"model": model.state_dict(), "ema": ema.state_dict()})

    written = [checkpoint()]
    with ema.applied():
        with pytest.raises(anybatch.UsageError, match="withdrawn"):
            ema.state_dict()
        with pytest.raises(anybatch.UsageError, match="inside"):
            ema.load_state_dict(written[0]["ema"])
        model.train()(torch.randn(8, 3))  # changes buffers: kept for the rest of applied(), not in the checkpoint
        inside = copies(model.state_dict().values())
        written.append(checkpoint())
        assert all(map(torch.equal, inside, model.state_dict().values()))
        with pytest.raises(ZeroDivisionError), ema.withdrawn():
            raise ZeroDivisionError
        assert all(map(torch.equal, inside, model.state_dict().values()))
        with pytest.raises(anybatch.UsageError, match="nested"), ema.applied():
            pass
    assert all(map(torch.equal, own, model.state_dict().values()))
    for found in written:
        assert all(map(torch.equal, own, found["model"].values()))
        assert all(map(torch.equal, averages, found["ema"]["averages"].values()))
    ema.update()


def test_applied_inside_of_inference_mode_and_with_gradients():
    model = norm_model()
    ema = anybatch.ModelEMA(model, 0.5)
    shift(model, 1)
    own = copies(model.parameters())
    with torch.inference_mode(), ema.applied():
        model.eval()(torch.randn(2, 3))
    with ema.applied():
        model.train()(torch.randn(4, 3)).sum().backward()  # as for adversarial or distillation losses
    assert all(map(torch.equal, own, model.parameters()))
    assert all(p.grad is not None and p.requires_grad for p in model.parameters())


def test_states_of_version_1_of_a_model_that_is_a_wrapper_load():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    ema = anybatch.ModelEMA(model, 0.5)
    for prefix in ("", "module."):  # as it is, and under DDP
        averages = {f"{prefix}{n}": torch.randn_like(p) for n, p in model.named_parameters()}
        ema.load_state_dict({"version": 1, "decay": 0.5, "averages": averages})
        assert all(map(torch.equal, averages.values(), ema.state_dict()["averages"].values()))


def test_states_of_version_1_load():
    model = oracle.make_model()
    ema = anybatch.ModelEMA(model, 0.5, warmup=True)
    averages = {f"module.{n}": torch.randn_like(p) for n, p in model.named_parameters()}  # as under DDP
    ema.load_state_dict({"version": 1, "decay": 0.5, "averages": averages})
    assert all(map(torch.equal, averages.values(), ema.state_dict()["averages"].values()))
    assert ema.tau == float("inf")  # no second warm-up
    shift(model, 1)
    ema.update()
    expected = [(a + p) / 2 for a, p in zip(averages.values(), model.parameters(), strict=True)]
    for mine, theirs in zip(ema.state_dict()["averages"].values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs.detach())


# ---- averages on the CPU


def test_the_cpu_is_a_device_like_any():
    model, twin = oracle.make_model(), oracle.make_model()
    ema, other = anybatch.ModelEMA(model, 0.9, device="cpu"), anybatch.ModelEMA(twin, 0.9)
    for _ in range(3):
        shift(model, 1)
        shift(twin, 1)
        ema.update()
        other.update()
    assert all(map(torch.equal, ema.state_dict()["averages"].values(), other.state_dict()["averages"].values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_moves_later_is_what_a_loop_gives(dtype, monkeypatch):
    """The offloaded path, with a CPU in place of the GPU: staged, moved at the next update, or where it is read."""
    model, twin = oracle.make_model().to(dtype), oracle.make_model().to(dtype)
    ema = anybatch.ModelEMA(model, (0.9, 0.99), device="cpu")
    plain = anybatch.ModelEMA(twin, (0.9, 0.99))
    with monkeypatch.context() as patched:
        patched.setattr("anybatch._ema.model_ema.Lerp", Offload)
        ema.update(0)
    offload = ema._lerp
    assert isinstance(offload, Offload)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for t in range(6):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            x, y = oracle.micro_batch(t, 0, dtype=dtype)
            oracle.loss_fn(m(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        ema.update(1.5)
        plain.update(1.5)
    for key in ("averages", "averages_1"):
        assert all(map(torch.equal, ema.state_dict()[key].values(), plain.state_dict()[key].values()))
    with ema.applied(0.9), plain.applied(0.9):
        assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_what_is_offloaded_are_the_weights_of_the_update():
    """Whatever writes the weights before the averages have moved: they move towards a copy."""
    source, average = torch.ones(3), torch.zeros(3)
    offload = Offload([source], [[average]])
    offload([0.5])
    source.clamp_(max=0)
    offload.wait()
    offload.wait()  # once is enough
    assert torch.equal(average, torch.full((3,), 0.5))


@pytest.mark.gpu
def test_averages_of_a_gpu_on_the_cpu():
    model, twin = oracle.make_model().cuda(), oracle.make_model().cuda()
    ema, plain = anybatch.ModelEMA(model, 0.9, device="cpu"), anybatch.ModelEMA(twin, 0.9)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for t in range(20):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            x, y = oracle.micro_batch(t, 0)
            oracle.loss_fn(m(x.cuda()), y.cuda()).backward()
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
        plain.update()
        for m in (model, twin):  # weights written besides the optimizer
            shift(m, 0.25)
    mine, theirs = ema.state_dict()["averages"], plain.state_dict()["averages"]
    for name, average in mine.items():
        assert average.device.type == "cpu"
        torch.testing.assert_close(average, theirs[name].cpu())
