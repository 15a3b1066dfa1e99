"""The study: variants of a model, and what stands beside them, on the same folds of one cohort.

`plan` says what is compared, `cells` does it piece by piece, `baselines` is what needs no image, `predictions` is the
table that every figure comes from, `measure` and `compare` are the figures, `judge` makes them, `maps` measures
saliency, `draw` and `page` show it all.
"""
