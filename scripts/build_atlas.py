"""Build `ichprog/location/atlas.npz`: `python scripts/build_atlas.py FOLDER`.

FOLDER holds the atlas and the brain mask of BLAST-CT (repository biomedia-mira/blast-ct, commit ccfa6ef, Apache-2.0):
`blast_ct_atlas.nii.gz`, `blast_ct_atlas_labels.csv`, `blast_ct_template_mask.nii.gz` and `LICENSE.blast-ct`. Both
images have voxels of 1 mm in MNI space. Left and right are averaged, and only one half is stored. Needs SciPy.
"""

import argparse
import csv
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

ATLAS = Path(__file__).parents[1] / "ichprog" / "location" / "atlas.npz"
REGIONS = {  # name: parts of the names in the atlas of BLAST-CT
    "brain stem": ("BrainStem",),
    "cerebellum": ("Cerebellum",),
    "basal ganglia": ("BasalForebrain", "BasalGanglia", "Basalganglia", "Caudate"),
    "thalamus": ("Thalamus",),
    "insula": ("Insula",),
    "hippocampus": ("Hippocampus",),
    "frontal lobe": ("FrontalLobe",),
    "parietal lobe": ("ParietalLobe",),
    "temporal lobe": ("TemporalLobe",),
    "occipital lobe": ("OccipitalLobe",),
    "ventricles": ("Ventricle",),
}
REGION_MM, DISTANCE_MM = 2, 4
LARGEST_MM = 30.0  # largest stored distance from the surface of the brain
UNIT_MM = 0.25  # of the stored distance
MARGIN_MM = 24  # around the brain


def main() -> None:
    """Read the images, fold them at the midsagittal plane, and store one half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with (folder / "blast_ct_atlas_labels.csv").open(encoding="utf-8") as file:
        labels = {int(row["ROIIndex"]): row["ROIName"] for row in csv.DictReader(file)}
    atlas = nib.load(folder / "blast_ct_atlas.nii.gz")
    numbers = np.asarray(atlas.dataobj).round().astype(int)
    region_of = np.full(max(labels) + 1, -1)
    for label, name in labels.items():
        (region_of[label],) = (n for n, parts in enumerate(REGIONS.values()) if any(part in name for part in parts))
    brain = np.asarray(nib.load(folder / "blast_ct_template_mask.nii.gz").dataobj) > 0.5
    corner = np.round(atlas.affine[:3, 3]).astype(int)
    middle = -corner[0]  # index of the midsagittal plane

    signed = ndimage.distance_transform_edt(brain) - ndimage.distance_transform_edt(~brain)
    signed = ndimage.gaussian_filter(signed, 1.5)
    width = min(middle, brain.shape[0] - 1 - middle)
    right = slice(middle, middle + width + 1)
    left = slice(middle, middle - width - 1 if middle > width else None, -1)
    distance = (signed[right] + signed[left]) / 2
    regions = region_of[numbers]
    shares = np.stack(
        [
            sum(ndimage.gaussian_filter((regions == n).astype(np.float32), 1.0)[half] for half in (right, left))
            for n in range(len(REGIONS))
        ]
    )
    known = shares.max(0) > 0.2
    nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
    region = shares.argmax(0)[tuple(nearest)].astype(np.uint8)

    box = [slice(max(0, int(w.min()) - MARGIN_MM), int(w.max()) + MARGIN_MM + 1) for w in np.nonzero(distance > 0)]
    box[0] = slice(0, box[0].stop)
    first = [0, corner[1] + box[1].start, corner[2] + box[2].start]
    fine, coarse = (tuple(slice(b.start, b.stop, mm) for b in box) for mm in (REGION_MM, DISTANCE_MM))
    np.savez_compressed(
        ATLAS,
        region=region[fine],
        names=np.array(list(REGIONS)),
        region_mm=REGION_MM,
        distance=np.round(np.clip(distance[coarse], -LARGEST_MM, LARGEST_MM) / UNIT_MM).astype(np.int8),
        distance_mm=DISTANCE_MM,
        unit_mm=UNIT_MM,
        first=np.array(first),
        source="BLAST-CT (github.com/biomedia-mira/blast-ct, commit ccfa6ef), downsampled and folded at the midline",
        licence=(folder / "LICENSE.blast-ct").read_text(encoding="utf-8"),
    )


if __name__ == "__main__":
    main()
