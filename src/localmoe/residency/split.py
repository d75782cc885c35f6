"""Decides how a layer's experts are shared out between a GPU and a CPU: which of those in RAM the GPU is to fetch.

The time that a layer takes is modelled as

    T = max(t_device(hits + fetched), fetched * t_copy + t_device(1), t_cpu(rest), missing * t_read)

where `t_device` is linear in experts and pairs of token and expert, and `t_cpu` convex in each expert's tokens:
memory bounds it while they are few, arithmetic where they are many. (What all plans have in common, such as the sum
at the end, makes no difference.) Experts with the most tokens are fetched first, since a copy costs the same for all,
so a plan is one number, and all are compared.

Coefficients are fitted to what was measured while serving, relative errors weighing the same, older ones less and
less; no microbenchmark tells what links and memory give when all of them are busy. What a plan leaves out teaches
nothing about itself, so the two pure plans, everything to the GPU and nothing, are tried now and then: as often as
costs a hundredth of the time by present knowledge, never less than what is needed to know anything.

Decisions follow a copy of the coefficients that is replaced when, by the latest ones, it has cost too much for some
time, so that noise does not move them to and fro.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_KINKS = (0, 4, 16, 64)
"""Tokens of an expert from which on each further one may cost more."""
_FORGETTING = 0.99
_PULL = 0.01
"""Of earlier coefficients, against the weight of what was observed."""
_LAYERS_BETWEEN_CHECKS = 8
_PROBE_SHARE = 0.01
"""Of the time, that trying other plans may cost."""
_LEAST_OBSERVATIONS = 2
"""Of each part, before plans are compared."""
_TOLERATED_LOSS = 0.03
"""By which plans may be worse than the best ones known, on an average, for ever."""
_LOSS_TO_LEARN = 0.3
"""Sum of the losses beyond that after which decisions follow the latest coefficients."""
_MOST_REMEMBERED = 4096


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """What a layer computes: each array has the tokens of some experts."""

    device: NDArray[np.integer]
    """Of those on the device."""
    ram: NDArray[np.integer]
    """Of those in RAM, in the order in which they are fetched: the most first."""
    disk: NDArray[np.integer]
    """Of those on the disk only; the CPU computes them as they come."""

    @property
    def key(self) -> tuple[int, int, bytes, bytes]:
        return len(self.device), int(self.device.sum()), self.ram.tobytes(), self.disk.tobytes()


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """What was measured of one layer; None where there was nothing to measure."""

    num_fetched: int
    """Experts of RAM that the device computed, the first of them."""
    device_s: float | None
    """Until the device had computed its part."""
    copy_s: float | None
    """That each fetched expert was under way, on an average."""
    cpu_s: float | None
    """That the CPU took for its part, without waiting for the disk."""
    stall_s: float
    """That it waited."""


class _Fit:
    """Coefficients, none below 0, of a linear model of seconds, fitted to the latest observations.

    Where these cannot tell some coefficients apart, they stay as near as may be to what they were.

    Args:
        size: number of features.
        main: the one that is taken to be all there is at first.
    """

    def __init__(self, size: int, main: int = 0) -> None:
        self._main = main
        self._squares = np.zeros((size, size))
        self._products = np.zeros(size)
        self._coefficients = np.zeros(size)
        self._is_solved = True
        self.num_observations = 0

    def observe(self, features: NDArray[np.float64], seconds: float) -> None:
        if seconds <= 0 or not features.any():
            return
        scaled = features / seconds
        self._squares *= _FORGETTING
        self._products *= _FORGETTING
        self._squares += np.outer(scaled, scaled)
        self._products += scaled
        if self.num_observations == 0:
            self._coefficients[self._main] = seconds / features[self._main]
        self.num_observations += 1
        self._is_solved = False

    def predict(self, features: NDArray[np.float64]) -> float:
        """Seconds, by the coefficients that were asked for last."""
        return float(features @ self._coefficients)

    def coefficients(self) -> NDArray[np.float64]:
        """A copy."""
        if not self._is_solved:
            # Least squares with a pull to what was found before, in units in which each feature weighs the same;
            # whoever would be below 0 is set to 0 and left out, the lowest first.
            scales = np.sqrt(np.diag(self._squares))
            left = np.flatnonzero(scales)
            found = np.where(scales > 0, 0.0, self._coefficients)
            while len(left):
                scale = scales[left]
                squares = self._squares[np.ix_(left, left)] / np.outer(scale, scale) + _PULL * np.eye(len(left))
                products = self._products[left] / scale + _PULL * scale * self._coefficients[left]
                solution = np.linalg.solve(squares, products)
                if solution.min() >= 0:
                    found[left] = solution / scale
                    break
                left = np.delete(left, solution.argmin())
            self._coefficients = found
            self._is_solved = True
        return self._coefficients.copy()


@dataclass(frozen=True, kw_only=True)
class _Coefficients:
    device: NDArray[np.float64]
    """Of a launch, an expert, a pair."""
    cpu: NDArray[np.float64]
    """Of a call, an expert, and a token above each kink."""
    copy_s: float
    read_s: float

    def times(self, work: LayerWork) -> NDArray[np.float64]:
        """T [ram experts + 1] for each number of experts fetched."""
        num_ram = len(work.ram)
        fetched = np.arange(num_ram + 1)
        pairs = np.concatenate([[0], np.cumsum(work.ram)])
        launch_s, expert_s, pair_s = self.device
        experts_device = len(work.device) + fetched
        device = expert_s * experts_device + pair_s * (work.device.sum() + pairs)
        device += launch_s * (experts_device > 0)
        copied = np.where(fetched > 0, fetched * self.copy_s + launch_s + expert_s, 0.0)
        each = _expert_features(work.ram) @ self.cpu[1:]
        rest = np.concatenate([[each.sum()], each.sum() - np.cumsum(each)])
        rest += float((_expert_features(work.disk) @ self.cpu[1:]).sum())
        rest += self.cpu[0] * ((num_ram - fetched + len(work.disk)) > 0)
        times: NDArray[np.float64] = np.maximum(np.maximum(device, copied), rest)
        return np.maximum(times, len(work.disk) * self.read_s)


class Split:
    """One model's, on one machine."""

    def __init__(self) -> None:
        self._device = _Fit(3, main=1)
        self._cpu = _Fit(1 + 1 + len(_KINKS), main=1)
        self._copy = _Fit(1)
        self._read = _Fit(1)
        self._acting: _Coefficients | None = None
        self._loss = 0.0
        self._num_unchecked = 0
        """Layers since decisions were held against the latest coefficients."""
        self._probe_budget_s = 0.0
        self._probes_device = True
        """Which of the pure plans is tried next."""
        self._chosen: dict[tuple[int, int, bytes, bytes], tuple[int, float]] = {}
        """Of the acting coefficients: how many to fetch, and the time of that."""

    def choose(self, work: LayerWork) -> int:
        """How many of the experts in RAM, the first of them, the device is to fetch and compute."""
        num_ram = len(work.ram)
        if num_ram == 0:
            return 0
        if self._acting is None and not self._learn():
            self._probes_device = not self._probes_device
            # The device's own time is known apart from copies only where nothing is fetched.
            return 0 if self._probes_device else num_ram
        num_fetched, best_s = self._best(work)
        self._probe_budget_s += _PROBE_SHARE * best_s
        return self._probe(work, num_fetched, best_s)

    def observe(self, work: LayerWork, times: LayerTimes) -> None:
        """A layer has been computed."""
        num_fetched = times.num_fetched
        if times.copy_s is not None and num_fetched:
            self._copy.observe(np.ones(1), times.copy_s)
        if times.device_s is not None:
            copied_s = num_fetched * (times.copy_s or 0.0)
            pairs = float(work.device.sum() + work.ram[:num_fetched].sum())
            features = np.array([1.0, len(work.device) + num_fetched, pairs])
            # Where copies are what takes long, the time is only a bound of what is computed meanwhile.
            if times.device_s > 1.5 * copied_s or times.device_s < self._device.predict(features):
                self._device.observe(features, times.device_s)
        if times.cpu_s is not None:
            experts = np.concatenate([work.ram[num_fetched:], work.disk])
            if len(experts):
                features = np.concatenate([[1.0], _expert_features(experts).sum(0)])
                self._cpu.observe(features, times.cpu_s)
                if times.stall_s > 0 and len(work.disk):
                    self._read.observe(np.array([float(len(work.disk))]), times.cpu_s + times.stall_s)
        self._settle(work)

    def _best(self, work: LayerWork) -> tuple[int, float]:
        """By the acting coefficients."""
        assert self._acting is not None
        key = work.key
        if key not in self._chosen:
            if len(self._chosen) >= _MOST_REMEMBERED:
                self._chosen.clear()
            times_s = self._acting.times(work)
            # Of equal times the fewest copies.
            num_fetched = int(np.argmax(times_s <= 1.001 * times_s.min()))
            self._chosen[key] = num_fetched, float(times_s[num_fetched])
        return self._chosen[key]

    def _probe(self, work: LayerWork, num_fetched: int, best_s: float) -> int:
        """The plan, or a pure one whose turn it is and which may cost what it does."""
        pure = len(work.ram) if self._probes_device else 0
        if pure == num_fetched:
            self._probes_device = not self._probes_device
            return num_fetched
        if self._probe_budget_s < best_s:  # not worth asking what it costs
            return num_fetched
        assert self._acting is not None
        cost_s = max(float(self._acting.times(work)[pure]) - best_s, best_s)
        if self._probe_budget_s < cost_s:
            return num_fetched
        self._probe_budget_s = 0.0
        self._probes_device = not self._probes_device
        return pure

    def _learn(self) -> bool:
        """Let decisions follow the latest coefficients; returns whether there are any."""
        if min(self._copy.num_observations, self._cpu.num_observations) < _LEAST_OBSERVATIONS:
            return False
        self._acting = self._latest()
        self._chosen.clear()
        self._loss = 0.0
        return True

    def _settle(self, work: LayerWork) -> None:
        """Learn if the decision about this layer has long been wrong by what is known now."""
        self._num_unchecked += 1
        if self._acting is None or not len(work.ram) or self._num_unchecked < _LAYERS_BETWEEN_CHECKS:
            return
        self._num_unchecked = 0
        latest = self._latest()
        times_s = latest.times(work)
        loss = float(times_s[self._best(work)[0]] / times_s.min()) - 1
        # A cumulative sum (Page, 1954): losses must exceed what is tolerated on the whole.
        self._loss = max(0.0, self._loss + loss - _TOLERATED_LOSS)
        if self._loss > _LOSS_TO_LEARN or (latest.read_s > 0) != (self._acting.read_s > 0):
            self._learn()

    def _latest(self) -> _Coefficients:
        return _Coefficients(
            device=self._device.coefficients(),
            cpu=self._cpu.coefficients(),
            copy_s=float(self._copy.coefficients()[0]),
            read_s=float(self._read.coefficients()[0]),
        )


def _expert_features(tokens: NDArray[np.integer]) -> NDArray[np.float64]:
    """[experts, 1 + kinks]: what an expert's time on the CPU is linear in."""
    above = [np.maximum(tokens - kink, 0) for kink in _KINKS]
    return np.stack([np.ones(len(tokens)), *above], axis=1).astype(np.float64)
