"""Cohorts of simulated brains with lesion masks."""

import nibabel as nib
import numpy as np

from ichprog.cohort import Cohort

from support.phantoms import brain_hu

SHAPE = (96, 96, 30)
LEFT, RIGHT = (330, 220, 16), (182, 220, 16)  # where brain_hu puts the lesion, along i of 512
AFFINE = np.diag([-2.5, -2.5, 5.0, 1.0])  # LPS


def masked_cohort_in(folder, *, lesions=(LEFT, RIGHT), column=None, flip=False):
    """Write a cohort with lesion masks in the layout of `ichprog simulate`."""
    (folder / "scans").mkdir(parents=True)
    (folder / "masks").mkdir()
    rows = ["patient,scan,poor_outcome" + ("" if column is None else ",mask")]
    for number, lesion in enumerate(lesions):
        hu = brain_hu(SHAPE, lesion, seed=number)
        mask = (hu == 68).astype(np.uint8)
        nib.Nifti1Image(hu, AFFINE).to_filename(folder / "scans" / f"p{number}.nii.gz")
        nib.Nifti1Image(mask[::-1] if flip else mask, AFFINE).to_filename(folder / "masks" / f"p{number}.nii.gz")
        rows.append(f"p{number},scans/p{number}.nii.gz,1" + ("" if column is None else f",{column[number]}"))
    (folder / "cohort.csv").write_text("\n".join(rows))
    return Cohort.read(folder / "cohort.csv")
