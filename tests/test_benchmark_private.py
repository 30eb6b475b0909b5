from private import table


def test_table_gives_the_share_of_the_gap_that_is_closed_seed_by_seed() -> None:
    losses = {(0.0, 0): 4.0, (0.0, 1): 5.0, (1.0, 0): 4.5, (1.0, 1): 5.25}
    cells = {f"ffa z={z:g} seed={seed}": {"before": 6.0, "after": after} for (z, seed), after in losses.items()}
    rows = table(cells, ["ffa"], [0.0, 1.0], [0, 1]).splitlines()
    assert rows[0] == "| Aggregation | base model | z = 0 | z = 1 |"
    assert rows[2] == "| ffa | 6.00 | 4.50 [4.00, 5.00], 100% | 4.88 [4.50, 5.25], 75% |"  # (1.5/2 + 0.75/1) / 2


def test_table_without_the_reference_gives_no_share() -> None:
    cells = {"ffa z=1 seed=0": {"before": 6.0, "after": 4.5}}
    assert table(cells, ["ffa"], [1.0], [0]).endswith("| ffa | 6.00 | 4.50 [4.50, 4.50] |")
