"""How good are the answers, and where should a person look?

`metrics` and `intervals` make the numbers, `plots` and `report` one page that shows them.
"""
