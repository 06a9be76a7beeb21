"""The generator against the vectors that its authors publish, and the mask against its definition."""

import pytest
import torch

from pelt_fast.random import keep_scale, keep_threshold, new_seed, philox_mask, philox_words

M32 = 0xFFFFFFFF


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Straight from Salmon et al. 2011, in Python integers."""
    c, (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = ((right >> 32) ^ c[1] ^ k0, right & M32, (left >> 32) ^ c[3] ^ k1, left & M32)
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c


# kat_vectors of the Random123 distribution, "philox4x32 10"
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((M32, M32, M32, M32), (M32, M32), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zero", "ones", "pi"])
def test_python_philox_gives_the_published_words(counter, key, words):
    assert philox4x32_10(counter, key) == words


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def test_words_at_counter_zero_and_seed_zero_are_the_published_ones():
    words = philox_words(torch.zeros(1, dtype=torch.int64), 0, torch.zeros(1, dtype=torch.int64))
    assert tuple(words[0].tolist()) == KNOWN_ANSWERS[0][2]


@pytest.mark.parametrize(
    "seed", [0, 1, M32, 1 << 32, 0x299F31D0A4093822, 2**63 - 1, 2**63, 2**64 - 1]
)
@pytest.mark.parametrize("stream", [0, 1, 7])
def test_words_are_philox_of_64_bit_counters_and_seeds(seed, stream):
    counters = [0, 1, 2, M32, 1 << 32, (1 << 32) + 5, (1 << 61) + 12345]
    words = philox_words(torch.tensor(counters), stream, torch.tensor([signed(seed)]))
    expected = [
        philox4x32_10((c & M32, c >> 32, stream, 0), (seed & M32, seed >> 32)) for c in counters
    ]
    assert [tuple(row) for row in words.tolist()] == expected


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (7, 13)])
def test_mask_is_word_e_mod_4_of_counter_e_div_4(shape):
    seed, p, adapter = 0x123456789ABCDEF0, 0.3, 2
    mask = philox_mask(torch.tensor([seed]), shape, p, adapter)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    key = (seed & M32, seed >> 32)
    expected = [
        philox4x32_10((e // 4, 0, adapter, 0), key)[e % 4] >= keep_threshold(p)
        for e in range(shape[0] * shape[1])
    ]
    assert mask.flatten().tolist() == expected


def test_threshold_and_scale_at_the_ends():
    assert keep_threshold(0.0) == 0
    assert keep_threshold(0.5) == 2**31
    assert keep_threshold(1.0) == M32
    assert keep_scale(0.0) == 1.0
    assert keep_scale(0.5) == 2.0
    assert keep_scale(1.0) == 0.0


@pytest.mark.parametrize(("p", "kept"), [(0.0, True), (1.0, False)])
def test_p_0_keeps_and_p_1_drops_everything(p, kept):
    assert bool((philox_mask(torch.tensor([5]), (50, 40), p) == kept).all())


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_kept_fraction_is_1_minus_p(p):
    n = 200 * 512
    kept = philox_mask(torch.tensor([42]), (200, 512), p).sum().item()
    # five standard deviations of the binomial distribution, for a fixed seed
    assert abs(kept - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5


def test_words_are_uniform():
    """Chi-square over 256 bins of the upper bits, and of the lower bits, of each of the four words."""
    words = philox_words(torch.arange(1 << 14), 0, torch.tensor([7]))
    for column in words.T:
        for bits in (column >> 24, column & 0xFF):
            counts = torch.bincount(bits, minlength=256).double()
            expected = len(column) / 256
            chi2 = ((counts - expected) ** 2 / expected).sum().item()
            # mean 255, standard deviation √510: five deviations either way
            assert abs(chi2 - 255) < 5 * 510**0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 512])
def test_neighbouring_elements_are_independent(lag):
    keep = philox_mask(torch.tensor([11]), (200, 512), 0.5).flatten().double() * 2 - 1
    correlation = (keep[lag:] * keep[:-lag]).sum().item()
    assert abs(correlation) < 5 * (keep.numel() - lag) ** 0.5


def test_adapters_and_seeds_draw_independent_masks():
    first = philox_mask(torch.tensor([1]), (100, 100), 0.5, 0)
    for other in (
        philox_mask(torch.tensor([1]), (100, 100), 0.5, 1),
        philox_mask(torch.tensor([2]), (100, 100), 0.5, 0),
    ):
        agreements = (first == other).sum().item()
        assert abs(agreements - 5000) < 5 * 50


def test_new_seed_follows_torchs_generator():
    torch.manual_seed(3)
    first, second = new_seed(torch.device("cpu")), new_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert first == new_seed(torch.device("cpu"))
    assert first != second
    assert first.dtype == torch.int64
    assert first.shape == (1,)
