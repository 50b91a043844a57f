"""Optimizers: groups, Muon against a singular value decomposition, AdamW against its formula, exact state."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isotach.errors import UserError
from isotach.train.optim import NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, Optimizer, matrix_names, orthogonalize


class Net(nn.Module):
    """An embedding, two blocks, a norm and a head that may be tied: every kind of parameter that a decoder has."""

    def __init__(self, *, tie: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(2))
        self.theta = nn.Parameter(torch.zeros(2, 8))
        self.head = nn.Linear(8, 11, bias=False)
        if tie:
            self.head.weight = self.embedding.weight
        source = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.normal_(generator=source)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.theta.sum(0)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


def train(net: Net, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(11, (2, 16), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.roll(1).flatten()).backward()
        optimizer.step(1 / (step + 1))
        optimizer.zero_grad()


def settle(net: Net, optimizer: Optimizer) -> dict[str, Tensor]:
    """One step with zero gradients: what is left of a parameter shows its weight decay and nothing else."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.5)
    return {name: p.detach() / before[name] for name, p in net.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tie", [False, True])
def test_only_matrices_decay(name: str, tie: bool) -> None:
    net = Net(tie=tie)
    left = settle(net, Optimizer(net, name=name, lr=0.1, weight_decay=0.2))  # type: ignore[arg-type]
    matrices = {"blocks.0.1.weight", "blocks.1.1.weight"} | (set() if tie else {"head.weight"})
    assert matrix_names(net) == matrices
    for key, ratio in left.items():
        torch.testing.assert_close(ratio, torch.full_like(ratio, 1 - 0.05 * 0.2 if key in matrices else 1.0))


def test_muon_takes_the_matrices_of_blocks_only() -> None:
    net = Net()
    optimizer = Optimizer(net, name="muon", lr=0.1)
    train(net, optimizer, range(1))
    by_muon = {key.rpartition("/")[0] for key in optimizer.state_dict() if key.endswith("/momentum")}
    assert by_muon == {"blocks.0.1.weight", "blocks.1.1.weight"}
    assert {key.rpartition("/")[0] for key in optimizer.state_dict()} == {name for name, _ in net.named_parameters()}


def polar(matrix: Tensor) -> Tensor:
    """What Newton-Schulz does, one singular value at a time: x <- ax + bx³ + cx⁵."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    x = s / s.norm()
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        x = a * x + b * x**3 + c * x**5
    return u * x @ vh


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_orthogonalize_maps_singular_values_through_the_polynomial(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(matrix), polar(matrix), rtol=1e-9, atol=1e-9)
    single = orthogonalize(matrix.float())
    torch.testing.assert_close(single.double(), polar(matrix), rtol=0, atol=1e-4)
    values = torch.linalg.svdvals(single)
    s = torch.linalg.svdvals(matrix)
    assert values[s / s.norm() > 0.02].min() > 0.6
    assert values.max() < 1.3


def test_muon_is_the_published_update() -> None:
    net = Net()
    before = net.blocks[0][1].weight.detach().double().clone()
    optimizer = Optimizer(net, name="muon", lr=1e-2, weight_decay=0.3)
    m = torch.zeros_like(before)
    for step in range(1, 4):
        source = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=source)
        g = net.blocks[0][1].weight.grad.double()
        m = 0.95 * m + 0.05 * g
        before = before * (1 - 1e-2 * 0.3) - 1e-2 * 0.2 * 8**0.5 * polar(0.05 * g + 0.95 * m)
        optimizer.step(1.0)
    torch.testing.assert_close(net.blocks[0][1].weight.double(), before, rtol=1e-5, atol=1e-5)


def test_muon_moves_as_far_as_adamw() -> None:
    matrix = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    moved = {}
    for name in ("adamw", "muon"):
        net = nn.ModuleList([nn.Linear(32, 64, bias=False)])
        before = net[0].weight.detach().clone()
        net[0].weight.grad = matrix.clone()
        # AdamW refuses to be empty, so a bias-like stranger comes along.
        net.register_parameter("other", nn.Parameter(torch.zeros(1)))
        Optimizer(net, name=name, lr=0.1, weight_decay=0.0).step(1.0)  # type: ignore[arg-type]
        moved[name] = (net[0].weight.detach() - before).square().mean().sqrt().item()
    assert moved["adamw"] == pytest.approx(0.1, rel=1e-3)  # Adam's first step is lr * sign(gradient)
    assert 0.1 < moved["muon"] / moved["adamw"] < 0.4  # Adam's later steps are about 0.2 lr: the factor of the paper


def test_adamw_is_the_published_update() -> None:
    net = Net()
    before = net.head.weight.detach().double().clone()
    optimizer = Optimizer(net, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.3)
    m = torch.zeros_like(before)
    v = torch.zeros_like(before)
    for step in range(1, 4):
        source = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=source)
        g = net.head.weight.grad.double()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        before = before * (1 - 1e-2 * 0.3) - 1e-2 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        optimizer.step(1.0)
    torch.testing.assert_close(net.head.weight.double(), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_survives_disk_to_the_bit(name: str, tmp_path: object) -> None:
    whole, half, resumed = Net(), Net(), Net()
    train(whole, Optimizer(whole, name=name, lr=0.01), range(6))  # type: ignore[arg-type]
    first = Optimizer(half, name=name, lr=0.01)  # type: ignore[arg-type]
    train(half, first, range(3))
    save_file(first.state_dict(), f"{tmp_path}/state.safetensors")
    resumed.load_state_dict(half.state_dict())
    second = Optimizer(resumed, name=name, lr=0.01)  # type: ignore[arg-type]
    second.load_state_dict(load_file(f"{tmp_path}/state.safetensors"))
    train(resumed, second, range(3, 6))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_state_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"got stranger\.weight/exp_avg"):
        Optimizer(Net(), lr=0.1).load_state_dict({"stranger.weight/exp_avg": torch.zeros(8, 8)})
    with pytest.raises(UserError, match=r"head\.weight/exp_avg \(3, 3\)"):
        Optimizer(Net(), lr=0.1).load_state_dict({"head.weight/exp_avg": torch.zeros(3, 3)})
