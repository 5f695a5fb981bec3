"""Token -> experts tables against independent re-implementations, bounds and literal goldens."""

import hashlib
import itertools
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from braidax import hash_tables

BUILDERS = (hash_tables.md5, hash_tables.random, hash_tables.round_robin)
LARGEST_SALT = 2**64 - 1
GOLDEN_ROWS_0 = [
    [74, 52, 127, 191, 162, 63],
    [8, 128, 73, 137, 237, 146],
    [198, 68, 228, 253, 250, 55],
]
GOLDEN_ROWS_2 = [
    [130, 112, 230, 174, 162, 15],
    [179, 238, 116, 85, 117, 36],
    [157, 83, 162, 176, 36, 236],
]
GOLDEN_DIGESTS = {
    "md5": "d31c4cdfbe81a8a73739f1c7b50bbf94119a37de398235df95711bf95fb8a400",
    "random": "10dd5776a3d43ec4e52e09264fe1945d144a4890ede9733f4ce62237b735d3db",
    "round_robin": "79cb42b63909b124fdf95a3837fc14598f061dfa1f98df90baf40d96ab596809",
    "balanced": "2bfad484c8810abae46cf6a570b801e878417f679e594bf00f24316bcf66cb61",
    "balanced, refined": "46f74d3721ea8aee865f4f98865ec44b6b88141b87c83bb282314359b976bec0",
    "from_array": "cf002bd8de838e401eccbe30568582019b5baacf446ce26f295bd8af32b81365",
}


def oracle_md5_row(token, num_experts, num_experts_per_token, salt):
    """The rule of the design page with Python integers, one token at a time."""
    number = int.from_bytes(hashlib.md5(struct.pack("<QQ", salt, token)).digest(), "little")
    pool = list(range(num_experts))
    row = []
    for slot in range(num_experts_per_token):
        number, remainder = divmod(number, num_experts - slot)
        row.append(pool[remainder])
        pool[remainder] = pool[num_experts - 1 - slot]
    return row


def loads_of(table, counts, num_experts):
    loads = np.zeros(num_experts, np.int64)
    np.add.at(loads, table, np.asarray(counts)[:, None])
    return loads


def largest_load_bound(counts, num_experts, num_experts_per_token):
    """A largest load that no table can beat.

    The mean, of course. And the `m` heaviest tokens fill `m * K` slots, so some expert holds at
    least `q = ceil(m * K / E)` of these tokens, at best the `q` lightest (`m = 1`: the heaviest
    token alone).
    """
    descending = sorted((int(count) for count in counts), reverse=True)
    prefix = [0, *itertools.accumulate(descending)]
    bound = prefix[-1] * num_experts_per_token / num_experts
    for m in range(1, len(descending) + 1):
        q = -(-m * num_experts_per_token // num_experts)
        bound = max(bound, prefix[m] - prefix[m - q])
    return bound


def water_level(counts, num_experts, num_experts_per_token):
    """The load of an expert without heavy tokens if the rest could be poured freely.

    `h` tokens heavier than the level `L` pin `h * K` experts; the others share the light tokens:
    `L * (E - h * K) = K * sum(light)`, that is `E * L = K * sum(min(count, L))`.
    """
    remaining = sum(int(count) for count in counts) * num_experts_per_token
    free = num_experts
    for count in sorted((int(count) for count in counts), reverse=True):
        if count * free <= remaining:
            break
        remaining -= count * num_experts_per_token
        free -= num_experts_per_token
    return remaining / free


def zipf_counts(vocab_size, exponent, largest):
    counts = largest / np.arange(1, vocab_size + 1) ** exponent
    return np.random.default_rng(0).permutation(counts.astype(np.int64))


def byte_counts():
    """256 tokens, many of them absent, a few frequent: 1 million bytes of something like text."""
    rng = np.random.default_rng(1)
    return rng.multinomial(1_000_000, rng.dirichlet(np.full(256, 0.3)))


COUNTS = {
    "uniform": (np.full(1000, 7), 16, 2),
    "uniform, not divisible": (np.full(10, 3), 4, 1),
    "zipf": (zipf_counts(129_280, 1.0, 1e9), 256, 6),
    "zipf, mostly zeros": (zipf_counts(20_000, 1.0, 5000), 64, 6),
    "flat zipf": (zipf_counts(1000, 0.5, 1e9), 256, 6),
    "bytes": (byte_counts(), 16, 2),
    "flat bytes": (zipf_counts(256, 0.5, 1e6), 16, 2),
    "zeros": (np.zeros(100, np.int64), 16, 3),
    "one token": (np.array([5]), 16, 3),
    "one token among zeros": (np.array([0, 0, 5, 0, 0]), 4, 2),
    "every expert": (np.array([5, 3, 1]), 3, 3),
    "large": (np.array([2**60, 2**60, 2**60, 1], np.uint64), 4, 2),
}
BALANCED = {name: hash_tables.balanced(*case) for name, case in COUNTS.items()}


def assert_valid(table, vocab_size, num_experts, num_experts_per_token):
    assert isinstance(table, np.ndarray)
    assert table.dtype == np.int32
    assert table.shape == (vocab_size, num_experts_per_token)
    assert table.min() >= 0
    assert table.max() < num_experts
    assert (np.diff(np.sort(table, axis=1), axis=1) > 0).all()


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("salt", [0, 3, LARGEST_SALT])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (7, 5, 5), (300, 16, 2), (5000, 256, 6), (3, 4096, 8)]
)
def test_tables_are_valid_and_repeatable(build, sizes, salt):
    table = build(*sizes, salt=salt)
    assert_valid(table, *sizes)
    np.testing.assert_array_equal(build(*sizes, salt=salt), table)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_larger_vocabulary_extends_a_smaller_one_across_chunks(build):
    np.testing.assert_array_equal(build(9000, 256, 6, salt=2)[:100], build(100, 256, 6, salt=2))


