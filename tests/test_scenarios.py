"""Two hundred random trainings on one process, each against a plain float64 loop (`scenario_oracle`)."""

import pytest
import scenario_oracle
import scenarios


@pytest.mark.parametrize("seed", range(200))
@pytest.mark.filterwarnings("ignore:One gradient a step")
def test_a_random_training_is_the_plain_loops(seed, record_property):
    scenario = scenarios.draw(seed)
    scenarios.check(scenarios.run(scenario), scenario_oracle.expected(scenario), scenario, record_property)
