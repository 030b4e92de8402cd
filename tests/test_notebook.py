"""docs/notebook.ipynb: stored without outputs; and it runs, from the data to a student that MMDetection loads."""
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / 'docs' / 'notebook.ipynb'
# Cell -> what its result shows, as a table; those of trainings show curves, too.
SHOWN = {'kd_det.doctor(': 'operators', 'kd_det.train(': 'coco/bbox_mAP_50', 'kd_det.methods(': 'crosskd',
         'kd_det.distill(': 'coco/bbox_mAP_50', 'kd_det.inspect(': 'Balance', 'kd_det.evaluate(': 'coco/bbox_mAP_50',
         'kd_det.export(': 'FasterRCNN'}
# The line that was replaced again and again, as it is at the end.
PROGRESS = r'(\d+) of \1 iterations, epoch (\d+) of \2, loss [\d.]+, coco/bbox_mAP [\d.]+'
PICTURES = ('kd_det.train(', 'kd_det.distill(', 'kd_det.inspect(')


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def test_the_notebook_is_valid_and_stored_without_outputs(notebook):
    assert notebook.nbformat == 4
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count or cell.metadata for cell in notebook.cells
                   if cell.cell_type == 'code')


@pytest.mark.timeout(1800)  # a minute or two where nothing else runs
def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    for name in ('IPYTHONDIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_CONFIG_DIR'):
        monkeypatch.setenv(name, str(tmp_path / 'jupyter'))
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    folder = tmp_path / 'folder'
    folder.mkdir()
    client = NotebookClient(notebook, timeout=None, resources=dict(metadata=dict(path=str(folder))))
    client.execute(env=environment)  # raises what a cell raises

    shown = {}
    for cell in notebook.cells:
        call = next((call for call in SHOWN if cell.cell_type == 'code' and call in cell.source), None)
        if call:
            shown[call], = (output.data['text/html'] for output in cell.outputs
                            if output.output_type == 'execute_result')
    assert set(shown) == set(SHOWN)
    for call, text in SHOWN.items():
        assert '<table' in shown[call] and text in shown[call], call
        assert ('<img' in shown[call]) == (call in PICTURES), call
    for call in ('kd_det.train(', 'kd_det.distill('):  # in one line that was replaced again and again
        cell = next(cell for cell in notebook.cells if call in cell.source)
        lines = [output.data['text/html'] for output in cell.outputs if output.output_type == 'display_data']
        assert any(re.fullmatch(PROGRESS, line) for line in lines), lines
    runs = folder / 'notebook_runs'
    assert [(runs / each / 'last_checkpoint').is_file() for each in ('teacher', 'student')] == [True, True]
    for checkpoint in ('teacher/epoch_10.pth', 'student/epoch_3.pth', 'student.pth'):
        assert (runs / checkpoint).is_file(), checkpoint
    assert set(folder.iterdir()) == {runs}  # nothing lies elsewhere
