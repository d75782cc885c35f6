"""Experts on a device, in RAM and on the disk: the same results wherever they are, each in one place, and faults."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from localmoe.core.errors import DeviceError, EngineStartError, StoreError
from localmoe.core.model import ExpertId, WeightFormat
from localmoe.core.protocols import Routed
from localmoe.engine.budget import device_workspace_bytes, workspace_bytes
from localmoe.engine.config import EngineConfig, kv_bytes_per_token
from localmoe.engine.device_experts import DeviceExperts
from localmoe.engine.experts import ResidentExperts
from localmoe.engine.hybrid_experts import HybridExperts
from localmoe.engine.load import load_device_engine, load_engine
from localmoe.engine.tiered_experts import TieredExperts
from localmoe.formats.store import Store
from localmoe.formats.store_layout import blob_layout
from localmoe.kernels.gpu import GpuKernels
from localmoe.kernels.triton.experts import ExpertSlab, SlotExperts
from localmoe.residency.device import DeviceResidency, ToldElsewhere
from localmoe.residency.manager import ResidencyManager
from localmoe.residency.policy import retention_policy
from localmoe.residency.split import LayerTimes, LayerWork, Split
from localmoe.tiers.config import DiskConfig, TiersConfig
from localmoe.tiers.device import Copy, DeviceArena
from localmoe.tiers.disk import DiskReader
from localmoe.tiers.host import HostArena, stride_bytes
from support.models import greedy, kernels_under_test, routed_to, run

_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if _CUDA else "cpu")
pytestmark = [pytest.mark.gpu] if _CUDA else []


class Fetching(Split):
    """Fetches a share of the experts in RAM."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def choose(self, work: LayerWork) -> int:
        return round(self.share * len(work.ram))


class Hybrid:
    """Hybrid experts of a store, and a look inside."""

    def __init__(
        self,
        path: Path,
        num_device_slots: int,
        num_ram_slots: int,
        *,
        split: Split,
        prefetch_layers: int = 1,
    ) -> None:
        kernels = kernels_under_test()
        with Store.open(path) as store:
            self.shape = shape = store.shape
            sizes = (shape.num_layers, shape.num_experts)
            policy = retention_policy("lfu", *sizes)
            arena = HostArena(store.blob_bytes, num_ram_slots, available_memory_bytes=1 << 30, pinned=_CUDA)
            manager = ResidencyManager(
                num_layers=sizes[0],
                num_experts=sizes[1],
                num_slots=num_ram_slots,
                most_reads=4,
                policy=ToldElsewhere(policy),
            )
            reader = DiskReader[ExpertId].open([path], DiskConfig(queue_depth=4))
            self.host = TieredExperts(
                store, kernels, reader=reader, arena=arena, manager=manager, prefetch_layers=prefetch_layers
            )
            self.arena = DeviceArena(store.blob_bytes, num_device_slots, DEVICE)
            slab = ExpertSlab(
                layout=blob_layout(shape, store.weights),
                blobs=self.arena.blobs,
                tensor_scales=self.arena.tensor_scales,
            )
            entries = store.expert_entries
            self.residency = DeviceResidency(
                num_layers=sizes[0], num_experts=sizes[1], num_slots=num_device_slots, policy=policy
            )
            self.device = DeviceExperts(
                arena=self.arena,
                layers=[SlotExperts(slab, shape.num_experts) for _ in range(shape.num_layers)],
                host=self.host,
                residency=self.residency,
                tensor_scales=lambda expert: entries[expert].tensor_scales,
            )
            self.experts = HybridExperts(shape, host=self.host, device=self.device, policy=policy, split=split)

    def run(self, layer: int, h: Tensor, ids: Tensor, shares: Tensor, ahead: Sequence[Any] = ()) -> Tensor:
        h, ids, shares = (tensor.to(DEVICE) for tensor in (h, ids, shares))
        x = torch.ones_like(h)
        self.experts(Routed(layer=layer, h_TD=h, ids_TK=ids, weights_TK=shares, ahead=ahead), x)
        return x.cpu()

    def check_homes(self) -> None:
        """Nobody is in two places, and no slot holds two."""
        slots = self.residency._slots_LE[self.residency._slots_LE >= 0].tolist()
        free = self.residency._free_slots
        arriving = [slot for _, slot in self.device._arriving.values()]
        assert sorted([*slots, *free, *arriving]) == list(range(self.residency.num_slots))
        assert (
            len(slots) == self.residency.num_home <= max(0, self.residency.num_slots - self.residency.num_landing)
        )
        for layer, experts in enumerate(self.device.layers):
            assert isinstance(experts, SlotExperts)
            assert experts._slots_E.tolist() == self.residency.slots(layer).tolist()
        assert not (self.host.present() & self.residency.present()).any()
        assert self.experts.present().sum() == self.host.present().sum() + len(slots)


