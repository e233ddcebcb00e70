"""Input gates and confidence: is a case like those the model was trained on, and does the model agree with itself?

`measured` says what is looked at, `members` and `certainty` how sure the network is, `envelope`, `reference` and
`thresholds` what is allowed, `gates` judges, `watch` looks on while a case is predicted, `calibration` makes the gates.
"""
