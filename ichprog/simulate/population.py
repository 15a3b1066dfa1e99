"""Population: a causal model of age, haemorrhage, Glasgow Coma Scale (GCS) and outcome.

The only causal arrows:

    age -> atrophy, white matter, calcification            (the image shows these, not the age)
    location -> volume, intraventricular extension
    location, volume, extension -> GCS
    age, location, volume, extension, GCS -> death within 30 days            by the ICH score
    age, location, volume, GCS, cognition before -> independence if alive    by the FUNC score
    age -> cognition before

The probability of independence also falls with age within the steps of the score.

A patient without haemorrhage, which only some options draw, has no outcome.

The image shows location, volume, extension and the three marks of age. It does not show GCS, cognition and chance, so
only a part of the outcome can be predicted from it.

Sources. Death by score: Hemphill et al., Stroke 2001 (doi 10.1161/01.STR.32.4.891), 0, 13, 26, 72, 97, 100, 100 %.
Independence of survivors by score: Rost et al., Stroke 2008 (doi 10.1161/STROKEAHA.107.512202), 0, 29, 48, 75, 95 %.
Proportions inside the brain, 49 % deep, 35 % lobar, 10 % cerebellar, 6 % brainstem: Flaherty et al., Neurology 2006
(doi 10.1212/01.wnl.0000208408.98482.99). Assumed, with no source of their own: the share of subdural and subarachnoid
haemorrhage; how deep ones divide into putamen and thalamus; the volumes; how often blood enters the ventricles; how
strongly age marks a brain; and that both scores hold outside the brain's tissue too. The effects on the GCS are set so
that the correlations of age and GCS with the outcome come near those of the 261 patients of Cobo et al. 2024.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ichprog import clinical_scores
from ichprog.simulate.realism import PLAIN, Realism


class Site(NamedTuple):
    """Describe a site of haemorrhage.

    Attributes:
        share: Fraction of patients.
        median_ml: Median volume, in mL.
        most_ml: Largest possible volume, in mL.
        ventricular: Probability that blood enters the ventricles, at the median volume.
        infratentorial: Whether the site is below the tentorium.
        location: Location in the FUNC score; "lobar" outside the brain tissue.
        kind: "parenchymal", "subarachnoid", "subdural" or "epidural".
    """

    share: float
    median_ml: float
    most_ml: float
    ventricular: float
    infratentorial: bool
    location: str
    kind: str = "parenchymal"


SITES = {
    "putamen": Site(0.25, 18, 110, 0.30, False, "deep"),
    "thalamus": Site(0.12, 10, 50, 0.60, False, "deep"),
    "lobar": Site(0.27, 28, 120, 0.20, False, "lobar"),
    "cerebellum": Site(0.08, 13, 45, 0.35, True, "infratentorial"),
    "pons": Site(0.05, 6, 16, 0.35, True, "infratentorial"),
    "subdural": Site(0.15, 45, 140, 0.03, False, "lobar", "subdural"),
    "subarachnoid": Site(0.08, 22, 60, 0.35, False, "lobar", "subarachnoid"),
    "epidural": Site(0.0, 25, 120, 0.02, False, "lobar", "epidural"),
    "convexity": Site(0.0, 10, 40, 0.05, False, "lobar", "subarachnoid"),
}
NO_SITE = "none"  # of a patient without haemorrhage
VOLUME_SD = 0.85  # of the logarithm of the volume
LEAST_ML = 2.0
_SHARES = {  # of all kinds of haemorrhage; assumed
    "putamen": 0.12, "thalamus": 0.08, "lobar": 0.25, "cerebellum": 0.06, "pons": 0.03,
    "subdural": 0.17, "subarachnoid": 0.09, "epidural": 0.08, "convexity": 0.12,
}  # fmt: skip
_SMALL_ML = {  # medians; parenchymal ones near 8 mL together
    "putamen": 10, "thalamus": 6, "lobar": 9, "cerebellum": 6, "pons": 2.5,
    "subdural": 14, "subarachnoid": 8, "epidural": 12, "convexity": 4,
}  # fmt: skip
_SMALL_SD, _SMALL_LEAST_ML = 1.25, 0.3
AGE = (73.0, 15.0)  # mean and standard deviation, years
AGE_RANGE = (20.0, 98.0)
ADULT_AGES = (18.0, 98.0)
MARKS = {"atrophy": 0.85, "white_matter": 0.70, "calcification": 0.50}  # correlation of each with age
DEATH = np.array(clinical_scores.ICH_MORTALITY)  # by ICH score
INDEPENDENCE = np.array(clinical_scores.FUNC_INDEPENDENCE_OF_SURVIVORS)  # by FUNC score
GCS = np.arange(3, 16)
# log-odds of a GCS of at least 4, 5, ..., 15, for a supratentorial haemorrhage of 20 mL outside the ventricles
_GCS_AT_LEAST = np.linspace(3.7, 0.0, 12)
_GCS_BY_LOG_VOLUME, _GCS_BY_EXTENSION, _GCS_BY_PONS = -0.8, -1.0, -2.0
_INDEPENDENCE_BY_AGE = -0.9  # log-odds for each standard deviation of age, within the score's three steps of age
_COGNITION = (-1.9, 1.2)  # log-odds of impairment before, at the mean age, and for each standard deviation of age


@dataclass(frozen=True)
class Person:
    """Describe one simulated patient.

    Attributes:
        age: Years.
        sex: "F" or "M"; without effect.
        site: A name in `SITES`, or "none" without haemorrhage.
        side: -1 right, 1 left; the direction of the offset for a site in the middle; 0 without haemorrhage.
        volume_ml: Volume of the haemorrhage outside the ventricles, in mL.
        ventricular: Fraction of the ventricles filled with blood.
        marks: Each of `MARKS` in standard deviations.
        gcs: Glasgow Coma Scale, 3 to 15.
        impaired: Whether cognition was impaired before the haemorrhage.
        dead: Whether the patient dies within 30 days.
        poor: Whether the patient is dead or dependent.
        uniform_age: Whether the age was drawn uniformly from `ADULT_AGES`.
        shared_causes: As in `Realism`.
        label_noise: As in `Realism`.
    """

    age: int
    sex: str
    site: str
    side: int
    volume_ml: float
    ventricular: float
    marks: dict[str, float]
    gcs: int
    impaired: bool
    dead: bool
    poor: bool
    uniform_age: bool = False
    shared_causes: float = 1.0
    label_noise: float = 0.0

    @property
    def bleeds(self) -> bool:
        """Return whether the patient has a haemorrhage."""
        return self.site != NO_SITE

    @property
    def kind(self) -> str:
        """Return the kind of haemorrhage: "parenchymal", "subarachnoid", "subdural", "epidural" or "none"."""
        return SITES[self.site].kind if self.bleeds else NO_SITE

    @property
    def infratentorial(self) -> bool:
        """Return whether the haemorrhage is below the tentorium."""
        return self.bleeds and SITES[self.site].infratentorial

    def truth(self) -> dict[str, float | None]:
        """Return the true probabilities of the patient's labels, and their probabilities given the image.

        Returns:
            `p_poor`: Poor outcome, given all causes. `p_gcs_13_15`, `p_gcs_9_12`, `p_gcs_3_8`: each class of GCS, given
            its causes, all of which the image shows. `seen_poor`, `seen_age_80`: poor outcome and an age of 80 or more,
            given the image alone, by Bayes' rule over age, GCS and cognition. No reader of the image can do better.
            `seen_poor_with_age`, `seen_poor_with_gcs`, `seen_poor_with_age_gcs`: poor outcome, given the image and
            these clinical values. Without haemorrhage, all but `seen_age_80` are None.
        """
        ages, weights = self._ages_given_image()
        old = float(weights[ages >= 80].sum())
        names = ("p_poor", "p_gcs_13_15", "p_gcs_9_12", "p_gcs_3_8", "seen_poor")
        with_values = ("seen_poor_with_age", "seen_poor_with_gcs", "seen_poor_with_age_gcs")
        if not self.bleeds:
            return {**dict.fromkeys(names), "seen_age_80": old, **dict.fromkeys(with_values)}
        gcs, table = self._gcs_probabilities(), self._poor_by_gcs_and_age(ages)
        row, column = int(np.abs(GCS - self.gcs).argmin()), int(np.abs(ages - self.age).argmin())
        seen = gcs @ table @ weights, gcs @ table[:, column], table[row] @ weights, table[row, column]
        given_all = float(self._poor(np.array(self.gcs), np.array(self.age), self.impaired))
        classes = [float(gcs[chosen].sum()) for chosen in (GCS >= 13, (GCS >= 9) & (GCS <= 12), GCS <= 8)]
        values = [self._recorded(given_all), *classes, self._recorded(float(seen[0]))]
        return {
            **dict(zip(names, values, strict=True)),
            "seen_age_80": old,
            **{name: self._recorded(float(value)) for name, value in zip(with_values, seen[1:], strict=True)},
        }

    def _poor_by_gcs_and_age(self, ages: np.ndarray) -> np.ndarray:
        """Return the probability of a poor outcome `(GCS, age)`, averaged over cognition, which depends on the age."""
        impaired = _impairment(ages)
        unimpaired, other = (self._poor(GCS[:, None], ages, state) for state in (False, True))
        table: np.ndarray = (1 - impaired) * unimpaired + impaired * other
        return table

    def ich_score(self) -> int:
        """Return the ICH score (Hemphill et al. 2001), 0 to 6."""
        return int(self._ich(np.array(self.gcs), np.array(self.age)))

    def func_score(self) -> int:
        """Return the FUNC score (Rost et al. 2008), 0 to 11."""
        return int(self._func(np.array(self.gcs), np.array(self.age), self.impaired))

    def _recorded(self, probability: float) -> float:
        """Return the probability that a poor outcome is recorded, given the probability that it occurs."""
        return (1 - self.label_noise) * probability + self.label_noise / 2

    def _ich(self, gcs: np.ndarray, age: np.ndarray) -> np.ndarray:
        return np.asarray(
            clinical_scores.ich_score(
                gcs=gcs,
                age=age,
                volume_ml=self.volume_ml,
                intraventricular=self.ventricular > 0,
                infratentorial=SITES[self.site].infratentorial,
            )
        )

    def _func(self, gcs: np.ndarray, age: np.ndarray, impaired: bool) -> np.ndarray:
        return np.asarray(
            clinical_scores.func_score(
                volume_ml=self.volume_ml,
                age=age,
                location=SITES[self.site].location,
                gcs=gcs,
                impaired_before=impaired,
            )
        )

    def _poor(self, gcs: np.ndarray, age: np.ndarray, impaired: bool) -> np.ndarray:
        result: np.ndarray = 1 - (1 - DEATH[self._ich(gcs, age)]) * self._independent(gcs, age, impaired)
        return result

    def _independent(self, gcs: np.ndarray, age: np.ndarray, impaired: bool) -> np.ndarray:
        """Return the probability that a survivor is independent."""
        by_score = INDEPENDENCE[self._func(gcs, age, impaired)]
        odds = by_score / (1 - by_score) * np.exp(_INDEPENDENCE_BY_AGE * _standardise(age))
        result: np.ndarray = odds / (1 + odds)
        return result

    def _gcs_probabilities(self) -> np.ndarray:
        """Return the probability of each value of `GCS`."""
        effect = _GCS_BY_LOG_VOLUME * np.log(self.volume_ml / 20)
        effect += _GCS_BY_EXTENSION * (self.ventricular > 0) + _GCS_BY_PONS * (self.site == "pons")
        at_least = 1 / (1 + np.exp(-(_GCS_AT_LEAST + self.shared_causes * effect)))
        return -np.diff(np.concatenate([[1.0], at_least, [0.0]]))

    def _ages_given_image(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ages in years and the probability of each, given the marks."""
        lowest, highest = ADULT_AGES if self.uniform_age else AGE_RANGE
        ages = np.arange(lowest, highest + 1)
        standard = _standardise(ages + 0.5)  # the middle of the year in which the marks arose
        log = np.zeros(len(ages)) if self.uniform_age else -(standard**2) / 2
        for name, correlation in _mark_correlations(self.shared_causes).items():
            log -= (self.marks[name] - correlation * standard) ** 2 / (2 * (1 - correlation**2))
        weights = np.exp(log - log.max())
        return ages, weights / weights.sum()


