"""Experts read from copies on several disks: the same bits, and the store where a copy fails."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from localmoe.catalog.catalog import Catalog
from localmoe.core.errors import StripeError
from localmoe.core.model import ExpertId, WeightFormat
from localmoe.engine.budget import MemoryPlan
from localmoe.engine.config import EngineConfig
from localmoe.engine.load import load_decoder, load_tiered
from localmoe.formats.store import Store
from localmoe.formats.stripes import Stripe
from localmoe.models.decoder import Decoder
from localmoe.tiers.config import TiersConfig
from support.models import kernels_under_test, make_engine, outcome, paged_logits

MODEL = "distinct-experts"
PROMPT = [5, 17, 3, 99, 42, 8, 61, 23, 2, 77, 31, 12]


@pytest.fixture
def store_path(tiny_home: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copy(Catalog(tiny_home).store_path(MODEL, WeightFormat.F32), tmp_path / "own.store"))


def write_stripes(store_path: Path, count: int) -> list[Path]:
    paths = [store_path.with_name(f"own.{number}-of-{count + 1}.stripe") for number in range(1, count + 1)]
    with Store.open(store_path) as store:
        for path in paths:
            Stripe.at(path).write(store, lambda *_: None)
    return paths


def tiered(store_path: Path, stripes: list[Path]) -> Decoder:
    with Store.open(store_path) as store:
        plan = MemoryPlan(
            budget_bytes=1 << 30,
            kv_cache_bytes=0,
            workspace_bytes=0,
            dense_bytes=0,
            num_slots=3,
            slot_bytes=store.blob_bytes,
        )
        return load_tiered(store, kernels_under_test(), plan, TiersConfig(stripes=tuple(map(str, stripes))))[0]


def flip(path: Path, store_path: Path, experts: list[ExpertId]) -> None:
    """Invert a byte of each of these experts."""
    with Store.open(store_path) as store:
        offsets = [store.expert_entry(expert).offset + 100 for expert in experts]
    with path.open("r+b") as file:
        for offset in offsets:
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 0xFF]), offset)


def held(path: Path, store_path: Path) -> list[ExpertId]:
    with Store.open(store_path) as store:
        return Stripe.open(path, store).experts(store)


@pytest.mark.parametrize("num_stripes", [1, 3])
@torch.inference_mode()
def test_logits_have_the_same_bits_and_the_store_is_spared(store_path: Path, num_stripes: int) -> None:
    with Store.open(store_path) as store:
        decoder = load_decoder(store, kernels_under_test())
    expected = [paged_logits(decoder, PROMPT, chunk) for chunk in (12, 1)]
    stripes = write_stripes(store_path, num_stripes)
    shares = [held(path, store_path) for path in stripes]
    num_experts = decoder.shape.num_layers * decoder.shape.num_experts
    assert len(set().union(*shares)) == sum(map(len, shares)) == num_experts - -(-num_experts // (num_stripes + 1))
    decoder = tiered(store_path, stripes)
    for share in shares:
        flip(store_path, store_path, share)  # which nobody sees
    for chunk, logits in zip((12, 1), expected, strict=True):
        assert torch.equal(paged_logits(decoder, PROMPT, chunk), logits)


def test_a_stripe_has_what_it_should_and_takes_no_more_room(store_path: Path) -> None:
    (path,) = write_stripes(store_path, 1)
    share = held(path, store_path)
    with Store.open(store_path) as store:
        content = path.read_bytes()
        for expert, entry in store.expert_entries.items():
            blob = content[entry.offset : entry.offset + entry.num_bytes]
            assert blob == (store.expert_blob(expert).numpy().tobytes() if expert in share else bytes(len(blob)))
        assert path.stat().st_size == store.total_bytes
        assert path.stat().st_blocks * 512 < (len(share) + 2) * store.blob_bytes
    assert len(list(path.parent.iterdir())) == 2


def test_what_a_stripe_has_not_whole_is_read_from_the_store(
    store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = stripes = write_stripes(store_path, 1)
    share = held(path, store_path)
    expected = outcome(make_engine(tiered(store_path, []), EngineConfig()))
    flip(path, store_path, share)
    engine = make_engine(tiered(store_path, stripes), EngineConfig(prefix_caching=False))
    with caplog.at_level(logging.WARNING):
        assert outcome(engine) == expected
        said = [message for message in caplog.messages if "is damaged" in message]
        assert said
        assert all(m.startswith(str(path)) and m.endswith(f"is read from {store_path}") for m in said)
        assert outcome(engine) == expected
    said = [message for message in caplog.messages if "is damaged" in message]
    assert len(said) == len(set(said)) <= len(share), "each is tried once"
    flip(store_path, store_path, share)
    message = outcome(engine)
    assert isinstance(message, str)
    assert message.startswith(str(store_path)) or "is damaged" in message
    flip(store_path, store_path, share)
    # Reads that were under way when the request failed may have brought what was there before.
    answers = [outcome(engine) for _ in range(len(share))]
    assert all("is damaged" in answer for answer in answers if isinstance(answer, str))
    assert answers[-1] == expected


def test_a_stripe_that_is_cut_short_while_serving_fails_nobody(
    store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stripes = write_stripes(store_path, 2)
    engine = make_engine(tiered(store_path, stripes), EngineConfig(prefix_caching=False))
    expected = outcome(engine)
    os.truncate(stripes[1], 8192)
    with caplog.at_level(logging.WARNING):
        assert outcome(engine) == expected
    assert any(message.startswith(f"{stripes[1]}: ends before byte") for message in caplog.messages)


def test_stripes_of_something_else_are_refused_at_start(tiny_home: Path, store_path: Path) -> None:
    other = Path(
        shutil.copy(Catalog(tiny_home).store_path("olmoe", WeightFormat.F32), store_path.parent / "other")
    )
    (foreign,) = write_stripes(other, 1)
    with pytest.raises(StripeError, match=rf"{foreign}: is not a stripe of {store_path}, .* models stripe"):
        tiered(store_path, [foreign])
    (path,) = write_stripes(store_path, 1)
    tiered(store_path, [path])
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(StripeError, match="is not a stripe of"):
        tiered(store_path, [path])
    path.unlink()
    with pytest.raises(StripeError, match=r"1-of-2\.stripe: cannot be opened: No such file"):
        tiered(store_path, [path])


@pytest.mark.parametrize(
    "name", ["own.store", "own.stripe", "a.2-of-2.stripe", "a.0-of-2.stripe", "1-of-2.stripe"]
)
def test_the_share_is_in_the_name(store_path: Path, name: str) -> None:
    with pytest.raises(StripeError, match="is not named like a stripe"):
        tiered(store_path, [store_path.with_name(name)])
