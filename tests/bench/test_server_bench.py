"""The benchmark of parameter servers: its menu, and a run that says nothing about speed."""

import pytest

from mpilm.bench import _servers, server
from mpilm.bench.__main__ import _parser
from mpilm.bench._contenders import CASES, Place
from mpilm.bench._servers import mpilm
from mpilm.bench._serving import Pace
from mpilm.log import UserError


@pytest.mark.serial
def test_a_name_says_who_serves():
    """And how parameters come back."""
    found = {}
    for name in _servers.names():
        config = mpilm.configuration(CASES["tiny"], Place(0, 2, (0,), "", _servers.who(name).variants))
        found[name] = config.sync.kind, config.run.precision
    assert found == {"mpilm-server": ("parameter_server", "bf16"), "mpilm-alone": ("allreduce", "bf16"),
                     "mpilm-server-fp32": ("parameter_server", "fp32"), "mpilm-alone-fp32": ("allreduce", "fp32")}
    with pytest.raises(UserError, match="there are mpilm-server"):
        _servers.who("mpilm")


@pytest.mark.serial
def test_slow_steps_are_one_worker_s_or_anyone_s():
    """The same in every run."""
    one, anyone = Pace(40, 1.0, 4.0), Pace(40, 1.0, 4.0, anyone=True)
    assert [sum(one.of(worker, 3)) for worker in range(3)] == [40, 40, 160]
    assert all(40 < sum(anyone.of(worker, 3)) < 160 for worker in range(3))
    assert anyone.of(1, 3) == anyone.of(1, 3) != anyone.of(2, 3)


@pytest.mark.ranks(min=3, max=3)
def test_figures_for_all(comm):
    """Training beside one rank alone, updates beside bare MPI, and the curve over staleness."""
    found = {}

    def emit(case, who, value, unit):
        assert value > 0
        found.setdefault((case, unit), []).append(who)

    given = vars(_parser().parse_args(["server", "--case", "tiny", "--rounds", "1", "--steps", "1", "--mib", "1",
                                       "--sleep_ms", "1"]))
    server.run(comm, emit, **{name: value for name, value in given.items() if name not in ("name", "json")})
    bounds = ["mpilm-s0", "mpilm-s1", "mpilm-s4", "mpilm-inf"]
    assert found == {("tiny", "tokens/s"): ["mpilm-server", "mpilm-alone"],
                     ("update of 1 MiB by 2 workers", "ms"): ["mpilm-server", "bare"],
                     ("nobody slow", "steps/s"): bounds, ("one slow worker", "steps/s"): bounds,
                     ("anyone slow at times", "steps/s"): bounds}