def sites(realism: Realism) -> Mapping[str, Site]:
    """Return the sites of haemorrhage with their shares and volumes.

    Args:
        realism: Options of the simulation.

    Examples:
        >>> sites(PLAIN)["putamen"].median_ml
        18
    """
    found = dict(SITES)
    if realism.all_kinds:
        found = {name: site._replace(share=_SHARES[name]) for name, site in found.items()}
    if realism.small_bleeds:
        found = {name: site._replace(median_ml=_SMALL_ML[name]) for name, site in found.items()}
    return found


def draw_person(random: np.random.Generator, realism: Realism = PLAIN) -> Person:
    """Draw one patient.

    Args:
        random: Random generator.
        realism: Options of the simulation.

    Examples:
        >>> person = draw_person(np.random.default_rng(0))
        >>> person.site in SITES
        True
    """
    of_age, of_blood, of_noise = random.spawn(3)
    age = _draw_within(lambda: random.normal(*AGE), *AGE_RANGE)
    if realism.adult_ages:
        age = float(of_age.uniform(ADULT_AGES[0], ADULT_AGES[1] + 1))
    standard = float(_standardise(np.array(age)))
    correlations = _mark_correlations(realism.shared_causes)
    marks = {name: r * standard + np.sqrt(1 - r**2) * random.normal() for name, r in correlations.items()}
    options = sites(realism)
    site = str(random.choice(list(options), p=[s.share for s in options.values()]))
    chosen = options[site]
    spread, least_ml = (_SMALL_SD, _SMALL_LEAST_ML) if realism.small_bleeds else (VOLUME_SD, LEAST_ML)
    log_ml = _draw_within(
        lambda: random.normal(np.log(chosen.median_ml), spread), np.log(least_ml), np.log(chosen.most_ml)
    )
    odds = np.log(chosen.ventricular / (1 - chosen.ventricular)) + 0.8 * (log_ml - np.log(chosen.median_ml))
    extends = random.random() < 1 / (1 + np.exp(-odds))
    person = Person(
        age=int(age),
        sex=str(random.choice(["F", "M"])),
        site=site,
        side=int(random.choice([-1, 1])),
        volume_ml=round(float(np.exp(log_ml)), 2),
        ventricular=round(float(random.uniform(0.03 if realism.small_bleeds else 0.15, 0.8)), 3) if extends else 0.0,
        marks={name: round(float(value), 3) for name, value in marks.items()},
        gcs=15,
        impaired=bool(random.random() < _impairment(np.array(age))),
        dead=False,
        poor=False,
        uniform_age=realism.adult_ages,
        shared_causes=realism.shared_causes,
        label_noise=realism.label_noise,
    )
    if of_blood.random() < realism.without_blood:
        return replace(person, site=NO_SITE, side=0, volume_ml=0.0, ventricular=0.0)
    gcs = np.array(random.choice(GCS, p=person._gcs_probabilities()))
    years = np.array(person.age)
    dead = random.random() < DEATH[person._ich(gcs, years)]
    independent = random.random() < person._independent(gcs, years, person.impaired)
    poor = bool(dead or not independent)
    if of_noise.random() < realism.label_noise:
        poor = bool(of_noise.random() < 0.5)
    return replace(person, gcs=int(gcs), dead=bool(dead), poor=poor)


def _mark_correlations(shared_causes: float) -> dict[str, float]:
    """Return the correlation of each of `MARKS` with age."""
    if shared_causes == 1:
        return MARKS  # exactly, so that the patients of a seed stay the same
    return {name: float(np.tanh(shared_causes * np.arctanh(value))) for name, value in MARKS.items()}


def _impairment(age: np.ndarray) -> np.ndarray:
    """Return the probability of impaired cognition before the haemorrhage, by age."""
    at_mean, slope = _COGNITION
    probability: np.ndarray = 1 / (1 + np.exp(-(at_mean + slope * _standardise(age))))
    return probability


def _standardise(age: np.ndarray) -> np.ndarray:
    """Return age in standard deviations from the mean."""
    return (age - AGE[0]) / AGE[1]


def _draw_within(draw_one: Callable[[], float], low: float, high: float) -> float:
    """Draw until the number is within bounds."""
    while not low <= (value := float(draw_one())) <= high:
        pass
    return value
