"""The benchmark of codes: figures for all of them, which say nothing about speed."""

from mpilm.bench import compress


def test_figures_for_all(comm):
    """And how much they send, which must be right."""
    figures = []
    compress.run(comm, lambda *figure: figures.append(figure), mib=1)
    codes = {"bf16", "int8", "onebit", "topk"}
    cases = ("encode", "encode with feedback", "decode")
    wanted = {(case, who) for case in cases for who in codes | {"copy"}} | {("size", who) for who in codes}
    assert {(case, who) for case, who, _, _ in figures} == wanted
    assert all(value > 0 for _, _, value, _ in figures)
    sizes = {who: round(value, 2) for case, who, value, _ in figures if case == "size"}
    assert sizes == {"bf16": 2.0, "int8": 1.02, "onebit": 0.13, "topk": 0.06}
