import itertools

import torch

from lrlhf.functional.randomness import generator


def draws(*place, seed: int = 0) -> list[float]:
    return torch.rand(4, generator=generator(seed, *place)).tolist()


def test_the_same_place_gives_the_same_numbers():
    assert draws("sampling", 3) == draws("sampling", 3)


def test_every_other_place_and_seed_gives_other_numbers():
    places = [(), ("a",), ("b",), ("a", 0), ("a", 1), ("a", 1, 2), ("a", 2, 1), ("a", 12), ("a1",), ("a", "1"), (1,)]
    streams = [draws(*place) for place in places] + [draws("a", seed=1)]
    assert all(x != y for x, y in itertools.combinations(streams, 2))


def test_the_global_generator_neither_matters_nor_moves():
    torch.manual_seed(1)
    first, state = draws("sampling"), torch.get_rng_state()
    torch.manual_seed(2)
    assert draws("sampling") == first
    torch.manual_seed(1)
    draws("sampling")
    torch.rand(4, generator=generator(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_two_generators_do_not_disturb_each_other():
    alone = generator(0, "a")
    expected = [torch.rand((), generator=alone).item() for _ in range(3)]
    a, b = generator(0, "a"), generator(0, "b")
    got = []
    for _ in range(3):
        got.append(torch.rand((), generator=a).item())
        torch.rand(5, generator=b)
    assert got == expected


def test_a_place_keeps_its_seed_in_every_process_and_release():
    # printf "(0, 'sampling', 3)" | sha256sum: its first 8 bytes, little-endian
    assert generator(0, "sampling", 3).initial_seed() == int.from_bytes(bytes.fromhex("b169d8e1a8202d1d"), "little")
