"""The study: variants of a model, and what stands beside them, on the same folds of one cohort.

`plan` says what is compared, `cells` does it piece by piece with `workers`, `record` keeps the folder what it is,
`baselines` is what needs no image, `predictions` is the table that every figure comes from. `judge` makes the figures
by `measure`, `compare` and `chance`; `explained` measures maps by `maps` and `faithful`; `present` writes it all by
`tables`, `draw` and `page`. `evaluate` scores a model that is there already, guarded by `leak`.
"""