@pytest.mark.parametrize("build", BUILDERS)
def test_salt_changes_the_table(build):
    assert (build(100, 16, 2, salt=0) != build(100, 16, 2, salt=1)).any()


@pytest.mark.parametrize("salt", [0, 2, LARGEST_SALT])
@pytest.mark.parametrize("sizes", [(256, 6), (16, 2), (8, 8), (384, 8), (1, 1), (300, 20)])
def test_md5_matches_plain_python(sizes, salt):
    expected = [oracle_md5_row(token, *sizes, salt) for token in range(300)]
    assert hash_tables.md5(300, *sizes, salt=salt).tolist() == expected


def test_md5_last_chunk_matches_plain_python():
    table = hash_tables.md5(9000, 256, 6, salt=1)
    for token in range(4000, 9000, 37):
        assert table[token].tolist() == oracle_md5_row(token, 256, 6, 1)


def test_md5_golden_rows():
    table = hash_tables.md5(129_280, 256, 6, salt=0)
    assert table[[0, 1, 129_279]].tolist() == GOLDEN_ROWS_0
    assert hash_tables.md5(3, 256, 6, salt=2).tolist() == GOLDEN_ROWS_2


@pytest.mark.parametrize("build", [hash_tables.md5, hash_tables.random])
def test_hashed_slots_are_uniform_and_pairs_mix(build):
    table = build(20_000, 16, 2)
    for slot in range(2):
        load = np.bincount(table[:, slot], minlength=16)
        assert abs(load - 1250).max() < 6 * 1250**0.5
    pairs = np.bincount(table[:, 0] * 16 + table[:, 1], minlength=256).reshape(16, 16)
    assert (np.diag(pairs) == 0).all()
    assert (pairs + np.diag(np.full(16, 83)) > 30).all()


def test_round_robin_by_hand():
    assert hash_tables.round_robin(4, 5, 2).tolist() == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert hash_tables.round_robin(2, 5, 2, salt=4).tolist() == [[4, 0], [1, 2]]
    # 2**64 - 1 is divisible by 5.
    assert hash_tables.round_robin(1, 5, 2, salt=LARGEST_SALT).tolist() == [[0, 1]]


