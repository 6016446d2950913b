"""Where experts stand when serving: hot ones more than once, devices evenly loaded, from recorded loads.

The idea is that of DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB; DeepSeek-V3, arXiv 2412.19437, section 3.4.1):
slots beyond one an expert go to whichever expert's copies are busiest, and copies are packed onto devices heaviest
first. Here no expert has two copies on a device as long as there are other places, swaps improve the packing, and the
result is never worse than experts in a row.

Dimensions: L layers, E experts, S slots (physical experts), D devices, H hosts, C copies of the expert that has most.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moejax.checks import check

_STARTS = 10  # of the search for a placement no worse than experts in a row; small cases need two at most


class Placement(NamedTuple):
    """For each layer, which expert is in each slot. Device d has the S / D slots from d * S / D on; hosts likewise.

    The loads are predictions: those given, an expert's divided evenly among its copies.
    """

    expert_of_slot_LS: np.ndarray  # int32
    slots_of_expert_LEC: np.ndarray  # int32, -1 behind the last
    copies_LE: np.ndarray  # int32
    device_load_LD: np.ndarray  # float64
    device_load_before_LD: np.ndarray  # of experts once each and in a row

    def max_over_mean(self) -> tuple[np.ndarray, np.ndarray]:
        """The busiest device's load over the mean, by layer [L]: before and with this placement."""
        return tuple(x_LD.max(-1) / x_LD.mean(-1) for x_LD in (self.device_load_before_LD, self.device_load_LD))

    def load_cv(self) -> tuple[np.ndarray, np.ndarray]:
        """The coefficient of variation of the devices' loads, by layer [L]: before and with this placement."""
        return tuple(x_LD.std(-1) / x_LD.mean(-1) for x_LD in (self.device_load_before_LD, self.device_load_LD))


def place_experts(
    load_LE: np.ndarray, num_slots: int, num_devices: int, *, num_hosts: int = 1, num_groups: int = 1
) -> Placement:
    """Places the experts of each layer on devices of `num_slots / num_devices` slots each.

    With hosts, the experts of a group (of `num_groups` equal, consecutive ones) and all their copies are inside one
    host, each host having as many groups: for routers that send a token to few groups. Without, groups do not matter.

    Args:
        load_LE: assignments to each expert over some time, as `BalanceReport.load_LE` has them; none negative.
        num_slots: S, at least E and a multiple of `num_devices`.
        num_devices: D, a multiple of `num_hosts`.
        num_hosts: H.
        num_groups: a multiple of `num_hosts` that divides E.

    Raises:
        ConfigError: the sizes do not fit, or a layer has no load.
    """
    load_LE = np.asarray(load_LE, np.float64)
    check(load_LE.ndim == 2, f"load_LE has shape {load_LE.shape}; it must be [layers, experts]")
    num_experts = load_LE.shape[1]
    check(
        bool((load_LE >= 0).all() and (load_LE.sum(-1) > 0).all()),
        "load_LE must be 0 or more, and more than 0 somewhere in every layer",
    )
    check(num_devices % num_hosts == 0, f"num_devices={num_devices} must be a multiple of num_hosts={num_hosts}")
    check(
        num_slots >= num_experts and num_slots % num_devices == 0,
        f"num_slots={num_slots} must be a multiple of num_devices={num_devices} and at least the {num_experts} experts",
    )
    if num_hosts > 1:
        check(
            num_groups % num_hosts == 0 and num_experts % num_groups == 0,
            f"num_groups={num_groups} must be a multiple of num_hosts={num_hosts} and divide the {num_experts} experts",
        )
    slots_LS = np.stack([_place_layer(load_E, num_slots, num_devices, num_hosts, num_groups) for load_E in load_LE])
    copies_LE = np.stack([np.bincount(slots_S, minlength=num_experts) for slots_S in slots_LS])
    before_LD = np.zeros((len(load_LE), num_devices))
    np.add.at(before_LD, (slice(None), _home(num_experts, num_devices, num_hosts)), load_LE)  # type: ignore[arg-type]  # no slices in the stubs
    per_slot_LS = np.take_along_axis(load_LE / copies_LE, slots_LS, axis=1)
    return Placement(
        slots_LS.astype(np.int32),
        _inverse(slots_LS, copies_LE),
        copies_LE.astype(np.int32),
        per_slot_LS.reshape(len(load_LE), num_devices, -1).sum(-1),
        before_LD,
    )


