"""What outsiders send harms no neighbour, and what insiders know is told to nobody."""

import pytest

from tests.faults import exposure, inputs
from tests.faults.scenarios import Run, named
from tests.faults.stand import Stand


@pytest.mark.parametrize(
    "fault",
    [
        inputs.hostile_events,
        inputs.unpack_bombs,
        inputs.http_faults,
        inputs.slow_drips,
        inputs.many_stalls,
        inputs.addresses,
        inputs.odd_audio,
    ],
    ids=named,
)
async def test_hostile_input_ends_with_a_reason_and_its_neighbours_in_time(
    stand: Stand, fault: Run
) -> None:
    outcome = await fault(stand, True)

    assert outcome.verdict.lost == 0
    assert outcome.verdict.dead_letters > 0
    assert outcome.verdict.tags > 0


@pytest.mark.parametrize("look", [exposure.port, exposure.secrets], ids=named)
async def test_a_worker_shows_what_it_documents_and_no_secret(stand: Stand, look: Run) -> None:
    outcome = await look(stand, True)

    assert outcome.verdict.lost == 0