def store_path(home: Path, name: str = "distinct-experts") -> Path:
    return home / "models" / name / "stores" / f"{WeightFormat.F32}.store"


def resident(path: Path) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """All experts on the CPU."""
    with Store.open(path) as store:
        experts = ResidentExperts.mapped(store, kernels_under_test())

    def run(layer: int, h: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        x = torch.ones_like(h)
        experts(routed_to(layer, h, ids, shares), x)
        return x

    return run


class Router:
    """Random tokens of a model's layers; some experts are chosen far more often."""

    def __init__(self, hybrid: Hybrid, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = hybrid.shape
        self.heat_LE = self.rng.dirichlet(np.full(self.shape.num_experts, 0.5), self.shape.num_layers) + 0.01

    def tokens(self, layer: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.shape
        heat_E = self.heat_LE[layer] / self.heat_LE[layer].sum()
        ids = [
            self.rng.choice(shape.num_experts, shape.top_k, replace=False, p=heat_E).astype(np.int32)
            for _ in range(count)
        ]
        shares = self.rng.dirichlet(np.ones(shape.top_k), count).astype(np.float32)
        h = self.rng.standard_normal((count, shape.hidden_size)).astype(np.float32)
        return torch.from_numpy(h), torch.from_numpy(np.stack(ids)), torch.from_numpy(shares)


def close(found: Tensor, expected: Tensor) -> None:
    """F32 experts differ in the order in which products are added, and a GPU's products by a little more."""
    tolerance = 1e-4 if _CUDA else 1e-5
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("num_device_slots", "num_ram_slots", "share"),
    [(1, 24, 1.0), (3, 24, 0.0), (6, 25, 0.5), (12, 3, 0.0), (12, 4, 1.0), (2, 1, 1.0), (6, 8, 0.5)],
)
@torch.inference_mode()
def test_results_are_those_of_the_cpu_alone(
    tiny_home: Path, num_device_slots: int, num_ram_slots: int, share: float
) -> None:
    path = store_path(tiny_home)
    hybrid, alone = Hybrid(path, num_device_slots, num_ram_slots, split=Fetching(share)), resident(path)
    hybrid.device.fill()
    hybrid.check_homes()
    router, num_uses = Router(hybrid), 0
    for count in (1, 4, 1, 1):
        hybrid.experts.begin_step([count > 1] * count)
        for layer in range(hybrid.shape.num_layers):
            h, ids, shares = router.tokens(layer, count)
            ids[0, -1] = -1
            num_uses += len(ids[ids >= 0].unique())
            following = router.tokens(min(layer + 1, hybrid.shape.num_layers - 1), count)[1]
            ahead = [lambda _, ids=following: ids.to(DEVICE)] if layer + 1 < hybrid.shape.num_layers else []
            close(hybrid.run(layer, h, ids, shares, ahead), alone(layer, h, ids.clone(), shares))
            hybrid.check_homes()
    state = hybrid.experts.state()
    assert state.hits + state.misses + state.device_hits == num_uses
    if share == 0 or num_ram_slots >= 24:
        assert (state.device_fetches > 0) == (share > 0)
    if num_device_slots > 1 and num_ram_slots != 1:  # the last slot in RAM is never lent
        assert state.num_on_device > 0
        assert state.device_hits > 0


@torch.inference_mode()
def test_experts_on_the_device_give_the_same_bits_in_any_slots(tiny_home: Path) -> None:
    path = store_path(tiny_home)
    with Store.open(path) as store:
        num_experts = store.shape.num_layers * store.shape.num_experts
    found = []
    # At home in one order, in another, and all fetched.
    for num_slots, order in ((num_experts + 8, 1), (num_experts + 8, -1), (5, 1)):
        hybrid = Hybrid(path, num_slots, num_experts + 1, split=Fetching(1.0))
        hybrid.residency._free_slots = hybrid.residency._free_slots[::order]
        hybrid.device.fill()
        router, results = Router(hybrid), []
        for count in (2, 1):
            hybrid.experts.begin_step([False] * count)
            results += [
                hybrid.run(layer, *router.tokens(layer, count)) for layer in range(hybrid.shape.num_layers)
            ]
        state = hybrid.experts.state()
        assert (state.hits, state.misses) == (state.device_fetches, 0)  # nothing was left to the host
        found.append(torch.cat(results))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@torch.inference_mode()
def test_who_is_used_more_moves_in_and_others_into_ram(tiny_home: Path) -> None:
    path = store_path(tiny_home)
    hybrid, alone = Hybrid(path, 4, 6, split=Fetching(0.0), prefetch_layers=0), resident(path)
    router = Router(hybrid)

    def step(expert: int) -> None:
        hybrid.experts.begin_step([False])
        for layer in range(hybrid.shape.num_layers):
            h, ids, shares = router.tokens(layer, 1)
            ids[0] = torch.tensor([expert, -1], dtype=torch.int32)
            close(hybrid.run(layer, h, ids, shares), alone(layer, h, ids.clone(), shares))
            hybrid.check_homes()

    num_layers = hybrid.shape.num_layers
    cold, hot = 0, 1
    for _ in range(2):
        step(cold)
    assert hybrid.experts.on_device()[:, cold].all()
    for _ in range(6):
        step(hot)
    on_device = hybrid.experts.on_device()
    assert on_device[:, hot].sum() == on_device.sum() == hybrid.residency.num_home
    state = hybrid.experts.state()
    assert state.device_evictions == state.copies_out > 0
    # Those who left are in RAM, and as they were.
    before = hybrid.host.present()
    assert before[:, cold].sum() == num_layers
    reads = state.disk_reads
    step(cold)
    assert hybrid.experts.state().disk_reads == reads


@torch.inference_mode()
def test_a_long_random_walk_keeps_everybody_in_one_place(tiny_home: Path) -> None:
    path = store_path(tiny_home)
    num_copies_out = 0
    for seed, (num_device_slots, num_ram_slots) in enumerate([(5, 4), (9, 2), (6, 25)]):
        hybrid, alone = Hybrid(path, num_device_slots, num_ram_slots, split=Fetching(0.4)), resident(path)
        if not _CUDA:
            delay_copies(hybrid.arena, seed)
        router = Router(hybrid, seed)
        for step in range(8):
            if step % 3 == 0:
                router.heat_LE = router.rng.permuted(router.heat_LE, axis=1)
            count = int(router.rng.choice([1, 1, 3]))
            hybrid.experts.begin_step([count > 1] * count)
            for layer in range(hybrid.shape.num_layers):
                h, ids, shares = router.tokens(layer, count)
                close(hybrid.run(layer, h, ids, shares), alone(layer, h, ids.clone(), shares))
                hybrid.check_homes()
        num_copies_out += hybrid.experts.state().copies_out
        hybrid.device.drain()
        hybrid.check_homes()
        assert hybrid.host._manager._num_lent == hybrid.host._manager._lent.sum() == 0
    assert num_copies_out > 0


def delay_copies(arena: DeviceArena, seed: int) -> None:
    """Let copies take a while: nothing is moved before it is waited for, or chance has it that it is done."""
    rng = np.random.default_rng(seed)
    under_way: dict[Copy, Callable[[], object]] = {}
    order: list[Copy] = []
    copy_in, copy_out = arena.copy_in, arena.copy_out

    def delayed(move: Callable[..., Copy], *arguments: Any) -> Copy:
        ticket = Copy(0.0, 1e-4)
        under_way[ticket] = lambda: move(*arguments)
        order.append(ticket)
        return ticket

    def finish(ticket: Copy) -> None:
        while ticket in under_way:
            first = order.pop(0)
            under_way.pop(first)()

    def done(ticket: Copy) -> bool:
        if rng.random() < 0.3:
            finish(ticket)
        return ticket not in under_way

    replaced = {
        "copy_in": lambda *arguments: delayed(copy_in, *arguments),
        "copy_out": lambda *arguments: delayed(copy_out, *arguments),
        "wait": finish,
        "finish": finish,
        "done": done,
    }
    for name, function in replaced.items():
        setattr(arena, name, function)


@pytest.fixture
def own_store(tiny_home: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copy(store_path(tiny_home), tmp_path / "own.store"))


@torch.inference_mode()
def test_a_damaged_expert_fails_its_layer_and_nothing_else(own_store: Path) -> None:
    hybrid, alone = Hybrid(own_store, 6, 4, split=Fetching(0.5)), resident(own_store)
    router = Router(hybrid)
    with Store.open(own_store) as store:
        offset = store.expert_entry(ExpertId(1, 3)).offset + 100
    flip(own_store, offset)
    num_failures = 0
    for _ in range(8):
        hybrid.experts.begin_step([False] * 2)
        for layer in range(hybrid.shape.num_layers):
            h, ids, shares = router.tokens(layer, 2)
            if layer == 1 and 3 in ids:
                with pytest.raises(StoreError, match="layer 1 expert 3"):
                    hybrid.run(layer, h, ids, shares)
                num_failures += 1
                hybrid.check_homes()
                break
            found = hybrid.run(layer, h, ids, shares)
            flip(own_store, offset)  # the mapping of those compared with is of the same file
            close(found, alone(layer, h, ids.clone(), shares))
            flip(own_store, offset)
            hybrid.check_homes()
    assert num_failures > 1
    flip(own_store, offset)
    hybrid.experts.begin_step([False])
    h, ids, shares = router.tokens(1, 1)
    ids[0] = torch.tensor([3, -1], dtype=torch.int32)
    close(hybrid.run(1, h, ids, shares), alone(1, h, ids.clone(), shares))


def flip(path: Path, offset: int) -> None:
    """Invert a byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


@pytest.mark.parametrize("direction", ["copy_in", "copy_out"])
@torch.inference_mode()
def test_copies_that_fail_leave_everybody_in_one_place(
    tiny_home: Path, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store_path(tiny_home)
    hybrid, alone = Hybrid(path, 5, 4, split=Fetching(0.5)), resident(path)
    works = getattr(hybrid.arena, direction)
    router, num_failures = Router(hybrid), 0

    def fail_sometimes(*arguments: Any) -> Copy:
        if router.rng.random() < 0.4:
            raise DeviceError("the device is tired")
        copy: Copy = works(*arguments)
        return copy

    monkeypatch.setattr(hybrid.arena, direction, fail_sometimes)
    for step in range(10):
        if step % 3 == 0:
            router.heat_LE = router.rng.permuted(router.heat_LE, axis=1)
        try:
            hybrid.experts.begin_step([False] * 2)
            for layer in range(hybrid.shape.num_layers):
                h, ids, shares = router.tokens(layer, 2)
                close(hybrid.run(layer, h, ids, shares), alone(layer, h, ids.clone(), shares))
        except DeviceError:
            num_failures += 1
        hybrid.check_homes()
    assert num_failures > 1
    monkeypatch.undo()
    hybrid.device.drain()
    hybrid.check_homes()
    assert hybrid.host._manager._num_lent == hybrid.host._manager._lent.sum() == 0


@torch.inference_mode()
def test_products_that_fail_leave_nothing_in_landing_slots(
    tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store_path(tiny_home)
    hybrid, alone = Hybrid(path, 5, 25, split=Fetching(1.0)), resident(path)
    hybrid.device.fill()
    works, fails = SlotExperts.compute, [True]

    def compute(self: SlotExperts, experts: Sequence[int] | None = None) -> None:
        if experts is not None and fails[0]:
            raise DeviceError("the device is tired")
        works(self, experts)

    monkeypatch.setattr(SlotExperts, "compute", compute)
    router = Router(hybrid)
    h, ids, shares = router.tokens(0, 6)
    hybrid.experts.begin_step([False] * 6)
    with pytest.raises(DeviceError, match="tired"):
        hybrid.run(0, h, ids, shares)
    hybrid.check_homes()
    fails[0] = False
    hybrid.experts.begin_step([False] * 6)
    close(hybrid.run(0, h, ids, shares), alone(0, h, ids, shares))


def test_nobody_is_brought_twice(tiny_home: Path) -> None:
    hybrid = Hybrid(store_path(tiny_home), 8, 25, split=Fetching(0.0))
    if not _CUDA:
        delay_copies(hybrid.arena, 0)
    hybrid.host.fill(hybrid.residency.present())
    expert = ExpertId(0, 3)
    assert expert in hybrid.device.wanted()
    assert hybrid.device.bring(expert)
    assert expert not in hybrid.device.wanted()
    assert not hybrid.device.bring(expert)
    hybrid.device.drain()
    assert hybrid.residency.has(expert)
    assert expert not in hybrid.device.wanted()
    assert not hybrid.device.bring(expert)
    hybrid.check_homes()


def test_the_device_and_ram_are_full_before_the_first_step(tiny_home: Path) -> None:
    hybrid = Hybrid(store_path(tiny_home), 8, 5, split=Fetching(0.0))
    hybrid.device.fill()
    assert hybrid.residency.is_full
    assert hybrid.experts.present().sum() == hybrid.residency.num_home + 5
    assert hybrid.experts.on_device().sum(axis=1).tolist() == [2, 2, 2]
    state = hybrid.experts.state()
    assert (state.hits, state.misses, state.stall_s) == (0, 0, 0.0)


def test_a_damaged_expert_is_found_before_the_first_step(own_store: Path) -> None:
    with Store.open(own_store) as store:
        flip(own_store, store.expert_entry(ExpertId(0, 1)).offset + 100)
    with pytest.raises(StoreError, match="damaged"):
        Hybrid(own_store, 8, 5, split=Fetching(0.0)).device.fill()


@torch.inference_mode()
def test_the_split_is_told_what_was_fetched(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[list[int], int]] = []

    class Told(Fetching):
        def observe(self, work: LayerWork, times: LayerTimes) -> None:
            told.append((work.ram.tolist(), times.num_fetched))

    hybrid = Hybrid(store_path(tiny_home), 6, 25, split=Told(0.7))
    hybrid.host.fill(hybrid.residency.present())
    lend = hybrid.host.lend
    monkeypatch.setattr(hybrid.host, "lend", lambda expert, **how: lend(expert, **how) if expert.expert else None)
    h, _, shares = Router(hybrid).tokens(0, 4)
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 3]], dtype=torch.int32)
    for layer in (0, 1):
        hybrid.experts.begin_step([False] * 4)
        hybrid.run(layer, h, ids, shares)
    assert told[0] == ([2, 1, 4, 1], 2)  # expert 0, which has most tokens, could not be had


def test_copies_that_do_not_begin_cost_nothing(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = Hybrid(store_path(tiny_home), 6, 25, split=Fetching(0.0))
    first, second, third = (ExpertId(0, expert) for expert in range(3))
    asked: list[ExpertId] = []

    def bring(expert: ExpertId) -> bool:
        asked.append(expert)
        return expert != first

    monkeypatch.setattr(hybrid.device, "bring", bring)
    hybrid.device.moves.copy_s = 1e9  # the link has no time but for what is left over
    experts = hybrid.experts
    experts._idle_copies, experts._wanted = 1.0, {third: None, first: None}
    experts._move(0, [first, second])
    assert asked == [first, second]
    assert list(experts._wanted) == [third]


@pytest.mark.parametrize("ram_experts", [6, 25])
def test_an_engine_whose_experts_do_not_fit_the_device_shares_them(tiny_home: Path, ram_experts: int) -> None:
    path = store_path(tiny_home)
    config = EngineConfig(
        num_threads=2, max_num_batched_tokens=8, max_num_seqs=1, max_context_tokens=32, speculation=False
    )
    config = replace(config, tiers=TiersConfig(reserve_bytes=0, vram_bytes=None))
    with Store.open(path) as store:
        shape = store.shape
        dense_bytes = sum(entry.num_bytes for entry in store.dense_entries)
        kv_bytes = 32 * kv_bytes_per_token(shape, "f32")
        config = replace(config, kv_cache_bytes=kv_bytes, kv_cache_dtype="f32")
        vram_bytes = dense_bytes + kv_bytes + device_workspace_bytes(shape, config) + 9 * store.blob_bytes
        ram_bytes = ram_experts * stride_bytes(store.blob_bytes) + workspace_bytes(shape, 8, 1)
    config = replace(config, tiers=TiersConfig(reserve_bytes=0, vram_bytes=vram_bytes))
    engine = load_device_engine("test", path, GpuKernels(DEVICE), config, 1 << 40, ram_bytes)
    expected = run(load_engine("test", path, replace(config, device="cpu"), 1 << 30), [greedy("a", [5, 17, 3], 5)])
    assert run(engine, [greedy("a", [5, 17, 3], 5)]) == expected
    inspection = engine.inspect()
    tiers = inspection.tiers
    assert tiers is not None
    assert tiers.device_slots == 9
    assert tiers.device_hits > 0
    places = [place for layer in inspection.placement for place in layer]
    assert places.count("device") == tiers.num_on_device > 0
    assert places.count("ram") == tiers.num_present <= ram_experts
    assert ("disk" in places) == (ram_experts < 9)
    link = inspection.links[1]
    assert (link.name, link.num_transfers) == ("ram_device", tiers.copies_in + tiers.copies_out)
    shares = {share.name: share for share in inspection.memory.shares}
    assert shares["experts"].used_bytes == tiers.num_on_device * tiers.device_slot_bytes


def test_a_device_without_memory_is_named() -> None:
    with pytest.raises(EngineStartError, match=r"not enough device memory: .* lower the device's budget"):
        DeviceArena(1 << 40, 1 << 20, DEVICE)
