"""Files of results name the weights that they are of, and those of other weights are known."""

from __future__ import annotations

import shutil

from sparsefeat.assets import embedded_fingerprint, weights_fingerprint
from sparsefeat.assets.embedded import SAES
from sparsefeat.evaluation.results import measured_on_embedded, stale


def test_results_of_now_are_not_stale_and_those_of_others_or_of_nobody_knows_which_are():
    now = measured_on_embedded()
    assert not stale(now)
    assert stale({**now, "fingerprint": "0" * 12})
    assert stale({"device": now["device"]})


def test_a_fingerprint_changes_with_any_file_of_weights_and_with_no_other(tmp_path):
    folder = tmp_path / "saes"
    shutil.copytree(SAES, folder)
    own = weights_fingerprint(SAES)
    assert weights_fingerprint(folder) == own  # wherever it lies
    (folder / "report.json").write_text("{}")
    assert weights_fingerprint(folder) == own  # a report is no weight
    config = next(folder.glob("*/config.json"))
    config.write_text(config.read_text() + " ")
    changed = weights_fingerprint(folder)
    config.rename(config.with_name("other.json"))
    assert len({own, changed, weights_fingerprint(folder), embedded_fingerprint()}) == 4