def _home(num_experts: int, num_devices: int, num_hosts: int) -> np.ndarray:
    """The device of each expert when they stand in a row, hosts dealt out evenly: int [E]."""
    host, inside = divmod(np.arange(num_experts) * num_hosts, num_experts)
    per_host = num_devices // num_hosts
    return host * per_host + inside * per_host // num_experts


def _place_layer(load_E: np.ndarray, num_slots: int, num_devices: int, num_hosts: int, num_groups: int) -> np.ndarray:
    """The expert in each slot, int [S]."""
    num_experts = len(load_E)
    if num_hosts > 1:
        of_group = np.arange(num_experts).reshape(num_groups, -1)
        groups_of_host = _pack(load_E[of_group].sum(1), np.arange(num_groups), num_hosts)
    else:
        of_group, groups_of_host = np.arange(num_experts)[None], np.zeros((1, 1), int)
    devices = []
    for groups in groups_of_host:
        experts = of_group[groups].reshape(-1)
        copies = _copies(load_E[experts], num_slots // num_hosts, num_devices // num_hosts)
        expert_N = np.repeat(experts, copies)
        load_N = np.repeat(load_E[experts] / copies, copies)
        devices += list(expert_N[_pack(load_N, expert_N, num_devices // num_hosts)])
    return _unless_worse(np.stack(devices), load_E, num_hosts).reshape(-1)


def _copies(load_E: np.ndarray, num_slots: int, num_devices: int) -> np.ndarray:
    """How many slots each expert gets: one, and each further one to where a copy has most to do.

    More copies than devices would be two on one device: only if there are slots for everybody to have that many.
    """
    copies_E = np.ones(len(load_E), int)
    for _ in range(num_slots - len(load_E)):
        room_E = copies_E < num_devices if (copies_E < num_devices).any() else np.ones_like(copies_E, bool)
        copies_E[np.argmax(np.where(room_E, load_E / copies_E, -1.0))] += 1
    return copies_E


def _pack(load_N: np.ndarray, expert_N: np.ndarray, num_bins: int) -> np.ndarray:
    """Equal numbers of items in each bin, evenly loaded, none beside another of its expert where that can be.

    Returns the items of each bin, int [bins, N / bins].
    """
    size = len(load_N) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    total = np.zeros(num_bins)
    for item in np.argsort(-load_N, kind="stable"):
        open_bins = [b for b in range(num_bins) if len(bins[b]) < size]
        best = min(open_bins, key=lambda b: (expert_N[item] in expert_N[bins[b]], total[b]))
        bins[best].append(int(item))
        total[best] += load_N[item]
    items_BN = np.asarray(bins)
    while _swap(items_BN, load_N, expert_N):
        pass
    return items_BN


def _swap(items_BN: np.ndarray, load_N: np.ndarray, expert_N: np.ndarray) -> bool:
    """One exchange of two items between bins that parts two of an expert or unloads the fullest bin; False if none."""
    total_B, experts_BN = load_N[items_BN].sum(1), expert_N[items_BN]
    twice_BN = np.stack([(row[:, None] == row[None]).sum(1) > 1 for row in experts_BN])
    fullest = int(np.argmax(total_B))
    here = [(b, i, True) for b, i in np.argwhere(twice_BN)] + [(fullest, i, False) for i in range(items_BN.shape[1])]
    for b, i, parts in here:
        for other in range(len(items_BN)):
            absent = (experts_BN[other] != experts_BN[b, i]).all()
            allowed_N = absent & ~np.isin(experts_BN[other], experts_BN[b])
            gain_N = load_N[items_BN[b, i]] - load_N[items_BN[other]]
            higher_N = np.maximum(total_B[b] - gain_N, total_B[other] + gain_N)
            if not parts:
                allowed_N &= higher_N < total_B[b] * (1 - 1e-9)
            if other != b and allowed_N.any():
                j = int(np.argmin(np.where(allowed_N, higher_N, np.inf)))
                items_BN[b, i], items_BN[other, j] = items_BN[other, j], items_BN[b, i]
                return True
    return False


def _unless_worse(experts_DC: np.ndarray, load_E: np.ndarray, num_hosts: int) -> np.ndarray:
    """Returns this placement, or if its busiest device has more to do than with experts in a row, one that has not.

    That is searched for from this placement, then from experts in a row with others beside them, drawn at random. If
    none is found, experts in a row get their own copies beside them.
    """
    num_devices, size = experts_DC.shape
    home_E = _home(len(load_E), num_devices, num_hosts)
    own = [np.flatnonzero(home_E == d) for d in range(num_devices)]
    limit = max(load_E[experts].sum() for experts in own) * (1 + 1e-12)
    if _device_loads(experts_DC, load_E).max() <= limit:
        return experts_DC
    per_host = num_devices // num_hosts
    in_host = [np.concatenate(own[d - d % per_host :][:per_host]) for d in range(num_devices)]
    rng = np.random.default_rng(0)
    for _ in range(_STARTS if size <= min(map(len, in_host)) else 0):
        found = _apart_within(limit, experts_DC, load_E, num_hosts)
        if found is not None:
            return found
        beside = [rng.permutation(np.setdiff1d(in_host[d], own[d]))[: size - len(own[d])] for d in range(num_devices)]
        experts_DC = np.stack([np.concatenate(pair) for pair in zip(own, beside, strict=True)])
    return np.stack([np.resize(experts, size) for experts in own])


def _device_loads(experts_DC: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    copies_E = np.bincount(experts_DC.reshape(-1), minlength=len(load_E))
    return (load_E / np.maximum(copies_E, 1))[experts_DC].sum(1)


def _apart_within(limit: float, experts_DC: np.ndarray, load_E: np.ndarray, num_hosts: int) -> np.ndarray | None:
    """Takes the best move again and again; returns where it leads, None if that is above the limit or has repeats."""

    def score(experts_DC: np.ndarray) -> tuple[float, ...]:
        ordered_DC = np.sort(experts_DC, 1)
        repeats = int((ordered_DC[:, 1:] == ordered_DC[:, :-1]).sum())
        return repeats, *np.sort(_device_loads(experts_DC, load_E))[::-1]

    best = score(experts_DC)
    while best[0] > 0 or best[1] > limit:
        scores = [(score(moved_DC), n, moved_DC) for n, moved_DC in enumerate(_moves(experts_DC, load_E, num_hosts))]
        if not scores or min(scores)[0] >= best:
            return None
        best, _, experts_DC = min(scores)
    return experts_DC


def _moves(experts_DC: np.ndarray, load_E: np.ndarray, num_hosts: int) -> Iterator[np.ndarray]:
    """Yields placements that differ in an expert of the busiest device: changed, exchanged or copied to another one."""
    copies_E = np.bincount(experts_DC.reshape(-1), minlength=len(load_E))
    busiest = int(np.argmax(_device_loads(experts_DC, load_E)))
    per_host = len(experts_DC) // num_hosts
    first = busiest - busiest % per_host
    host = range(first, first + per_host)
    for d in host:
        wanted = np.unique(experts_DC[first : first + per_host]) if d == busiest else experts_DC[busiest]
        for slot, expert in enumerate(experts_DC[d]):
            for other in np.setdiff1d(wanted, experts_DC[d]):
                if copies_E[expert] > 1:
                    moved_DC = experts_DC.copy()
                    moved_DC[d, slot] = other
                    yield moved_DC
                for o, other_slot in np.argwhere(experts_DC == other) if d == busiest else ():
                    if expert not in experts_DC[o]:
                        moved_DC = experts_DC.copy()
                        moved_DC[d, slot], moved_DC[o, other_slot] = other, expert
                        yield moved_DC


def _inverse(slots_LS: np.ndarray, copies_LE: np.ndarray) -> np.ndarray:
    """The slots that hold each expert, ascending, -1 behind them: int32 [L, E, most copies]."""
    slots_LEC = np.full((*copies_LE.shape, copies_LE.max()), -1, np.int32)
    for layer, slots_S in enumerate(slots_LS):
        for expert, copies in enumerate(copies_LE[layer]):
            slots_LEC[layer, expert, :copies] = np.flatnonzero(slots_S == expert)
    return slots_LEC
