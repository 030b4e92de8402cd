from mmdet.evaluation.metrics import coco_metric

from kd_det.study.runs import use_fast_coco_evaluation


def test_coco_metric_evaluates_with_the_faster_library_where_it_is_installed(tmp_path, monkeypatch):
    """A stand-in for the library: what counts is that MMDetection's metric takes its class."""
    monkeypatch.setattr(coco_metric, 'COCOeval', coco_metric.COCOeval)  # put back at the end
    (tmp_path / 'faster_coco_eval.py').write_text('class COCOeval_faster: pass\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert use_fast_coco_evaluation() and coco_metric.COCOeval.__name__ == 'COCOeval_faster'


def test_without_it_nothing_changes(monkeypatch):
    before = coco_metric.COCOeval
    monkeypatch.setattr('kd_det.study.runs.find_spec', lambda name: None)
    assert not use_fast_coco_evaluation() and coco_metric.COCOeval is before