def digest(table):
    return hashlib.sha256(table.astype("<i4").tobytes()).hexdigest()


def test_golden_digests():
    assert {
        "md5": digest(hash_tables.md5(1000, 16, 2, salt=3)),
        "random": digest(hash_tables.random(1000, 16, 2, salt=3)),
        "round_robin": digest(hash_tables.round_robin(1000, 16, 2, salt=3)),
        "balanced": digest(hash_tables.balanced(np.arange(1000) % 97, 16, 2, salt=3)),
        "balanced, refined": digest(hash_tables.balanced(range(1, 41), 16, 2, salt=3)),
        "from_array": digest(hash_tables.from_array(np.arange(1000).reshape(500, 2) % 16, 16)),
    } == GOLDEN_DIGESTS


@pytest.mark.parametrize("name", COUNTS)
def test_balanced_is_within_one_percent_of_the_bound(name):
    counts, num_experts, num_experts_per_token = COUNTS[name]
    assert_valid(BALANCED[name], len(counts), num_experts, num_experts_per_token)
    loads = loads_of(BALANCED[name], counts.astype(np.int64), num_experts)
    assert loads.max() <= 1.01 * largest_load_bound(counts, num_experts, num_experts_per_token)


@pytest.mark.parametrize("name", ["uniform", "zipf", "flat zipf", "bytes", "flat bytes"])
def test_balanced_experts_without_heavy_tokens_are_level(name):
    counts, num_experts, num_experts_per_token = COUNTS[name]
    level = water_level(counts, num_experts, num_experts_per_token)
    heavy = BALANCED[name][counts > level]
    light_loads = np.delete(loads_of(BALANCED[name], counts, num_experts), heavy)
    assert len(light_loads) == num_experts - heavy.size
    assert abs(light_loads - level).max() <= 0.01 * level


@pytest.mark.parametrize("counts", [[9, 7, 6, 5], [1, 1, 1, 1], [5, 4, 3, 3], [8, 1, 1, 0]])
def test_the_bound_is_a_bound_by_exhaustion(counts):
    rows = list(itertools.combinations(range(4), 2))
    best = min(
        loads_of(np.array(table), counts, 4).max() for table in itertools.product(rows, repeat=4)
    )
    assert largest_load_bound(counts, 4, 2) <= best
    assert loads_of(hash_tables.balanced(counts, 4, 2), counts, 4).max() == best


@pytest.mark.parametrize("name", ["zipf, mostly zeros", "zeros", "one token among zeros"])
def test_balanced_spreads_unseen_tokens_evenly(name):
    counts, num_experts, _ = COUNTS[name]
    ids = np.bincount(BALANCED[name][counts == 0].ravel(), minlength=num_experts)
    assert ids.max() - ids.min() <= 1


@pytest.mark.parametrize("name", ["uniform", "flat zipf", "bytes", "flat bytes"])
def test_balanced_salt_changes_the_table_not_the_loads(name):
    counts, num_experts, num_experts_per_token = COUNTS[name]
    salted = hash_tables.balanced(counts, num_experts, num_experts_per_token, salt=LARGEST_SALT)
    assert_valid(salted, len(counts), num_experts, num_experts_per_token)
    assert (salted != BALANCED[name]).any(axis=1).mean() > 0.5
    np.testing.assert_array_equal(
        np.sort(loads_of(salted, counts, num_experts)),
        np.sort(loads_of(BALANCED[name], counts, num_experts)),
    )
    again = hash_tables.balanced(counts, num_experts, num_experts_per_token, salt=LARGEST_SALT)
    np.testing.assert_array_equal(again, salted)


def test_balanced_does_not_glue_experts_together():
    table = hash_tables.balanced(np.full(2000, 3), 16, 2)
    assert len({tuple(sorted(row)) for row in table.tolist()}) == 120


