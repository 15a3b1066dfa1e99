"""The report of a prediction.

A whole head of 512 x 512 x 32 voxels with its brain, its haemorrhage and two saliency maps becomes one HTML file, from
the scan's file to the file of the report. The peer is nilearn's `view_img`, which shows one map over the scan, without
answers, masks and HU.
"""

import warnings

import nibabel as nib
import numpy as np

from ichprog.io import write_text
from ichprog.reporting.prediction_report import render
from ichprog.reporting.volumes import Layer, prepare_volumes
from ichprog.scan import read

from support.results import full_record

MOST_MB = 15.0


def test_a_report_of_a_whole_head(compare, record, head, tmp_path):
    from nilearn.plotting import view_img

    scan = read(head)
    brain = (scan.hu > 0) & (scan.hu < 90)
    blood = (brain & (scan.hu > 55)).astype(np.uint8)
    waves = np.sin(sum(np.ogrid[tuple(slice(0, n) for n in scan.hu.shape)]) / 20).astype(np.float32)
    layers = [Layer("Brain", "brain", brain), Layer("Haemorrhage", "haemorrhage", blood, ("blood",))]
    layers += [Layer(f"Map {number}", "map", waves * (-1) ** number) for number in range(2)]
    image = nib.Nifti1Image(np.asarray(scan.image(waves * brain).dataobj), scan.source_affine)

    def ours():
        volumes = prepare_volumes(read(head), layers)
        write_text(tmp_path / "ours.html", render(full_record(), volumes=volumes))
        return (tmp_path / "ours.html").stat().st_size

    def peer():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy about nilearn's masked arrays
            view_img(image, bg_img=str(head), threshold=0.2).save_as_html(tmp_path / "peer.html")
        return (tmp_path / "peer.html").stat().st_size

    mine, theirs = compare(ours, peer, rounds=2, warm_up=False)  # the peer takes minutes
    name, size = "nilearn's `view_img`, one map", "size of the file"
    target = ("ours", "at most", 1.5)
    record("512 x 512 x 32, two maps", "s", mine.seconds, theirs.seconds, peer_name=name, target=target)
    sizes = ([written / 1e6 for written in each.results] for each in (mine, theirs))
    record(size, "MB", *sizes, peer_name=name, target=("ours", "at most", MOST_MB))