@pytest.mark.parametrize(
    ("counts", "error", "match"),
    [
        ([], ValueError, r"`token_counts` must have shape .* Got \(0,\)"),
        ([[1, 2]], ValueError, r"`token_counts` must have shape .* Got \(1, 2\)"),
        ([1, -2, -3], ValueError, r"`token_counts` must be >= 0. Got -2 for token 1"),
        ([1.0, 2.0], TypeError, "`token_counts` must have an integer dtype. Got float64"),
        ([True, False], TypeError, "`token_counts` must have an integer dtype. Got bool"),
        ([2**62 - 1, 1], ValueError, r"`token_counts` must sum to less than 2\*\*62"),
    ],
)
def test_balanced_rejects_bad_counts(counts, error, match):
    with pytest.raises(error, match=match):
        hash_tables.balanced(counts, 4, 2)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64, ">i4"])
def test_from_array_accepts_integers_and_duplicates(dtype):
    table = hash_tables.from_array(np.array([[3, 3], [0, 15]], dtype), 300)
    assert table.dtype == np.int32
    assert table.tolist() == [[3, 3], [0, 15]]


def test_from_array_accepts_lists_and_jax_arrays_and_copies():
    assert hash_tables.from_array([[1, 0]], 2).tolist() == [[1, 0]]
    assert hash_tables.from_array(jnp.array([[1, 0]]), 2).tolist() == [[1, 0]]
    source = np.array([[1, 0]], np.int32)
    hash_tables.from_array(source, 2)[0, 0] = 0
    assert source.tolist() == [[1, 0]]


@pytest.mark.hazard(7)
@pytest.mark.parametrize(
    ("array", "error", "match"),
    [
        ([[0, 1], [2, 4], [-1, 0]], ValueError, r"num_experts=4.*Got 4 at row 1, column 1"),
        ([[0, 1], [-1, 4]], ValueError, "Got -1 at row 1, column 0"),
        (np.array([[2**64 - 1]], np.uint64), ValueError, f"Got {2**64 - 1} at row 0, column 0"),
        (np.array([[2**32]]), ValueError, f"Got {2**32} at row 0, column 0"),
        ([[0.0, 1.0]], TypeError, "`array` must have an integer dtype. Got float64"),
        ([[True, False]], TypeError, "`array` must have an integer dtype. Got bool"),
        ([0, 1], ValueError, r"`array` must have shape .* Got \(2,\)"),
        (np.zeros((0, 2), np.int32), ValueError, r"`array` must have at least 1 row"),
        (np.zeros((2, 0), np.int32), ValueError, r"`array` must have at least 1 row"),
        (np.zeros((2, 5), np.int32), ValueError, r"`array` .* num_experts=4"),
    ],
)
def test_from_array_rejects(array, error, match):
    with pytest.raises(error, match=match):
        hash_tables.from_array(array, 4)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("sizes", "salt", "match"),
    [
        ((0, 4, 2), 0, "`vocab_size` must be between 1 and .* Got 0"),
        ((3, 0, 2), 0, "`num_experts` must be between 1 and .* Got 0"),
        ((3, 2**31, 2), 0, "`num_experts` must be between 1 and .* Got 2147483648"),
        ((3, 4, -1), 0, "`num_experts_per_token` must be between 1 and .* Got -1"),
        ((3, 4, 5), 0, "`num_experts_per_token` must be at most num_experts=4. Got 5"),
        ((3, 4, 2), -1, "`salt` must be between 0 and .* Got -1"),
        ((3, 4, 2), 2**64, "`salt` must be between 0 and .* Got 18446744073709551616"),
    ],
)
def test_sizes_out_of_range(build, sizes, salt, match):
    with pytest.raises(ValueError, match=match):
        build(*sizes, salt=salt)
    if sizes[0] == 3:
        with pytest.raises(ValueError, match=match):
            hash_tables.balanced([1, 2, 3], *sizes[1:], salt=salt)


@pytest.mark.parametrize("build", BUILDERS)
def test_sizes_of_the_wrong_type(build):
    for position, name in enumerate(("vocab_size", "num_experts", "num_experts_per_token")):
        for value in (2.0, True, None):
            sizes = [3, 4, 2]
            sizes[position] = value
            with pytest.raises(TypeError, match=name):
                build(*sizes)
    with pytest.raises(TypeError, match="salt"):
        build(3, 4, 2, salt=0.5)
